"""The frozen base, the adapters on it, and the kernels that make them fast."""
