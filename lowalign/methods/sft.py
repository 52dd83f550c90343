"""Supervised fine-tuning: maximise the log-probability of the supervised tokens.

L = -1/N Σ_(x,y) Σ_(t supervised) log π(y_t | x, y_<t),   N = supervised tokens of the step
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lowalign.data.pack import Example, total_supervised
from lowalign.methods.fixed_data import FixedDataMethod
from lowalign.methods.losses import negative_log_likelihood
from lowalign.model.forward.noise import embedding_noise


class SFT(FixedDataMethod):
    """The method of `lowalign sft`."""

    neftune = 0.0
    """Strength of the noise on the embeddings in training; see lowalign.model.forward.noise."""

    def normalizers(self, examples: Sequence[Example]) -> dict[str, float]:
        """The supervised tokens of the step, and of each source in it where there are several."""
        by_source = {f"tokens/{name}": total_supervised(own) for name, own in _by_source(examples).items()}
        return {"tokens": total_supervised(examples)} | by_source

    def loss(self, examples: Sequence[Example], normalizers: dict[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of one micro-batch, as its share of the step's."""
        with self.host.use(*self.stack), embedding_noise(self.neftune):
            logps = self.host.logprobs(examples, supervised_only=True)
        logps = [torch.cat(completions) for completions in logps]
        loss = negative_log_likelihood(logps, normalizers["tokens"])
        metrics = {"loss": loss.detach()}
        for name in _by_source(examples):
            own = [logp.detach() for logp, example in zip(logps, examples, strict=True) if example.dataset == name]
            metrics[f"loss/{name}"] = negative_log_likelihood(own, normalizers[f"tokens/{name}"])
        return loss, metrics


def _by_source(examples: Sequence[Example]) -> dict[str, list[Example]]:
    """The Examples of each source, by its name; empty where there is only one."""
    sources: dict[str, list[Example]] = {}
    for example in examples:
        if example.dataset:
            sources.setdefault(example.dataset, []).append(example)
    return sources
