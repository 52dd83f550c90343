"""`lowalign reward`: train a reward model, and measure its scores on held-out rankings."""

from dataclasses import replace
from functools import partial
from typing import Any

import torch

from lowalign.config.training import RewardConfig
from lowalign.data.dataset import Dataset
from lowalign.data.pack import Example
from lowalign.data.preferences import load_preferences, refuse_labels
from lowalign.log import log
from lowalign.methods.reward_model import RewardModel, reward_metrics, scored
from lowalign.model.base.base import Base
from lowalign.model.host import Host
from lowalign.model.policy import Stack
from lowalign.rewards.reward_run import score_examples
from lowalign.train.run import Job, load_rows, run

EVALUATED_ROWS = 1024  # most rankings that a finished reward model is evaluated on


def reward(config: RewardConfig, base: Base | None = None) -> int:
    """Run `lowalign reward`; `base` is one that is loaded already. Returns the exit code."""

    def load(*args: Any, **options: Any) -> Dataset:
        data = load_preferences(*args, **options)
        refuse_labels(data.examples, "a reward model needs comparisons; use them with `lowalign dpo --dpo.loss kto`")
        return replace(data, examples=[scored(e) for e in data.examples])

    def start(host: Host, rows: list[Example], heldout: list[Example], policy: Stack, initial: Stack) -> RewardModel:
        if not host.has_scalar_head(policy[-1]):
            host.add_scalar_head(policy[-1])
        ties = config.data.ties == "keep"
        return RewardModel(host, rows, policy, config.reward, config.train, ties)

    return run(config, Job("reward", partial(load_rows, config, load), start, finish=_evaluate), base)


def _evaluate(host: Host, policy: Stack, examples: list[Example], config: RewardConfig) -> dict[str, Any]:
    """The entry `reward` of the adapter's lowalign.json: metrics of the scores, on held-out rankings where there are some."""
    examples = examples[:EVALUATED_ROWS]
    scores = score_examples(host, policy, examples, config.train.token_budget)
    metrics = reward_metrics([torch.tensor(values) for values in scores], examples)
    log("scores: " + "  ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
    return {"reward": metrics}
