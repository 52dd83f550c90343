"""`lowalign dpo`: DPO, its variants and KTO."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from lowalign.config.training import DPOConfig
from lowalign.data.dataset import Dataset
from lowalign.data.pack import Example
from lowalign.data.preferences import load_preferences, refuse_labels
from lowalign.methods.dpo import DPO
from lowalign.methods.kto import KTO
from lowalign.model.base.base import Base
from lowalign.model.host import Host
from lowalign.model.policy import Stack
from lowalign.plan.fit import fitted
from lowalign.train.engine import OnStep
from lowalign.train.reference_cache import fill_reference_logps
from lowalign.train.run import Job, check_and_log_start, load_rows, reference_run, reference_stack, run
from lowalign.train.signals import StopSignals


def dpo(config: DPOConfig, base: Base | None = None, on_step: OnStep | None = None) -> int:
    """Run `lowalign dpo`; `base` is one that is loaded already, `on_step` is called after each step. Returns the exit code."""
    config, predict = fitted(config, base)
    kto = config.dpo.loss == "kto"

    def load(*args: Any, **options: Any) -> Dataset:
        data = load_preferences(*args, **options)
        if not kto:
            refuse_labels(data.examples, "they need --dpo.loss kto")
        return data

    def start(
        host: Host, rows: Sequence[Example], heldout: Sequence[Example], policy: Stack, initial: Stack
    ) -> DPO | KTO:
        check_and_log_start(host, policy, initial, rows, config)
        reference = reference_stack(host, config.reference, initial, config.allow_base_mismatch)
        method = (KTO if kto else DPO)(host, rows, policy, reference, config.dpo, config.train)
        if config.reference_cache == "on" and method.needs_reference:
            with StopSignals() as stop:
                for part in (rows, heldout):
                    fill_reference_logps(host, reference, part, config.train, stop)
        return method

    job = Job("dpo", partial(load_rows, config, load), start, adapters=reference_run(config.reference))
    return run(config, job, base, on_step, predict)
