"""From files of rows to packs of tokens."""
