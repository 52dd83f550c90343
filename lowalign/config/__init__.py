"""Options and recipes: every flag is a field of a dataclass in here. Imports no torch."""
