"""Drawing the next token from its logits, without sorting the vocabulary."""

import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor

TOKENS_PER_BLOCK = 128  # tokens; drawing takes two steps: a block of the vocabulary, then a token of the block
CANDIDATES = 64  # top-p sorts the likeliest 64 tokens, then eight times as many, until they hold its mass


def uniforms(seed: int, prompt_seed: int, number: int, length: int) -> list[float]:
    """The random numbers of one sample: `length` of them in [0, 1), one for each token it may get.

    A pure function of its arguments, the same on every machine; a longer list starts with the shorter one.
    """
    digest = hashlib.shake_128(f"{seed} {prompt_seed} {number}".encode()).digest(3 * length)
    return [int.from_bytes(digest[i : i + 3], "big") / 2**24 for i in range(0, 3 * length, 3)]


def draw_tokens(
    logits: Tensor,
    uniform: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    banned: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw one token per row by inverting the cumulative distribution at the row's uniform number.

    logits (R, V), uniform (R,) in [0, 1), banned (R, V) bool: tokens that must not be drawn. Temperature 0 takes the
    likeliest token; top_k 0 and top_p 1 truncate nothing. Top-p applies to what top-k leaves, and keeps a token when the
    likelier ones hold less than top_p (arXiv 1904.09751).

    Returns tokens (R,) and their log-probs (R,) in fp32 (fp64 for fp64 logits) under the whole distribution at this
    temperature (at 1 for temperature 0), before banning and truncation.
    """
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature not in (0, 1):
        scores = scores / temperature
    if padding := -scores.shape[1] % TOKENS_PER_BLOCK:
        scores = F.pad(scores, (0, padding), value=-torch.inf)
    weights, mass, lse = _blocks(scores)
    allowed, allowed_lse = scores, lse
    if banned is not None:
        allowed = scores.masked_fill(F.pad(banned, (0, padding)), -torch.inf)
        weights, mass, allowed_lse = _blocks(allowed)
    if temperature == 0:
        token = allowed.argmax(-1, keepdim=True)
    elif top_k or top_p < 1:
        token = _truncated(allowed, allowed_lse, uniform, min(top_k, logits.shape[1]), top_p)
    else:
        point = uniform.double()[:, None] * mass[:, -1:]
        block = _invert(mass, point)
        within = weights[torch.arange(len(weights), device=weights.device), block[:, 0]].double().cumsum(-1)
        before = mass.gather(1, block) - within[:, -1:]
        token = block * TOKENS_PER_BLOCK + _invert(within, (point - before).clamp_(min=0))
    return token[:, 0], (scores.gather(1, token) - lse)[:, 0]


def _blocks(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(R, V) -> weights (R, V / TOKENS_PER_BLOCK, TOKENS_PER_BLOCK), their cumulative sum by blocks (R, V / TOKENS_PER_BLOCK) fp64, log-sum-exp (R, 1)."""
    top = scores.amax(-1, keepdim=True)
    weights = (scores - top).exp_().view(len(scores), -1, TOKENS_PER_BLOCK)
    mass = weights.sum(-1).double().cumsum(-1)
    return weights, mass, top + mass[:, -1:].log().to(scores.dtype)


def _truncated(scores: Tensor, lse: Tensor, uniform: Tensor, top_k: int, top_p: float) -> Tensor:
    """(R, 1) tokens drawn from the likeliest ones only."""
    count = top_k or min(CANDIDATES, scores.shape[1])
    while True:
        best, index = scores.topk(count)
        p = (best - (best.logsumexp(-1, keepdim=True) if top_k else lse)).exp_().double()
        if top_k or count == scores.shape[1] or bool((p.sum(-1) >= top_p).all()):
            break
        count = min(8 * count, scores.shape[1])
    if top_p < 1:
        p.masked_fill_(p.cumsum(-1) - p >= top_p, 0)
    cumulative = p.cumsum(-1)
    return index.gather(1, _invert(cumulative, uniform.double()[:, None] * cumulative[:, -1:]))


def _invert(cumulative: Tensor, point: Tensor) -> Tensor:
    """(R, 1): the first index whose cumulative sum exceeds the point; never one that adds nothing to the sum."""
    # Rounding can put the point on the total: then take the last index that added something.
    last = (cumulative < cumulative[:, -1:]).sum(-1, keepdim=True)
    return torch.minimum(torch.searchsorted(cumulative, point, right=True), last)
