"""`lowalign merge`: base + adapters → a model folder that plain transformers loads."""

from lowalign.config.commands import MergeConfig
from lowalign.export import merge as export


def merge(config: MergeConfig) -> int:
    """Run `lowalign merge`. Returns the exit code."""
    options = dict(vars(config))
    export.merge(options.pop("adapters"), options.pop("out"), **options)
    return 0
