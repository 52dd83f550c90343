"""`lowalign sft`: supervised fine-tuning."""

from collections.abc import Sequence
from functools import partial

from lowalign.config.training import SFTConfig
from lowalign.data.dataset import load_examples
from lowalign.data.pack import Example
from lowalign.errors import UserError
from lowalign.methods.sft import SFT
from lowalign.model.base.base import Base
from lowalign.model.host import Host
from lowalign.model.policy import Stack
from lowalign.plan.fit import fitted
from lowalign.train.engine import OnStep
from lowalign.train.run import Job, check_and_log_start, load_rows, run


def sft(config: SFTConfig, base: Base | None = None, on_step: OnStep | None = None) -> int:
    """Run `lowalign sft`; `base` is one that is loaded already, `on_step` is called after each step. Returns the exit code."""
    config, predict = fitted(config, base)

    def start(host: Host, rows: Sequence[Example], heldout: Sequence[Example], policy: Stack, initial: Stack) -> SFT:
        check_and_log_start(host, policy, initial, rows, config)
        if config.neftune and not host.base.packed:
            raise UserError("--neftune needs the packed attention, which this architecture does not have; leave it out")
        method = SFT(host, rows, policy, config.train)
        method.neftune = config.neftune
        return method

    return run(config, Job("sft", partial(load_rows, config, load_examples), start), base, on_step, predict)
