"""log p(token | hidden state) for a frozen LM head, without ever keeping the logits.

The LM head W is frozen, so the derivatives of one token's log-probability and entropy are single rows that the forward
can keep. With z = cap(scale (W h + b)), p = softmax(z / t) and H its entropy:
    d logp_y / d h = scale/t (c_y W_y - (p c) W)          d H / d h = -scale/t ((p (log p + H) c) W)
where c = 1 without a soft cap and c = 1 - (z / softcap)^2 with one (z = softcap tanh(. / softcap)).
The backward multiplies them by the incoming gradients and recomputes no logits: two matrix products instead of three,
and memory of O(chunk x vocabulary).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lowalign.model.attention.product import emulated, product

LOGIT_ROWS = 256  # hidden states whose logits exist at a time


@dataclass(frozen=True)
class LMHead:
    """The output layer as arithmetic: logits = cap(scale (W h + b)), cap(x) = softcap tanh(x / softcap).

    weight (V, H), bias (V,) or None.
    """

    module: nn.Module
    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, model: nn.Module) -> "LMHead":
        """Read scale (cohere, granite) and soft cap (gemma2) from the config; bias (phi) from the layer."""
        config = model.config.get_text_config()
        scale = getattr(config, "logit_scale", None) or 1.0
        scale /= getattr(config, "logits_scaling", None) or 1.0
        return cls(model.get_output_embeddings(), scale, getattr(config, "final_logit_softcapping", None))

    @property
    def frozen(self) -> bool:
        """Whether it is a plain linear layer without trainable parameters, so that TokenLogprob applies."""
        plain = type(self.module) is nn.Linear
        return plain and not any(p.requires_grad for p in self.module.parameters())

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (N, H) -> (N, V), fp32."""
        return self.cap(torch.promote_types(hidden.dtype, torch.float32), self.module(hidden))

    def raw(self, hidden: Tensor) -> Tensor:
        """W h + b of a plain linear layer. hidden (N, H) -> (N, V)."""
        if self.module._forward_hooks or not emulated(hidden):
            return self.module(hidden)
        z = product(hidden, self.module.weight.T)
        return z if self.module.bias is None else z.add_(self.module.bias)

    def cap(self, dtype: torch.dtype, raw: Tensor) -> Tensor:
        """Scale and soft cap of the raw logits, in `dtype`."""
        z = raw.to(dtype) * self.scale if self.scale != 1.0 else raw.to(dtype)
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)


class TokenLogprob(torch.autograd.Function):
    """hidden (N, H), frozen LM head, labels (N,) -> log-prob (N,), entropy (N,) or None; fp32 (fp64 for fp64 input)."""

    @staticmethod
    def forward(ctx, hidden: Tensor, lm_head: LMHead, labels: Tensor, temperature: float, with_entropy: bool):
        weight = lm_head.module.weight
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        logps = torch.empty(len(hidden), dtype=dtype, device=hidden.device)
        entropies = torch.empty_like(logps) if with_entropy else None
        keep = ctx.needs_input_grad[0]
        d_logp = torch.empty_like(hidden) if keep else None
        d_entropy = torch.empty_like(hidden) if keep and with_entropy else None
        factor = lm_head.scale / temperature
        for start in range(0, len(hidden), LOGIT_ROWS):
            part = slice(start, start + LOGIT_ROWS)
            y = labels[part, None]
            z = lm_head.cap(dtype, lm_head.raw(hidden[part]))
            c = None if lm_head.softcap is None or not keep else 1 - (z / lm_head.softcap) ** 2
            # Passes over the vocabulary cost time and memory here: one exponential only, and p overwrites z.
            z = z.div_(temperature) if temperature != 1.0 else z
            z = z.sub_(z.amax(-1, keepdim=True))
            own_z = z.gather(1, y)
            p = z.exp() if with_entropy else z.exp_()
            total = p.sum(-1, keepdim=True)
            logps[part] = (own_z - total.log())[:, 0]
            if not (keep or with_entropy):
                continue
            p = p.div_(total)
            if with_entropy:
                logp = z.sub_(total.log())
                entropies[part] = h = -(p * logp).sum(-1)
            if not keep:
                continue
            own = weight[labels[part]] if c is None else weight[labels[part]] * c.gather(1, y).to(weight.dtype)
            mean = p if c is None else p * c
            d_logp[part] = factor * (own - product(mean.to(weight.dtype), weight))
            if d_entropy is not None:
                d_entropy[part] = -factor * product((mean * (logp + h[:, None])).to(weight.dtype), weight)
        ctx.save_for_backward(d_logp, d_entropy)
        return logps, entropies

    @staticmethod
    def backward(ctx, g_logp: Tensor, g_entropy: Tensor | None):
        d_logp, d_entropy = ctx.saved_tensors
        grad = g_logp[:, None] * d_logp.to(g_logp.dtype)
        if d_entropy is not None and g_entropy is not None:
            grad = grad + g_entropy[:, None] * d_entropy.to(g_logp.dtype)
        return grad.to(d_logp.dtype), None, None, None, None


def token_logprobs(
    hidden: Tensor, lm_head: LMHead, labels: Tensor, temperature: float = 1.0, entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each label under its hidden state and, with `entropy`, the entropy of that distribution.

    hidden (N, H), labels (N,) -> (N,) and (N,) or None, in fp32. An LM head that is trained or carries an adapter takes a
    plain path that recomputes its logits, a chunk at a time, in the backward.
    """
    if lm_head.frozen:
        return TokenLogprob.apply(hidden, lm_head, labels, temperature, entropy)

    def plain(h: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logp = (lm_head.logits(h) / temperature).log_softmax(-1)
        return logp.gather(1, y[:, None])[:, 0], -(logp.exp() * logp).sum(-1) if entropy else logp.new_zeros(len(h))

    parts = [
        checkpoint(plain, h, y, use_reentrant=False)
        for h, y in zip(hidden.split(LOGIT_ROWS), labels.split(LOGIT_ROWS), strict=True)
    ]
    if not parts:
        return hidden.new_zeros(0, dtype=torch.float32), None
    logps, entropies = (torch.cat(x) for x in zip(*parts, strict=True))
    return logps, entropies if entropy else None
