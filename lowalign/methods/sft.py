"""Supervised fine-tuning: maximise the log-probability of the supervised tokens.

L = -1/N Σ_(x,y) Σ_(t supervised) log π(y_t | x, y_<t),   N = supervised tokens of the step
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lowalign.data.pack import Example, step_order, total_supervised
from lowalign.methods.losses import negative_log_likelihood
from lowalign.model.host import Host


class SFT:
    """The method of `lowalign sft`.

    stack: the adapters that act; the last one is trained, those before it (an earlier run's) stay frozen.
    """

    def __init__(
        self, host: Host, examples: Sequence[Example], stack: tuple[str, ...], batch_size: int, seed: int
    ) -> None:
        self.host = host
        self.examples = examples
        self.stack = stack
        self.lr_multipliers = {stack[-1]: 1.0}
        self.batch_size = batch_size
        self.seed = seed

    def batch(self, step: int) -> list[Example]:
        """The examples of optimizer step `step`, counted from 0."""
        return [self.examples[i] for i in step_order(len(self.examples), self.batch_size, self.seed, step)]

    def normalizers(self, examples: Sequence[Example]) -> dict[str, float]:
        """What the mean is over."""
        return {"tokens": total_supervised(examples)}

    def loss(self, examples: Sequence[Example], normalizers: dict[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
        """This micro-batch's part of the step's loss."""
        with self.host.use(*self.stack):
            logps = self.host.logprobs(examples, supervised_only=True)
        loss = negative_log_likelihood([torch.cat(completions) for completions in logps], normalizers["tokens"])
        return loss, {"loss": loss.detach()}

    def state(self) -> dict:
        """Nothing but the step: the order of the data follows from it."""
        return {}

    def load_state(self, state: dict) -> None:
        """Nothing to take up."""
