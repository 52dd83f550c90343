"""NEFTune: uniform noise on the word embeddings of training forwards (arXiv 2310.05914)."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_ALPHA: ContextVar[float] = ContextVar("embedding_noise", default=0.0)


@contextmanager
def embedding_noise(alpha: float) -> Iterator[None]:
    """Forwards with gradients inside the block get noise of this strength; 0: none."""
    token = _ALPHA.set(alpha)
    try:
        yield
    finally:
        _ALPHA.reset(token)


def noise_wanted() -> bool:
    """Whether a forward adds noise. Recomputation of checkpointed layers begins behind the embeddings, so it has the same."""
    return _ALPHA.get() > 0 and torch.is_grad_enabled()


def with_noise(words: Tensor, positions: Tensor) -> Tensor:
    """(T, hidden) embeddings of packed Examples -> the same plus U(-1, 1) · alpha / √(L · hidden), L: tokens of the Example.

    positions (T,): those of the pack; the first one marks where an Example begins.
    """
    starts = (positions == positions[0]).cumsum(0) - 1
    lengths = torch.bincount(starts)[starts]
    scale = _ALPHA.get() / (lengths * words.shape[-1]).sqrt()
    noise = torch.rand(words.shape, device=words.device, dtype=torch.float32) * 2 - 1
    return words + (noise * scale[:, None]).to(words.dtype)
