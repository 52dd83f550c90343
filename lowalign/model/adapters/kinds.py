"""The kinds of adapters. A new kind is one more entry."""

from peft import PeftConfig

from lowalign.config.sections import AdapterConfig
from lowalign.errors import UserError
from lowalign.model.adapters.adapter import Adapter
from lowalign.model.adapters.bitdelta import BitDelta
from lowalign.model.adapters.lora import Lora
from lowalign.model.adapters.prefix_tuning import PrefixTuning
from lowalign.model.adapters.prompt_tuning import PromptTuning

KINDS: tuple[type[Adapter], ...] = (Lora, PromptTuning, PrefixTuning, BitDelta)
BY_OPTION = {kind.option: kind for kind in KINDS}
BY_PEFT_TYPE = {kind.peft_type: kind for kind in KINDS}


def kind_of(config: PeftConfig) -> type[Adapter]:
    """The kind that a peft config is of. Raises UserError when there is none."""
    for kind in KINDS:
        if isinstance(config, kind.config_class):
            return kind
    name = getattr(config, "peft_type", type(config).__name__)
    *classes, last = [kind.config_class.__name__ for kind in KINDS]
    raise UserError(f"{name} is not supported; use {', '.join(classes)} or {last}")


def peft_config(options: AdapterConfig) -> PeftConfig:
    """The peft config for --adapter options."""
    return BY_OPTION[options.kind].peft_config(options)
