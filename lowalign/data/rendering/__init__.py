"""A conversation as the chat template writes it: its forms, its pieces, and what the template leaves out."""
