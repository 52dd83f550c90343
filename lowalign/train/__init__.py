"""The loop: one engine for every method, its optimizers, checkpoints, signals and metrics."""
