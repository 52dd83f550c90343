"""What is trained: adapters of every kind on the base, their weights and their folders."""
