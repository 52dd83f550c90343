"""The one loop. It knows no method and no kind of adapter; methods know no engine.

Left out on purpose: several processes, callbacks, and a state of random generators (they are seeded from (seed, step)).
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from signal import Signals
from typing import Any

import torch
from torch import Tensor

from lowalign import __version__
from lowalign.config.sections import TrainConfig
from lowalign.data.pack import Example
from lowalign.errors import UserError
from lowalign.log import log
from lowalign.train import checkpoint
from lowalign.train.accumulate import MicroBatches
from lowalign.train.guards import assert_all_reached, assert_base_unchanged, refuse_not_finite
from lowalign.train.lock import lock_folder
from lowalign.train.method import Method
from lowalign.train.metrics import Track
from lowalign.train.optim import load_state, make_optimizer, read_state, schedule, state_bytes
from lowalign.train.signals import Interrupted, StopSignals


@dataclass(frozen=True)
class Result:
    """How a run ended.

    step: optimizer steps done. metrics: the last step's and the last evaluation's (eval/…). best_step: of the weights in
    checkpoints/best, None without held-out rows. stopped_by: the signal after which it saved and left.
    """

    step: int
    metrics: dict[str, float]
    best_step: int | None
    stopped_by: Signals | None


def train(
    host: Any,
    method: Method,
    config: TrainConfig,
    out: Path,
    *,
    heldout: Sequence[Example] = (),
    resume: bool = False,
) -> Result:
    """Train the method's adapters for `config.steps` optimizer steps; the weights end up in the host.

    Writes out/metrics.jsonl and out/checkpoints/. With `resume` it goes on from the newest valid checkpoint and reaches
    the very bits of a run that was not interrupted. Raises UserError for all that the user can mend: a loss that is not
    finite, memory or disk that do not suffice, a folder in use or already trained in.
    """
    if config.steps is None:
        raise ValueError("config.steps must be set; epochs are turned into steps by the caller")
    with lock_folder(out), StopSignals() as stop:
        run = _Run(host, method, config, out, heldout, stop)
        found = _starting_point(out, resume)
        checkpoint.check_space(out, run.checkpoint_bytes(), config.keep)
        if found is not None:
            run.restore(found)
        redo_eval = run.evaluated != run.step
        with Track(out, config.track, config.steps, None if found is None else run.step, redo_eval) as track:
            host.training(config.checkpointing)
            host.check = stop.check
            try:
                return run.loop(track)
            finally:
                host.check = lambda: None
                host.training(None)


def _starting_point(out: Path, resume: bool) -> checkpoint.Checkpoint | None:
    """The checkpoint to go on from; None: from the beginning, in a folder without checkpoints."""
    found = checkpoint.newest_valid(out) if resume else None
    if found is not None:
        log(f"resuming from {found.folder}")
    elif checkpoint.steps(out):
        why = "no checkpoint is whole" if resume else "there are checkpoints of an earlier run: go on with --resume"
        raise UserError(f"{out}: {why}; or choose another --out")
    elif resume:
        log(f"{out} has no checkpoint to resume: starting from the beginning")
    checkpoint.clean(out, best=found is None)
    return found


class _Run:
    """The state of a run between two optimizer steps, and what moves it on."""

    def __init__(
        self, host: Any, method: Method, config: TrainConfig, out: Path, heldout: Sequence[Example], stop: StopSignals
    ) -> None:
        self.host, self.method, self.config = host, method, config
        self.out, self.heldout, self.stop = out, heldout, stop
        host.train_only(*method.lr_multipliers)
        self.flats = {name: host.flat(name) for name in method.lr_multipliers}
        self.optimizer = make_optimizer({name: flat.master for name, flat in self.flats.items()}, config)
        self.base_checksum = host.base.checksum()
        self.step = 0  # optimizer steps done
        self.micro_batches = MicroBatches(method, self.flats, config.token_budget, stop)
        self.saved: int | None = None  # steps at which these were last done
        self.evaluated: int | None = None
        self.best: dict[str, float] | None = None  # {"step", "loss"}
        self.metrics: dict[str, float] = {}
        self.proved = False

    # -- the loop -----------------------------------------------------------------------------------------------------

    def loop(self, track: Track) -> Result:
        config, stopped_by = self.config, None
        tokens, since = 0, time.perf_counter()
        try:
            while True:
                paused = time.perf_counter()
                if self._evaluation_due():
                    self.evaluate(track)
                if self._save_due():
                    self.save()
                since += time.perf_counter() - paused
                if self.step >= config.steps:
                    break
                metrics, seen = self.optimizer_step()
                self.step += 1
                tokens += seen
                metrics["tokens_per_second"] = tokens / (time.perf_counter() - since)
                log_due = self.step % config.log_every == 0 or self.step == config.steps
                self.metrics |= metrics
                track.step(self.step, metrics, log_due)
                if log_due:
                    tokens, since = 0, time.perf_counter()
        except Interrupted:
            stopped_by = self.stop.received
            if self.saved != self.step:
                self.save()
        assert_base_unchanged(self.base_checksum, self.host.base.checksum())
        return Result(self.step, self.metrics, self.best and int(self.best["step"]), stopped_by)

    def _evaluation_due(self) -> bool:
        if not self.heldout or self.evaluated == self.step:
            return False
        every = self.config.eval_every
        return self.step in (0, self.config.steps) or (every > 0 and self.step % every == 0)

    def _save_due(self) -> bool:
        if self.saved == self.step:
            return False
        every = self.config.save_every
        return self.step == self.config.steps or (every > 0 and self.step > 0 and self.step % every == 0)

    def optimizer_step(self) -> tuple[dict[str, float], int]:
        """One step on all trained adapters. Returns its metrics and the number of tokens it saw."""
        self.stop.check()
        seed = (self.config.seed * 1_000_003 + self.step) % 2**63
        torch.manual_seed(seed)
        examples = self._batch()
        sums = self.micro_batches.gradients(examples, seed)
        norms = [torch.linalg.vector_norm(flat.master.grad) for flat in self.flats.values()]
        metrics = _numbers(sums | {"grad_norm": torch.linalg.vector_norm(torch.stack(norms))})
        refuse_not_finite(self.step + 1, metrics, examples, self.out)
        if not self.proved:
            assert_all_reached(self.flats)
        clip = self.config.clip
        if 0 < clip < metrics["grad_norm"]:
            for flat in self.flats.values():
                flat.master.grad.mul_(clip / metrics["grad_norm"])
        factor = schedule(self.config, self.step, self.config.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * self.method.lr_multipliers[group["name"]] * factor
        self.optimizer.step()
        for flat in self.flats.values():
            flat.publish()
        if not self.proved:
            assert_base_unchanged(self.base_checksum, self.host.base.checksum())
            self.proved = True
        return metrics | {"lr": self.config.learning_rate * factor}, sum(e.length for e in examples)

    def _batch(self) -> list[Example]:
        """The examples of the next step. Where the method cannot give them, what was done so far is saved."""
        self.method.token_budget = self.micro_batches.budget
        try:
            return self.method.batch(self.step)
        except UserError:
            if self.step and self.saved != self.step:
                self.save()
            raise

    def evaluate(self, track: Track) -> None:
        """Loss and metrics of the held-out rows; the adapters are kept when they are the best so far."""
        self.host.training(None)
        try:
            sums = self.micro_batches.metrics(self.heldout)
        finally:
            self.host.training(self.config.checkpointing)
        metrics = {f"eval/{name}": value for name, value in _numbers(sums).items()}
        loss = metrics["eval/loss"]
        if math.isfinite(loss) and (self.best is None or loss < self.best["loss"]):
            checkpoint.save_best(self.out, self.step, self._weights())
            self.best = {"step": self.step, "loss": loss}
        self.metrics |= metrics
        track.evaluation(self.step, metrics)
        self.evaluated = self.step

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint of the last finished step."""
        tensors, numbers = read_state(self.optimizer)
        method = self.method.state()
        held = {k: v.detach().to("cpu", copy=True).contiguous() for k, v in method.items() if isinstance(v, Tensor)}
        state = {
            "token_budget": {"asked": self.config.token_budget, "now": self.micro_batches.budget},
            "optimizer": numbers,
            "method": {k: v for k, v in method.items() if k not in held},
            "evaluated": self.evaluated,
            "best": self.best,
            "metrics": {k: v for k, v in self.metrics.items() if math.isfinite(v)},
            "versions": {"lowalign": __version__, "torch": version("torch"), "bitsandbytes": version("bitsandbytes")},
        }
        parts = {"weights": self._weights(), "optimizer": tensors, "method": held}
        checkpoint.save(self.out, self.step, parts, state, self.config.keep)
        self.saved = self.step

    def restore(self, found: checkpoint.Checkpoint) -> None:
        """Take up a checkpoint. Raises UserError when it is of other adapters or another optimizer."""
        weights: dict[str, dict[str, Tensor]] = {}
        for full, tensor in found.read("weights").items():
            adapter, _, name = full.partition("/")
            weights.setdefault(adapter, {})[name] = tensor
        if weights.keys() != self.flats.keys():
            raise UserError(f"{found.folder} is of the adapters {', '.join(weights)}, not of {', '.join(self.flats)}")
        for adapter, tensors in weights.items():
            self.flats[adapter].load(tensors)
        state = found.state
        load_state(self.optimizer, found.read("optimizer"), state["optimizer"])
        self.method.load_state(found.read("method") | state["method"])
        self.step = self.saved = found.step
        if state["token_budget"]["asked"] == self.config.token_budget:
            self.micro_batches.budget = state["token_budget"]["now"]
        self.evaluated, self.best, self.metrics = state["evaluated"], state["best"], state["metrics"]

    def checkpoint_bytes(self) -> int:
        """About what one checkpoint takes."""
        numel = sum(flat.master.numel() for flat in self.flats.values())
        return 4 * numel + state_bytes(self.config, numel)

    def _weights(self) -> dict[str, Tensor]:
        return {
            f"{adapter}/{name}": tensor.to("cpu", copy=True)
            for adapter, flat in self.flats.items()
            for name, tensor in flat.tensors().items()
        }


def _numbers(sums: dict[str, Tensor]) -> dict[str, float]:
    """All of them to the CPU at once: the only place where a step waits for the device."""
    return dict(zip(sums, torch.stack([value.double() for value in sums.values()]).tolist(), strict=True))
