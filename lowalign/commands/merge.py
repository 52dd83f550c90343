"""`lowalign merge`: base + adapters → a model folder that plain transformers loads."""

from lowalign.config.export import MergeConfig
from lowalign.export.merge import write_merged
from lowalign.model.base.base import Base


def merge(config: MergeConfig, base: Base | None = None) -> int:
    """Run the command; `base` is one that is loaded already. Returns the exit code."""
    write_merged(config, base)
    return 0
