"""`lowalign pull`: an adapter or a model of the Hub → a folder."""

from lowalign.config.export import PullConfig
from lowalign.hub import pull as export


def pull(config: PullConfig) -> int:
    """Run `lowalign pull`. Returns the exit code."""
    export.pull(config.repo, config.out, revision=config.revision)
    return 0
