"""How good a completion is: rewards, pairwise verdicts, and the choice among scored completions."""
