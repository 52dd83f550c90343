"""What is run beside training: checks, reports, recipes."""
