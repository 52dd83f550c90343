"""Several policies on one base, as `lowalign compare` and `lowalign eval` load them."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from lowalign.config.evaluation import BARE
from lowalign.data.chat import Chat
from lowalign.errors import UserError
from lowalign.export.sources import base_of
from lowalign.model.adapters.files import adapter_template


@dataclass(frozen=True)
class Policy:
    """name: as the user wrote it. adapters: one, or none for the bare base. chat: the template it was trained with."""

    name: str
    adapters: tuple[str, ...]
    chat: Chat


def adapters_of(names: Sequence[str]) -> list[str]:
    """The names without those of the bare base."""
    return [name for name in names if name not in BARE]


def read_policies(names: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[Policy]:
    """Policies by the name of their run, adapter folder or Hub id, or a word for the bare base.

    Where the tokenizer has no template, the bare base is asked with that of the first policy that has one: they then
    answer the same tokens.
    """
    adapters = [() if name in BARE else (name,) for name in names]
    every = [adapter for own in reversed(adapters) for adapter in own]
    bare = None if tokenizer.chat_template else adapter_template(every)
    templates = [adapter_template(own) if own else bare for own in adapters]
    chats = {template: Chat(tokenizer, template) for template in dict.fromkeys(templates)}
    return [Policy(name, own, chats[template]) for name, own, template in zip(names, adapters, templates, strict=True)]


def base_named_by(model: str | None, names: Sequence[str]) -> str:
    """--model, or the base that the first of these adapters names. Raises UserError when none does."""
    adapters = adapters_of(names)
    if model is None and not adapters:
        raise UserError(f"{' and '.join(names)} name no base: give --model M")
    return model or base_of(adapters[0])
