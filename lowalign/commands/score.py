"""`lowalign score`: the scores that a reward run gives to completions; one line of JSON for each."""

from functools import partial
from itertools import groupby
from typing import Any

import torch

from lowalign.config.evaluation import ScoreConfig
from lowalign.data.any_rows import load_any
from lowalign.data.chat import Chat
from lowalign.data.pack import Example
from lowalign.log import log
from lowalign.methods.reward_model import reward_metrics, scored
from lowalign.model.adapters.files import adapter_template
from lowalign.model.base.base import Base
from lowalign.model.base.hub import load_tokenizer
from lowalign.model.host import Host
from lowalign.model.policy import Stack
from lowalign.model.positions import usable_positions
from lowalign.rewards.reward_run import check_reward_runs, load_reward_run, score_examples
from lowalign.train.output_file import announce_new_file, output_of, stoppable
from lowalign.train.run_folder import input_hashes

EXAMPLES_PER_BLOCK = 64  # Examples that are scored and written together


def score(config: ScoreConfig) -> int:
    """Run the command. Returns the exit code."""
    return stoppable(_run, config)


def _run(config: ScoreConfig) -> None:
    announce_new_file(config)
    tokenizer = load_tokenizer(config.model, config.base.revision)
    chat = Chat(tokenizer, adapter_template((config.adapter,)))
    chat.positions = usable_positions(config.model, config.base.revision, (config.adapter,))
    files = [load_any(file, chat, config.data) for file in config.data.files]
    formats = {name for data in files for name in data.report["prompt_formats"]}
    check_reward_runs([config.adapter], formats)
    examples = [scored(example) for data in files for example in data.examples]
    inputs = {"data": [[e.prompt, e.completions] for e in examples]} | input_hashes((), (config.adapter,))
    # A block has the numbers of its lines' Examples: one line for each completion.
    numbers = [i for i, example in enumerate(examples) for _ in example.completions]
    blocks = [list(block) for _, block in groupby(numbers, key=lambda i: i // EXAMPLES_PER_BLOCK)]
    with output_of(config, inputs) as out:
        if blocks := out.resume(blocks):
            host = Host(Base.load(config.model, **vars(config.base)))
            stack = load_reward_run(host, "reward", config.adapter, config.allow_base_mismatch)
            out.fill(blocks, partial(_scores, config, host, stack, examples), "completion")
    values = iter([line["score"] for line in out.lines])
    metrics = reward_metrics([torch.tensor([next(values) for _ in e.completions]) for e in examples], examples)
    log(f"{metrics['completions']:,} completions, score {metrics['mean']:.4f} on average, spread {metrics['std']:.4f}")
    if "pairs" in metrics:
        accuracy = f"{metrics['accuracy']:.1%} of {metrics['pairs']:,} pairs"
        log(f"{accuracy} have the higher score on the better completion")


def _scores(
    config: ScoreConfig, host: Host, stack: Stack, examples: list[Example], block: list[int]
) -> list[dict[str, Any]]:
    """The lines of a block."""
    part = [examples[i] for i in dict.fromkeys(block)]
    decode = host.base.tokenizer.decode
    return [
        {
            "source": example.source,
            "completion": decode(completion, skip_special_tokens=True),
            "score": value,
            **_annotation(example, i),
        }
        for example, values in zip(part, score_examples(host, stack, part, config.token_budget), strict=True)
        for i, (completion, value) in enumerate(zip(example.completions, values, strict=True))
    ]


def _annotation(example: Example, i: int) -> dict:
    """The rank or label that the row gives to its completion i."""
    if example.rank is not None:
        return {"rank": example.rank[i]}
    return {} if example.label is None else {"label": example.label}
