"""Several policies on one base, as `lowalign compare` and `lowalign eval` load them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from lowalign.config.evaluation import BARE
from lowalign.config.rows import MeasuredRowsConfig, ShortPromptsConfig
from lowalign.config.sections import Sampling
from lowalign.data.chat import Chat
from lowalign.data.prompt_format import check_prompt_format, formats_of
from lowalign.data.prompts import PromptRow, Prompts, distinct_prompts, prompt_ids
from lowalign.errors import UserError
from lowalign.export.sources import base_of
from lowalign.model.adapters.files import adapter_template, common_format, trained_format
from lowalign.model.host import Host
from lowalign.model.policy import load_stack


@dataclass(frozen=True)
class Policy:
    """name: as the user wrote it. adapters: one, or none for the bare base. chat: the template it was trained with."""

    name: str
    adapters: tuple[str, ...]
    chat: Chat


def adapters_of(names: Sequence[str]) -> list[str]:
    """The names without those of the bare base."""
    return [name for name in names if name not in BARE]


def read_policies(
    names: Sequence[str], tokenizer: PreTrainedTokenizerBase, positions: int | None = None
) -> list[Policy]:
    """Policies by the name of their run, adapter folder or Hub id, or a word for the bare base.

    Where the tokenizer has no template, the bare base is asked with that of the first policy that has one: they then
    answer the same tokens. positions: as in Chat.
    """
    adapters = [() if name in BARE else (name,) for name in names]
    every = [adapter for own in reversed(adapters) for adapter in own]
    bare = None if tokenizer.chat_template else adapter_template(every)
    templates = [adapter_template(own) if own else bare for own in adapters]
    chats = {template: Chat(tokenizer, template) for template in dict.fromkeys(templates)}
    for chat in chats.values():
        chat.positions = positions
    return [Policy(name, own, chats[template]) for name, own, template in zip(names, adapters, templates, strict=True)]


def prompts_for(
    policies: Sequence[Policy], files: Sequence[str], data: ShortPromptsConfig | MeasuredRowsConfig
) -> Prompts:
    """The different prompts of the files, with the ids of the first policy's template. Strings are plain text or turns, as the
    policies were trained on them; --data.prompt-format holds over that.

    Raises UserError as distinct_prompts does, and for a policy that was trained on prompts of the other format.
    """
    adapters = adapters_of([policy.name for policy in policies])
    prompt_format = data.prompt_format or common_format(adapters)
    prompts = distinct_prompts(files, policies[0].chat, data.limit, data.max_length, prompt_format)
    formats = formats_of(row.prompt for row, _ in prompts)
    for adapter in adapters if data.prompt_format is None else ():
        check_prompt_format(adapter, trained_format(adapter), formats)
    return prompts


def base_named_by(model: str | None, names: Sequence[str]) -> str:
    """--model, or the base that the first of these adapters names. Raises UserError when none does."""
    adapters = adapters_of(names)
    if model is None and not adapters:
        raise UserError(f"{' and '.join(names)} name no base: give --model M")
    return model or base_of(adapters[0])


class PolicyAnswers:
    """Answers of several policies to the same prompts, sampled on one base."""

    def __init__(
        self,
        host: Host,
        policies: Sequence[Policy],
        rows: Sequence[PromptRow],
        n: int,
        sampling: Sampling,
        allow_base_mismatch: bool = False,
    ) -> None:
        """Load all adapters onto the host. n: answers of each policy to each prompt."""
        self.host, self.rows, self.n, self.sampling = host, rows, n, sampling
        self._loaded = []
        for k, policy in enumerate(policies):
            stacks = [load_stack(host, f"policy{k}", adapter, allow_base_mismatch) for adapter in policy.adapters]
            self._loaded.append((policy, sum(stacks, ()), [prompt_ids(policy.chat, row) for row in rows]))

    def __call__(self, block: Sequence[int]) -> list[dict[str, Any]]:
        """For the prompts with these numbers: prompt, and completions in the order of the policies, each with policy,
        completion, stopped and tokens."""
        base = self.host.base
        own_ends = base.eos_ids
        lines: list[dict[str, Any]] = [{"prompt": self.rows[i].prompt, "completions": []} for i in block]
        for k, (policy, stack, ids) in enumerate(self._loaded):
            base.eos_ids = own_ends
            base.end_at(policy.chat.end_of_turn)
            # Other random numbers for each policy: two that are alike would give the same answers, all of them ties.
            seeds = [i * len(self._loaded) + k for i in block]
            with self.host.use(*stack):
                groups = self.host.generate([ids[i] for i in block], self.n, self.sampling, seeds)
            for line, group in zip(lines, groups, strict=True):
                for c in group:
                    text = base.tokenizer.decode(c.ids, skip_special_tokens=True)
                    answer = {"completion": text, "stopped": c.stopped, "tokens": len(c.ids)}
                    line["completions"].append({"policy": policy.name} | answer)
        base.eos_ids = own_ends
        return lines
