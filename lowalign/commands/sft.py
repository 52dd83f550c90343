"""`lowalign sft`: supervised fine-tuning."""

from functools import partial

from lowalign.config.training import SFTConfig
from lowalign.data.dataset import load_examples
from lowalign.data.pack import Example
from lowalign.methods.sft import SFT
from lowalign.model.base.base import Base
from lowalign.model.host import Host
from lowalign.model.policy import Stack
from lowalign.train.run import Job, check_and_log_start, load_rows, run


def sft(config: SFTConfig, base: Base | None = None) -> int:
    """Run `lowalign sft`; `base` is one that is loaded already. Returns the exit code."""

    def start(host: Host, rows: list[Example], heldout: list[Example], policy: Stack, initial: Stack) -> SFT:
        check_and_log_start(host, policy, initial, rows, config)
        return SFT(host, rows, policy, config.train)

    return run(config, Job("sft", partial(load_rows, config, load_examples), start), base)
