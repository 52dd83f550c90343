"""What may be wrong with rows that can be read: repeated, held out too, empty, in another language, refusals."""
