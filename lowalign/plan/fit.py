"""`--fit`: the options of a run that fit in the memory of the device that trains, and what a prediction is checked with."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import psutil
import torch

from lowalign.config import cards, recipe
from lowalign.config.cards import GIB
from lowalign.config.training import PPOConfig, RunConfig
from lowalign.data.pack import Example
from lowalign.errors import UserError
from lowalign.log import log
from lowalign.model.base import card_memory
from lowalign.model.base.base import Base
from lowalign.model.base.device import device_of
from lowalign.plan.dry_run import DryRun
from lowalign.plan.figures import CONTEXT, Figures
from lowalign.plan.meta_base import base_tensors, load_config, meta_base
from lowalign.plan.planner import Planner, Setting
from lowalign.plan.verbs import run_phases
from lowalign.train.peak import Predict
from lowalign.train.run_folder import RECIPE_FILE

C = TypeVar("C", bound=RunConfig)
ENOUGH = 2048  # tokens of a micro-batch, below which a card is not busy: offload rather than take fewer
FITTED = ("token_budget", "checkpointing", "keep_layers")  # of --train; and --data.max-length


@dataclass(frozen=True)
class Fit:
    """What fits. changes: options of --train that it needs. longest: tokens of the longest example. token_budget: the largest.
    keep_layers: that may keep their activations with a token budget of `busy`, which is not above the planned one."""

    figures: Figures
    changes: dict[str, Any]
    longest: int
    token_budget: int
    busy: int
    keep_layers: int

    def applied(self, config: C, length: int) -> C:
        """The config with the values that fit. Activations that are kept save more time than larger micro-batches."""
        train = replace(config.train, token_budget=self.busy, keep_layers=self.keep_layers, **self.changes)
        return replace(config, train=train, data=replace(config.data, max_length=min(length, self.longest)))


def search(planner: Planner, setting: Setting, vram: int) -> Fit | Figures:
    """What fits in `vram` bytes, with checkpoint inputs in CPU memory where the setting does not fit otherwise. -> the
    figures of the setting where nothing fits."""
    figures, changes = planner.figures(setting), {}
    if figures.needed > vram and setting.token_budget > max(setting.length, ENOUGH):
        figures = planner.figures(Setting(setting.length, max(setting.length, ENOUGH)))
    offloads = planner.trains and planner.device != "cpu" and figures.checkpointing == "on"
    if figures.needed > vram and offloads:
        changes = {"checkpointing": "offload"}
        figures = planner.figures(Setting(setting.length, figures.token_budget), **changes)
    longest = planner.longest(vram, **changes)
    if longest is None:
        return figures
    length = min(setting.length, longest)
    token_budget = planner.token_budget(vram, length, **changes) or length
    busy = max(length, min(setting.token_budget, token_budget))
    keeps = planner.trains and figures.checkpointing == "on"
    layers = planner.keep_layers(vram, Setting(length, busy), **changes) if keeps else 0
    return Fit(figures, changes, longest, token_budget, busy, layers or 0)


def fitted(config: C, base: Base | None = None) -> tuple[C, Predict | None]:
    """With --fit: the config with the values that fit, and how much a micro-batch is predicted to take at most. Without:
    the config, None. A run that is resumed keeps the values it has.

    base: one that is loaded already. Raises UserError when nothing fits.
    """
    if config.fit is None:
        return config, None
    device = torch.device(device_of(config.base.device))
    architecture = load_config(str(base.folder)) if base else load_config(config.model, config.base.revision)
    predict = prediction(architecture, config, device.type)
    if config.resume and (config.out / RECIPE_FILE).exists():
        return _as_before(config), predict
    vram = _memory(config, device, base)
    planner = Planner(architecture, config, device.type)
    length = min(config.data.max_length, planner.positions)
    fit = search(planner, Setting(length, config.train.token_budget), vram)
    if isinstance(fit, Figures):
        raise UserError(
            f"--fit: no example fits in {vram / GIB:.1f} GiB; the shortest needs more than {fit.left_free / GIB:.1f} GiB beside the "
            f"base of {fit.highest.peak.components['base'] / GIB:.1f}: take a smaller --model or --adapter.r"
        )
    new = fit.applied(config, length)
    changed = [
        f"{flag} {after}"
        for flag, before, after in (
            ("--data.max-length", config.data.max_length, new.data.max_length),
            *(
                (f"--train.{key.replace('_', '-')}", getattr(config.train, key), getattr(new.train, key))
                for key in FITTED
            ),
        )
        if before != after
    ]
    log(f"fits in {vram / GIB:.1f} GiB of {device.type} memory: {', '.join(changed) or 'the options as they are'}")
    return new, prediction(architecture, new, device.type)


def _as_before(config: C) -> C:
    """The config with the values that the run in OUT was fitted with."""
    earlier = recipe.parse(type(config), [], config.out / RECIPE_FILE)
    train = replace(config.train, **{key: getattr(earlier.train, key) for key in FITTED})
    return replace(config, train=train, data=replace(config.data, max_length=earlier.data.max_length))


def _memory(config: RunConfig, device: torch.device, base: Base | None) -> int:
    """Bytes that the run may need, the context and what is left free included: as --fit says, or what is free."""
    if config.fit != "auto":
        return cards.memory(config.fit, "--fit")
    if device.type == "cuda":
        left = int(config.base.leave_free * GIB)
        return card_memory.usable(device, config.base.leave_free) + left + CONTEXT  # the context exists by now
    held = sum(t.nbytes for t in base_tensors(base.model)) if base else 0
    return psutil.virtual_memory().available + held


def prediction(architecture: Any, config: RunConfig, device: str) -> Predict:
    """Bytes of tensors at most with this micro-batch, by a dry run of the step (ppo: of the round) with it."""

    def predict(micro_batch: Sequence[Example]) -> int:
        planned, length = config, max(len(e.prompt) + max(map(len, e.completions)) for e in micro_batch)
        tokens = sum(e.length for e in micro_batch)
        run = DryRun(meta_base(architecture, config.base), config.train, device)
        if isinstance(config, PPOConfig):
            new = max(len(c) for e in micro_batch for c in e.completions)
            length = max(len(e.prompt) for e in micro_batch)
            planned = replace(config, sampling=replace(config.sampling, max_new_tokens=new, min_new_tokens=0))
            run_phases(run, planned, length, tokens)
        else:
            run_phases(run, planned, length, tokens, micro_batch)
        return max(phase.peak.total for phase in run.phases)

    return predict
