"""What may be wrong with rows that can be read: repeated, leaked into the held-out ones, empty, in another language, refusing."""
