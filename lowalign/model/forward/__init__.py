"""Log-probabilities, entropies, values and scores of Examples, from packed rows or one row per completion."""
