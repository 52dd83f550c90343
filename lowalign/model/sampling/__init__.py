"""Sampling completions: which samples share a forward, and how each token is drawn."""
