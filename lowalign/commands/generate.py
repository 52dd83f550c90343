"""`lowalign generate`: sample completions of prompts; one line of JSON for each."""

from functools import partial
from typing import Any

from lowalign.config.commands import GenerateConfig
from lowalign.data.chat import Chat
from lowalign.data.prompts import PromptRow, prompt_ids, read_prompts
from lowalign.model.adapters.files import adapter_template, refuse_reward_runs
from lowalign.model.base.base import Base
from lowalign.model.base.hub import load_tokenizer
from lowalign.model.host import Host
from lowalign.model.policy import Stack, load_policy
from lowalign.train.output_file import output_of, stoppable
from lowalign.train.run_folder import input_hashes

PROMPTS_PER_BLOCK = 64  # prompts whose completions are sampled and written together


def generate(config: GenerateConfig) -> int:
    """Run the command. Returns the exit code."""
    return stoppable(_run, config)


def _run(config: GenerateConfig) -> None:
    if config.prompts is None:
        rows = [PromptRow(config.prompt, "--prompt")]
    else:
        rows = list(read_prompts([str(config.prompts)]))
    # Errors in prompts and adapters are found before a large model is loaded.
    refuse_reward_runs(config.adapter)
    chat = Chat(load_tokenizer(config.model, config.base.revision), adapter_template(config.adapter))
    ids = [prompt_ids(chat, row, config.raw) for row in rows]
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
