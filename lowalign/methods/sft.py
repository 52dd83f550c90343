"""Supervised fine-tuning: maximise the log-probability of the supervised tokens.

L = -1/N Σ_(x,y) Σ_t w_t log π(y_t | x, y_<t),   N = Σ w_t of the step

w_t is 1 for a supervised token and 0 for others, unless a turn has a weight of its own.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lowalign.data.pack import Example, total_weight
from lowalign.methods.fixed_data import FixedDataMethod, by_source
from lowalign.methods.losses import negative_log_likelihood
from lowalign.model.forward.noise import embedding_noise


class SFT(FixedDataMethod):
    """The method of `lowalign sft`."""

    neftune = 0.0
    """Strength of the noise on the embeddings in training; see lowalign.model.forward.noise."""

    def normalizers(self, examples: Sequence[Example]) -> dict[str, float]:
        """The weight of the step's tokens, and of those of each source in it where there are several."""
        sources = by_source(examples).items()
        of_sources = {f"weight/{name}": total_weight(examples[i] for i in places) for name, places in sources}
        return {"weight": total_weight(examples)} | of_sources

    def loss(self, examples: Sequence[Example], normalizers: dict[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of one micro-batch, as its share of the step's."""
        with self.host.use(*self.stack), embedding_noise(self.neftune):
            logps = self.host.logprobs(examples, supervised_only=True)
        logps = weighted(logps, examples)
        loss = negative_log_likelihood(logps, normalizers["weight"])
        metrics = {"loss": loss.detach()}
        for name, places in by_source(examples).items():
            own = [logps[i].detach() for i in places]
            metrics[f"loss/{name}"] = negative_log_likelihood(own, normalizers[f"weight/{name}"])
        return loss, metrics


def weighted(logps: Sequence[Sequence[Tensor]], examples: Sequence[Example]) -> list[Tensor]:
    """w_t log π of the tokens of each Example: (n,), of all its completions. logps: of each completion, 0 where a token is not
    supervised."""
    products = []
    for example, completions in zip(examples, logps, strict=True):
        logp = torch.cat(list(completions))
        if example.token_weights is not None:
            weights = [weight for i in range(len(completions)) for weight in example.weights(i)]
            logp = logp * torch.tensor(weights, dtype=logp.dtype, device=logp.device)
        products.append(logp)
    return products
