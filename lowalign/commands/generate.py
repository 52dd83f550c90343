"""`lowalign generate`: sample completions of prompts; one line of JSON for each."""

from functools import partial
from typing import Any

from lowalign.config.commands import GenerateConfig
from lowalign.data.chat import Chat
from lowalign.data.prompt_format import formatted
from lowalign.data.prompts import PromptRow, prompt_ids, read_prompts
from lowalign.errors import UserError
from lowalign.log import log
from lowalign.model.adapters.files import adapter_template, common_format, refuse_reward_runs
from lowalign.model.base.base import Base
from lowalign.model.base.hub import load_tokenizer
from lowalign.model.host import Host
from lowalign.model.policy import Stack, load_policy
from lowalign.model.positions import usable_positions
from lowalign.train.output_file import announce_new_file, output_of, stoppable
from lowalign.train.run_folder import input_hashes

NAMED = 5  # prompts that are too long
PROMPTS_PER_BLOCK = 64  # prompts whose completions are sampled and written together


def generate(config: GenerateConfig) -> int:
    """Run the command. Returns the exit code."""
    return stoppable(_run, config)


def _run(config: GenerateConfig) -> None:
    announce_new_file(config)
    data = config.data
    prompt_format = data.prompt_format or common_format(config.adapter)
    if config.prompt is not None:
        rows = [PromptRow(formatted(config.prompt, prompt_format), "--prompt")]
    else:
        rows = list(read_prompts(data.files, prompt_format))[: data.limit]
    if data.prompt_format is None and any(isinstance(row.prompt, str) for row in rows):
        log(
            "prompts that are strings are plain text, without the chat template; --data.prompt-format chat makes them turns"
        )
    # Errors in prompts and adapters are found before a large model is loaded.
    refuse_reward_runs(config.adapter)
    chat = Chat(load_tokenizer(config.model, config.base.revision), adapter_template(config.adapter))
    chat.positions = usable_positions(config.model, config.base.revision, config.adapter)
    rows, ids = _fitting(rows, [prompt_ids(chat, row) for row in rows], chat.positions, data.on_error)
    inputs = {"prompts": [row.prompt for row in rows]} | input_hashes((), config.adapter)
    starts = range(0, len(rows), PROMPTS_PER_BLOCK)
    # A block has the numbers of its lines: n for each prompt.
    blocks = [range(start * config.n, min(start + PROMPTS_PER_BLOCK, len(rows)) * config.n) for start in starts]
    with output_of(config, inputs) as out:
        if blocks := out.resume(blocks):
            base = Base.load(config.model, **vars(config.base))
            base.end_at(chat.end_of_turn)
            host = Host(base)
            stack = load_policy(host, config.adapter, config.allow_base_mismatch)
            out.fill(blocks, partial(_completions, config, host, stack, rows, ids), "completion")


def _fitting(
    rows: list[PromptRow], ids: list[list[int]], positions: int | None, on_error: str
) -> tuple[list[PromptRow], list[list[int]]]:
    """The prompts that leave room for a completion, with their ids; the others are counted and named.

    Raises UserError for these where on_error is "stop", and when no prompt is left.
    """
    long = [] if positions is None else [k for k, prompt in enumerate(ids) if len(prompt) >= positions]
    if not long:
        return rows, ids
    named = ", ".join(f"{rows[k].where} ({len(ids[k]):,} tokens)" for k in long[:NAMED])
    text = f"{len(long):,} of {len(rows):,} prompts leave no room for a completion in {positions:,} positions: {named}"
    text += f" and {len(long) - NAMED:,} more" if len(long) > NAMED else ""
    if on_error == "stop" or len(long) == len(rows):
        raise UserError(f"{text}; shorten them" + ("" if len(long) == len(rows) else ", or --data.on-error skip"))
    log(f"{text}; they are left out")
    kept = sorted(set(range(len(rows))) - set(long))
    return [rows[k] for k in kept], [ids[k] for k in kept]


def _completions(
    config: GenerateConfig, host: Host, stack: Stack, rows: list[PromptRow], ids: list[list[int]], block: range
) -> list[dict[str, Any]]:
    """The lines of a block. The numbers of its prompts are their sampling seeds too."""
    prompts = range(block.start // config.n, block.stop // config.n)
    with host.use(*stack):
        completions = host.generate([ids[i] for i in prompts], config.n, config.sampling, seeds=prompts)
    decode = host.base.tokenizer.decode
    return [
        {
            "prompt": rows[i].prompt,
            "completion": decode(c.ids, skip_special_tokens=True),
            "stopped": c.stopped,
        }
        for i, group in zip(prompts, completions, strict=True)
        for c in group
    ]
