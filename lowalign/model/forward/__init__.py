"""Hidden states, log-probabilities, values and scores of packed or single rows."""
