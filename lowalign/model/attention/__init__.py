"""The attention function registered with transformers: packed, blockwise, and over the sampler's cache."""
