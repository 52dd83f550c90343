"""Memory, traffic and time of a command's steps, counted in a dry run on the meta device from config.json alone."""
