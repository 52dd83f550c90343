"""The attention registered with transformers: over Packs and over the sampler's cache, behind a soft prompt."""
