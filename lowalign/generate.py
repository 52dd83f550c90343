"""`lowalign generate`: prompts in, completions out, one JSON object a completion."""

import json
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

from lowalign.config import GenerateConfig
from lowalign.data.chat import Chat
from lowalign.data.read import BadRow, read_rows
from lowalign.data.turns import read_turns
from lowalign.errors import UserError
from lowalign.model.adapter_files import locate
from lowalign.model.base import Base
from lowalign.model.host import Host
from lowalign.model.start import load_stack

AT_A_TIME = 256  # prompts whose completions are written together

Prompt = str | list[dict]  # plain text, or messages


def generate(config: GenerateConfig) -> int:
    """Run the command. Returns the exit code."""
    prompts = [config.prompt] if config.prompts is None else list(_read(config.prompts))
    settings = config.base
    base = Base.load(config.model, settings.quantization, settings.revision, settings.dtype, settings.device)
    host = Host(base)
    stack = [
        name
        for i, adapter in enumerate(config.adapter)
        for name in load_stack(host, f"adapter{i}", adapter, config.allow_base_mismatch)
    ]
    chat = Chat(base.tokenizer, _template(config.adapter))
    base.eos_ids = tuple(dict.fromkeys((*base.eos_ids, chat.end_of_turn)))
    ids = [_ids(chat, prompt, config.raw) for prompt in prompts]
    with host.use(*stack), config.out.open("w") if config.out else nullcontext(sys.stdout) as out:
        for start in range(0, len(prompts), AT_A_TIME):
            part = range(start, min(start + AT_A_TIME, len(prompts)))
            found = host.generate([ids[i] for i in part], config.n, config.sampling, seeds=part)
            for i, completions in zip(part, found, strict=True):
                for c in completions:
                    text = base.tokenizer.decode(c.ids, skip_special_tokens=True)
                    line = {"prompt": prompts[i], "completion": text, "stopped": c.stopped}
                    out.write(json.dumps(line, ensure_ascii=False) + "\n")
            out.flush()
    return 0


def _read(file: Path) -> Iterator[Prompt]:
    """The `prompt` (text or messages) or `messages` of each row; answers at the end of messages are left out."""
    for row in read_rows(str(file)):
        if isinstance(row, BadRow):
            raise UserError(str(row))
        column = next((c for c in ("prompt", "messages") if c in row.data), None)
        if column is None:
            found = ", ".join(row.data) or "nothing"
            raise UserError(f'{row.where}: expected "prompt" or "messages", found {found}')
        value = row.data[column]
        if isinstance(value, str):
            yield value
            continue
        try:
            messages = read_turns(value, column)
        except UserError as error:
            raise UserError(f"{row.where}: {error}") from error
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        yield messages


def _ids(chat: Chat, prompt: Prompt, raw: bool) -> list[int]:
    if isinstance(prompt, str):
        return chat.text_ids(prompt) if raw else chat.prompt_ids([{"role": "user", "content": prompt}])
    if raw:
        raise UserError("--raw takes prompts that are text; messages need a chat template")
    return chat.prompt_ids(prompt)


def _template(adapters: tuple[str, ...]) -> str | None:
    """The chat template that was written with the last adapter, if one was."""
    for adapter in reversed(adapters):
        file = locate(adapter) / "chat_template.jinja"
        if file.exists():
            return file.read_text()
    return None
