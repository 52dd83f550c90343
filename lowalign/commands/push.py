"""`lowalign push`: an adapter or a model → the Hub."""

from lowalign.config.export import PushConfig
from lowalign.hub import push as export


def push(config: PushConfig) -> int:
    """Run `lowalign push`. Returns the exit code."""
    export.push(config.path, config.repo, private=config.private, revision=config.revision)
    return 0
