"""lowalign: align a 7B model on one 24 GB card.

    from lowalign import Base, Host, Example

`import lowalign` is instant: torch and transformers are imported when one of these names is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowalign.commands.api import (
        LoRA,
        PrefixTuning,
        PromptTuning,
        Run,
        best_of_n,
        dpo,
        ppo,
        reward,
        sft,
        train_with,
    )
    from lowalign.config.sections import Sampling
    from lowalign.data.pack import Example
    from lowalign.export.merge import merge
    from lowalign.hub.pull import pull
    from lowalign.hub.push import push
    from lowalign.model.base.base import Base
    from lowalign.model.host import Host

__version__ = "0.1.0"
__all__ = [
    "Base",
    "Example",
    "Host",
    "LoRA",
    "PrefixTuning",
    "PromptTuning",
    "Run",
    "Sampling",
    "best_of_n",
    "dpo",
    "merge",
    "ppo",
    "pull",
    "push",
    "reward",
    "sft",
    "train_with",
]

_HOMES = {
    "Base": "lowalign.model.base.base",
    "Example": "lowalign.data.pack",
    "Host": "lowalign.model.host",
    "Sampling": "lowalign.config.sections",
    "merge": "lowalign.export.merge",
    "pull": "lowalign.hub.pull",
    "push": "lowalign.hub.push",
}
_HOMES |= dict.fromkeys(
    ("LoRA", "PrefixTuning", "PromptTuning", "Run", "best_of_n", "dpo", "ppo", "reward", "sft", "train_with"),
    "lowalign.commands.api",
)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
