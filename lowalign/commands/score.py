"""`lowalign score`: the scores that a reward run gives to completions; one line of JSON for each."""

import sys
from contextlib import nullcontext

import torch

from lowalign.config.commands import ScoreConfig
from lowalign.config.sections import DataConfig, PreferenceConfig
from lowalign.data.chat import Chat
from lowalign.data.dataset import Dataset, load_examples
from lowalign.data.pack import Example
from lowalign.data.preferences import load_preferences
from lowalign.data.rows.preference_rows import PREFERENCE_ROWS
from lowalign.data.rows.read import Row, read_rows
from lowalign.durable import json_line
from lowalign.log import log
from lowalign.methods.reward_model import reward_metrics, scored
from lowalign.model.adapters.files import adapter_template
from lowalign.model.base.base import Base
from lowalign.model.base.hub import load_tokenizer
from lowalign.model.host import Host
from lowalign.rewards.reward_run import check_prompt_formats, load_reward_run, score_examples

AT_A_TIME = 256  # Examples whose lines are written together


def score(config: ScoreConfig) -> int:
    """Run the command. Returns the exit code."""
    tokenizer = load_tokenizer(config.model, config.base.revision)
    chat = Chat(tokenizer, adapter_template((config.adapter,)))
    files = [_load(file, chat, config) for file in config.data]
    formats = {name for data in files for name in data.report["prompt_formats"]}
    check_prompt_formats([config.adapter], formats, "--prompt-format")
    examples = [scored(example) for data in files for example in data.examples]
    base = Base.load(config.model, **vars(config.base))
    host = Host(base)
    stack = load_reward_run(host, "reward", config.adapter, config.allow_base_mismatch)
    scores: list[list[float]] = []
    with config.out.open("w") if config.out else nullcontext(sys.stdout) as out:
        for start in range(0, len(examples), AT_A_TIME):
            part = examples[start : start + AT_A_TIME]
            part_scores = score_examples(host, stack, part, config.token_budget)
            for example, values in zip(part, part_scores, strict=True):
                for i, value in enumerate(values):
                    text = tokenizer.decode(example.completions[i], skip_special_tokens=True)
                    line = {"source": example.source, "completion": text, "score": value, **_annotation(example, i)}
                    out.write(json_line(line))
            out.flush()
            scores += part_scores
    metrics = reward_metrics([torch.tensor(values) for values in scores], examples)
    log(f"{metrics['completions']:,} completions, score {metrics['mean']:.4f} on average, spread {metrics['std']:.4f}")
    if "pairs" in metrics:
        accuracy = f"{metrics['accuracy']:.1%} of {metrics['pairs']:,} pairs"
        log(f"{accuracy} have the higher score on the better completion")
    return 0


def _load(file: str, chat: Chat, config: ScoreConfig) -> Dataset:
    """The rows of a file of preferences or of sft."""
    rows = (row.data for row in read_rows(file, config.limit) if isinstance(row, Row))
    options = {"max_length": config.max_length, "limit": config.limit, "on_error": config.on_error, "cache": False}
    options["prompt_format"] = config.prompt_format
    if PREFERENCE_ROWS.common(rows) is not None:
        options |= {"ties": "keep"}
        return load_preferences([file], chat, PreferenceConfig(**options))
    return load_examples([file], chat, DataConfig(**options))


def _annotation(example: Example, i: int) -> dict:
    """The rank or label that the row gives to its completion i."""
    if example.rank is not None:
        return {"rank": example.rank[i]}
    return {} if example.label is None else {"label": example.label}
