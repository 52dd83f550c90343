"""Drawing completions."""
