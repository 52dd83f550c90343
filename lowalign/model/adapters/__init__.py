"""What is trained: adapters of any kind on the base, their weights and their folders."""
