"""The training loop of every method. It knows a method and a host only by the protocols of lowalign.train.method.

Left out on purpose: saved random states (torch is seeded from (seed, step)).
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from signal import Signals
from typing import Any

import torch
from torch import Tensor

from lowalign import __version__, processes
from lowalign.config.sections import TrainConfig
from lowalign.data.pack import Example
from lowalign.errors import UserError
from lowalign.log import log
from lowalign.train import checkpoint
from lowalign.train.accumulate import MicroBatches
from lowalign.train.guards import assert_all_have_gradients, assert_base_unchanged, refuse_not_finite
from lowalign.train.lock import lock_folder
from lowalign.train.method import Method, MixingMethod, SamplingMethod, TrainableHost
from lowalign.train.metrics import MetricsLog, metrics_log
from lowalign.train.optim import free_paged_state, load_state, make_optimizer, read_state, schedule, state_bytes
from lowalign.train.peak import PeakCheck, Predict
from lowalign.train.signals import Interrupted, StopSignals
from lowalign.train.usage import Usage

OnStep = Callable[[int, dict[str, float]], bool | None]


@dataclass(frozen=True)
class Result:
    """How a run ended.

    step: optimizer steps done. metrics: of the last step and the last evaluation (eval/…). best_step: step of the weights
    in checkpoints/best, None without held-out rows. stopped_by: the signal that stopped the run; None: it is complete.
    """

    step: int
    metrics: dict[str, float]
    best_step: int | None
    stopped_by: Signals | None


def train(
    host: TrainableHost,
    method: Method,
    config: TrainConfig,
    out: Path,
    *,
    heldout: Sequence[Any] = (),
    resume: bool = False,
    on_step: OnStep | None = None,
    options: Mapping[str, Any] | None = None,
    predict: Predict | None = None,
) -> Result:
    """Train the method's adapters for `config.steps` optimizer steps; the host then holds the trained weights.

    heldout: Examples; prompts for a SamplingMethod. on_step: called after each step with its number, counted from 1, and its
    metrics (those of the last evaluation as eval/…). Where it returns False the run ends with this step; where it raises,
    a checkpoint is saved first. options: of the whole run, for --track. predict: a prediction of
    the peak in bytes with a micro-batch, which is compared with the measured one.

    Writes out/metrics.jsonl and out/checkpoints/. With `resume` it continues from the newest valid checkpoint; the result
    is bit-identical to an uninterrupted run. Raises UserError for a loss that is not finite, too little memory or disk
    space, and a folder that is in use or holds checkpoints of an earlier run.
    """
    if config.steps is None:
        raise ValueError("config.steps must be set; the caller converts epochs to steps")
    with processes.joined(), lock_folder(out), StopSignals() as stop:
        run = _Run(host, method, config, out, heldout, stop, predict)
        start = checkpoint.starting_point(out, resume)
        if processes.is_main():
            checkpoint.check_space(out, run.checkpoint_bytes(), config.keep)
        if start is not None:
            run.restore(start)
        redo_eval = run.evaluated != run.step
        done = None if start is None else run.step
        with metrics_log(config, out, options or {}, done, redo_eval) as metrics:
            run.train_mode()
            host.check = stop.check
            try:
                return run.loop(metrics, on_step)
            finally:
                host.check = lambda: None
                host.training(None)
                free_paged_state(run.optimizer)


@dataclass
class _Run:
    """The state of a run between two optimizer steps, and the steps."""

    host: TrainableHost
    method: Method
    config: TrainConfig
    out: Path
    heldout: Sequence[Any]
    stop: StopSignals
    predict: Predict | None

    def __post_init__(self) -> None:
        self.host.train_only(*self.method.lr_multipliers)
        self.flats = {name: self.host.flat(name) for name in self.method.lr_multipliers}
        self.optimizer = make_optimizer({name: flat.master for name, flat in self.flats.items()}, self.config)
        self.base_checksum = self.host.base.checksum()
        self.step = 0  # optimizer steps done
        self.micro_batches = MicroBatches(self.method, self.flats, self.config.token_budget, self.stop)
        self.saved: int | None = None  # step of the last checkpoint
        self.evaluated: int | None = None  # step of the last evaluation
        self.best: dict[str, float] | None = None  # {"step", "loss"}, or {"step", "reward"}
        self.metrics: dict[str, float] = {}
        self.first_step_checked = False
        self.last_step = self.config.steps  # earlier when on_step ends the run
        self.usage = Usage(next(iter(self.flats.values())).master.device)

    # -- the loop -----------------------------------------------------------------------------------------------------

    def loop(self, log_file: MetricsLog, on_step: OnStep | None) -> Result:
        config, stopped_by = self.config, None
        tokens, since = 0, time.perf_counter()
        peak = PeakCheck(self.predict, next(iter(self.flats.values())).master.device)
        self.micro_batches.on_micro_batch = peak.saw
        try:
            while True:
                paused = time.perf_counter()
                if self._evaluation_due():
                    self.evaluate(log_file)
                if self._save_due():
                    self.save()
                since += time.perf_counter() - paused
                if self.step >= self.last_step:
                    break
                metrics, step_tokens = self.optimizer_step()
                self.step += 1
                tokens += step_tokens
                metrics["tokens_per_second"] = tokens / (time.perf_counter() - since)
                self.usage.tokens += step_tokens
                metrics |= {"epoch": self.method.epoch(self.step), **self.usage.metrics()}
                metrics |= self.method.shares(self.step) if isinstance(self.method, MixingMethod) else {}
                log_due = self.step % config.log_every == 0 or self.step == config.steps
                since += peak.after_step(last=self.step == config.steps)
                if log_due:
                    metrics |= peak.metrics
                    peak.metrics = {}
                self.metrics |= metrics
                self.method.last_metrics = metrics
                log_file.step(self.step, metrics, log_due)
                if log_due:
                    tokens, since = 0, time.perf_counter()
                if on_step is not None:
                    self._call(on_step)
        except Interrupted:
            stopped_by = self.stop.received
            if self.saved != self.step:
                self.save()
        assert_base_unchanged(self.base_checksum, self.host.base.checksum())
        return Result(self.step, self.metrics, self.best and int(self.best["step"]), stopped_by)

    def train_mode(self) -> None:
        """Set the host to train mode, with activations kept as the config says."""
        config = self.config
        self.host.training(
            config.checkpointing, tile=config.tile, keep_layers=config.keep_layers, every=config.checkpoint_every
        )

    def _evaluation_due(self) -> bool:
        if not self.heldout or self.evaluated == self.step:
            return False
        if isinstance(self.method, SamplingMethod) and self.method.evaluation_due(self.step):
            return True
        every = self.config.eval_every
        return self.step in (0, self.last_step) or (every > 0 and self.step % every == 0)

    def _save_due(self) -> bool:
        if self.saved == self.step:
            return False
        every = self.config.save_every
        return self.step == self.last_step or (every > 0 and self.step > 0 and self.step % every == 0)

    def _call(self, on_step: OnStep) -> None:
        """Tell the caller of the step. False ends the run with it."""
        try:
            if True in processes.gather(on_step(self.step, dict(self.metrics)) is False):
                log(f"on_step returned False: the run ends with step {self.step}")
                self.last_step = self.step
        except BaseException:
            if self.saved != self.step:
                self.save()
            raise

    def optimizer_step(self) -> tuple[dict[str, float], int]:
        """One step on all trained adapters. -> its metrics and its number of tokens."""
        self.stop.check_together()
        seed = (self.config.seed * 1_000_003 + self.step) % 2**63
        torch.manual_seed(seed)
        examples = self._batch()
        sums = self.micro_batches.gradients(examples, seed)
        norms = {name: torch.linalg.vector_norm(flat.master.grad) for name, flat in self.flats.items()}
        whole = {"grad_norm": torch.linalg.vector_norm(torch.stack([*norms.values()]))}
        parts = {f"grad_norm/{name}": norm for name, norm in norms.items()} if len(norms) > 1 else {}
        metrics = _numbers(sums | whole | parts)
        refuse_not_finite(self.step + 1, metrics, examples, self.out)
        if not self.first_step_checked:
            assert_all_have_gradients(self.flats)
        for name, flat in self.flats.items():  # each by itself: a large gradient of one must not shrink the others'
            norm = metrics.get(f"grad_norm/{name}", metrics["grad_norm"])
            if 0 < self.config.clip < norm:
                flat.master.grad.mul_(self.config.clip / norm)
        factor = schedule(self.config, self.step, self.config.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * self.method.lr_multipliers[group["name"]] * factor
        self.optimizer.step()
        for flat in self.flats.values():
            flat.sync_working_copy()
        if not self.first_step_checked:
            assert_base_unchanged(self.base_checksum, self.host.base.checksum())
            self.first_step_checked = True
        return metrics | {"lr": self.config.learning_rate * factor}, sum(e.length for e in examples)

    def _batch(self) -> list[Example]:
        """The examples of the next step. When the method raises UserError, the finished steps are saved first."""
        self.method.token_budget = self.micro_batches.budget
        with self._saved_on_error():
            return self.method.batch(self.step)

    @contextmanager
    def _saved_on_error(self) -> Iterator[None]:
        """When the method raises UserError, the finished steps are saved first."""
        try:
            yield
        except UserError:
            if self.step and self.saved != self.step:
                self.save()
            raise

    def evaluate(self, log_file: MetricsLog) -> None:
        """Metrics of the held-out rows; the weights with the lowest loss, or the highest reward, so far are saved."""
        goal, sign = ("reward", -1) if isinstance(self.method, SamplingMethod) else ("loss", 1)
        self.host.training(None)
        try:
            if isinstance(self.method, SamplingMethod):
                with self._saved_on_error():
                    values = self.method.evaluate(self.heldout)
            else:
                values = _numbers(self.micro_batches.metrics(self.heldout, "evaluating"))
        finally:
            self.train_mode()
        metrics = {f"eval/{name}": value for name, value in values.items()}
        value = values[goal]
        if math.isfinite(value) and (self.best is None or sign * value < sign * self.best[goal]):
            checkpoint.save_best(self.out, self.step, self._weights())
            self.best = {"step": self.step, goal: value}
        self.metrics |= metrics
        log_file.evaluation(self.step, metrics)
        self.evaluated = self.step

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint of the last finished step."""
        tensors, numbers = read_state(self.optimizer)
        values = self.method.state()
        method = {k: v.detach().to("cpu", copy=True).contiguous() for k, v in values.items() if isinstance(v, Tensor)}
        state = {  # the keys stay as they are: they are in the checkpoints of users
            "token_budget": {"asked": self.config.token_budget, "now": self.micro_batches.budget},
            "optimizer": numbers,
            "method": {k: v for k, v in values.items() if k not in method},
            "evaluated": self.evaluated,
            "best": self.best,
            "metrics": {k: v for k, v in self.metrics.items() if math.isfinite(v)},
            "versions": {"lowalign": __version__, "torch": version("torch"), "bitsandbytes": version("bitsandbytes")},
        }
        parts = {"weights": self._weights(), "optimizer": tensors, "method": method}
        if processes.is_main():
            checkpoint.save(self.out, self.step, parts, state, self.config.keep)
        self.saved = self.step

    def restore(self, start: checkpoint.Checkpoint) -> None:
        """Load a checkpoint. Raises UserError when it is of other adapters or another optimizer."""
        weights = checkpoint.by_adapter(start.read("weights"))
        if weights.keys() != self.flats.keys():
            raise UserError(f"{start.folder} is of the adapters {', '.join(weights)}, not of {', '.join(self.flats)}")
        for adapter, tensors in weights.items():
            self.flats[adapter].load(tensors)
        state = start.state
        load_state(self.optimizer, start.read("optimizer"), state["optimizer"])
        self.method.load_state(start.read("method") | state["method"])
        self.step = self.saved = start.step
        if state["token_budget"]["asked"] == self.config.token_budget:
            self.micro_batches.budget = state["token_budget"]["now"]
        self.evaluated, self.best, self.metrics = state["evaluated"], state["best"], state["metrics"]
        self.usage.restore(self.metrics)

    def checkpoint_bytes(self) -> int:
        """Approximate size of one checkpoint."""
        numel = sum(flat.master.numel() for flat in self.flats.values())
        return 4 * numel + state_bytes(self.config, numel)

    def _weights(self) -> dict[str, Tensor]:
        return {
            f"{adapter}/{name}": tensor.to("cpu", copy=True)
            for adapter, flat in self.flats.items()
            for name, tensor in flat.tensors().items()
        }


def _numbers(sums: dict[str, Tensor]) -> dict[str, float]:
    """As floats, in one transfer: the only place where a step waits for the device."""
    return dict(zip(sums, torch.stack([value.double() for value in sums.values()]).tolist(), strict=True))
