"""Supervised fine-tuning: maximise the log-probability of the supervised tokens.

L = -1/N Σ_(x,y) Σ_(t supervised) log π(y_t | x, y_<t),   N = supervised tokens of the step
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lowalign.data.pack import Example, total_supervised
from lowalign.methods.fixed_data import FixedDataMethod
from lowalign.methods.losses import negative_log_likelihood


class SFT(FixedDataMethod):
    """The method of `lowalign sft`."""

    def normalizers(self, examples: Sequence[Example]) -> dict[str, float]:
        """The supervised tokens of the step."""
        return {"tokens": total_supervised(examples)}

    def loss(self, examples: Sequence[Example], normalizers: dict[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of one micro-batch, as its share of the step's."""
        with self.host.use(*self.stack):
            logps = self.host.logprobs(examples, supervised_only=True)
        loss = negative_log_likelihood([torch.cat(completions) for completions in logps], normalizers["tokens"])
        return loss, {"loss": loss.detach()}
