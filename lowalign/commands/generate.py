"""`lowalign generate`: sample completions of prompts; one line of JSON for each."""

import sys
from collections.abc import Sequence
from contextlib import nullcontext

from lowalign.config.commands import GenerateConfig
from lowalign.data.chat import Chat
from lowalign.data.prompt_format import formatted
from lowalign.data.prompts import PromptRow, prompt_ids, read_prompts
from lowalign.durable import json_line
from lowalign.log import log
from lowalign.model.adapters.files import adapter_template, trained_format
from lowalign.model.base.base import Base
from lowalign.model.host import Host
from lowalign.model.policy import load_policy

AT_A_TIME = 256  # prompts whose completions are written together


def generate(config: GenerateConfig) -> int:
    """Run the command. Returns the exit code."""
    prompt_format = config.prompt_format or _trained_format(config.adapter)
    if config.prompts is None:
        rows = [PromptRow(formatted(config.prompt, prompt_format), "--prompt")]
    else:
        rows = list(read_prompts([str(config.prompts)], prompt_format))
    if config.prompt_format is None and any(isinstance(row.prompt, str) for row in rows):
        log("prompts that are strings are plain text, without the chat template; --prompt-format chat makes them turns")
    base = Base.load(config.model, **vars(config.base))
    host = Host(base)
    stack = load_policy(host, config.adapter, config.allow_base_mismatch)
    chat = Chat(base.tokenizer, adapter_template(config.adapter))
    base.end_at(chat.end_of_turn)
    ids = [prompt_ids(chat, row) for row in rows]
    with host.use(*stack), config.out.open("w") if config.out else nullcontext(sys.stdout) as out:
        for start in range(0, len(rows), AT_A_TIME):
            part = range(start, min(start + AT_A_TIME, len(rows)))
            completions = host.generate([ids[i] for i in part], config.n, config.sampling, seeds=part)
            for i, group in zip(part, completions, strict=True):
                for c in group:
                    text = base.tokenizer.decode(c.ids, skip_special_tokens=True)
                    line = {"prompt": rows[i].prompt, "completion": text, "stopped": c.stopped}
                    out.write(json_line(line))
            out.flush()
    return 0


def _trained_format(adapters: Sequence[str]) -> str | None:
    """The format of prompts that the adapters were trained on; None where it is not known, or they differ."""
    formats = {trained_format(adapter) for adapter in adapters} - {None}
    return formats.pop() if len(formats) == 1 else None
