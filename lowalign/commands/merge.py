"""`lowalign merge`: base + adapters → a model folder that plain transformers loads."""

from lowalign.config.commands import MergeConfig
from lowalign.export.merge import write_merged


def merge(config: MergeConfig) -> int:
    """Run the command. Returns the exit code."""
    write_merged(config)
    return 0
