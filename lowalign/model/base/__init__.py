"""The frozen weights: loading, identity, and the probe that packed attention must pass."""
