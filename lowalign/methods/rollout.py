"""Rollouts: sampled completions with their rewards, log-probs, values and advantages."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lowalign.data.pack import Example

SIGNALS = ("old", "reference_logps", "values", "advantages", "returns")


@dataclass
class Rollout(Example):
    """A prompt with its sampled completions. SIGNALS have a (length,) tensor for each completion.

    old, reference_logps: log-probs under the policy that sampled, and under the reference. values: V(s_t), before each
    token. rewards: one per completion. stopped: whether the completion ended with an end token, not at the length limit.
    sampler_logps: the sampler's own log-probs, only until the metrics of the round are computed; not in checkpoints.
    """

    rewards: list[float] = field(default_factory=list)
    stopped: list[bool] = field(default_factory=list)
    sampler_logps: list[Tensor] = field(default_factory=list)
    old: list[Tensor] = field(default_factory=list)
    reference_logps: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    advantages: list[Tensor] = field(default_factory=list)
    returns: list[Tensor] = field(default_factory=list)


def supervised_values(example: Example, per_completion: Sequence[Tensor]) -> Tensor:
    """The values of one Example's supervised tokens, concatenated: (N,)."""
    masks = [torch.tensor(example.mask(i), device=values.device) for i, values in enumerate(per_completion)]
    return torch.cat([values[mask] for values, mask in zip(per_completion, masks, strict=True)])


def to_tensors(rollouts: Sequence[Rollout]) -> dict[str, Any]:
    """Rollouts as tensors and plain values, for a checkpoint."""
    ids = [t for r in rollouts for part in (r.prompt, *r.completions) for t in part]
    sizes = [n for r in rollouts for n in (len(r.completions), len(r.prompt), *map(len, r.completions))]
    tensors: dict[str, Any] = {
        "ids": torch.tensor(ids, dtype=torch.int32),
        "sizes": torch.tensor(sizes, dtype=torch.int32),
        "masks": torch.tensor([m for r in rollouts for i in range(len(r.completions)) for m in r.mask(i)]),
        "rewards": torch.tensor([x for r in rollouts for x in r.rewards], dtype=torch.float64),
        "stopped": torch.tensor([x for r in rollouts for x in r.stopped]),
    }
    for name in SIGNALS:
        if all(getattr(r, name) for r in rollouts):
            tensors[name] = torch.cat([t.cpu() for r in rollouts for t in getattr(r, name)])
    return tensors


def from_tensors(tensors: dict[str, Any], device: torch.device) -> list[Rollout]:
    """The inverse of to_tensors."""
    ids, masks = tensors["ids"].tolist(), tensors["masks"].tolist()
    rewards, stopped = iter(tensors["rewards"].tolist()), iter(tensors["stopped"].tolist())
    sizes = iter(tensors["sizes"].tolist())
    at = token = 0
    rollouts = []
    for n in sizes:
        prompt, lengths = next(sizes), [next(sizes) for _ in range(n)]
        own = [ids[at : at + prompt]]
        at += prompt
        mask, spans = [], []
        for length in lengths:
            own.append(ids[at : at + length])
            mask.append(masks[token : token + length])
            spans.append(slice(token, token + length))
            at, token = at + length, token + length
        signals = {name: [tensors[name][s].to(device) for s in spans] for name in SIGNALS if name in tensors}
        outcome = {"rewards": [next(rewards) for _ in lengths], "stopped": [next(stopped) for _ in lengths]}
        rollouts.append(Rollout(own[0], own[1:], mask, **outcome, **signals))
    return rollouts
