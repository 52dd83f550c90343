"""From rows to packs of tokens: chat template, encoding, truncation, packing, micro-batches."""
