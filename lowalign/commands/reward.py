"""`lowalign reward`: train a reward model, and measure its scores on held-out rankings."""

from collections.abc import Sequence
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
from lowalign.plan.fit import fitted
from lowalign.rewards.reward_run import HELDOUT, TRAINING, score_examples
from lowalign.train.engine import OnStep
from lowalign.train.run import Job, load_rows, run

EVALUATED_ROWS = 1024  # most rankings that a finished reward model is evaluated on


def reward(config: RewardConfig, base: Base | None = None, on_step: OnStep | None = None) -> int:
    """Run `lowalign reward`; `base` is one that is loaded already, `on_step` is called after each step. Returns the exit
    code."""
    config, predict = fitted(config, base)

    def load(*args: Any, **options: Any) -> Dataset:
        data = load_preferences(*args, **options)
        refuse_labels(data.examples, "a reward model needs comparisons; use them with `lowalign dpo --dpo.loss kto`")
        return replace(data, examples=data.examples.map(scored))

    def start(
        host: Host, rows: Sequence[Example], heldout: Sequence[Example], policy: Stack, initial: Stack
    ) -> RewardModel:
        if not host.has_scalar_head(policy[-1]):
            host.add_scalar_head(policy[-1])
        ties = config.data.ties == "keep"
        return RewardModel(host, rows, policy, config.reward, config.train, ties)

    return run(config, Job("reward", partial(load_rows, config, load), start, finish=_evaluate), base, on_step, predict)


def _evaluate(
    host: Host, policy: Stack, rows: Sequence[Example], heldout: Sequence[Example], config: RewardConfig
) -> dict[str, Any]:
    """The entry `reward` of the adapter's lowalign.json: metrics of the scores, and whether they were measured on held-out
    rankings or, where there are none, on those it was trained on."""
    examples = (heldout or rows)[:EVALUATED_ROWS]
    scores = score_examples(host, policy, examples, config.train.token_budget)
    metrics = reward_metrics([torch.tensor(values) for values in scores], examples)
    figures = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
    if heldout:
        log(f"scores of held-out rows: {figures}")
    else:
        log(f"scores of the rows it was trained on, which do not show how it scores others: {figures}")
        log("hold rows out to measure it: --data.eval-rows N, or --data.eval FILE")
    return {"reward": metrics | {"measured_on": HELDOUT if heldout else TRAINING}}
