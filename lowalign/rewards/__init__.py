"""How good a completion is: rewards, pairwise verdicts, and the selection of the best."""
