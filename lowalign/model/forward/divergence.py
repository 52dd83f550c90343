"""KL divergence between the predictions of two hidden states under one frozen LM head, without ever keeping the logits."""

import torch
from torch import Tensor

from lowalign.model.forward.logprob import LOGIT_ROWS, LMHead


class HeadKL(torch.autograd.Function):
    """q's hidden states (N, H), p's (N, H), LM head -> KL(p ‖ q) at each position over the whole vocabulary, (N,).

    Logits exist for LOGIT_ROWS positions at a time; the gradient to q's states is made with them and kept.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, target: Tensor, lm_head: LMHead) -> Tensor:
        kl = torch.empty(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        keep = ctx.needs_input_grad[0]
        d_hidden = torch.empty_like(hidden) if keep else None
        for start in range(0, len(hidden), LOGIT_ROWS):
            part = slice(start, start + LOGIT_ROWS)
            logp = lm_head.logits(target[part]).log_softmax(-1)
            h = hidden[part].detach().requires_grad_(keep)
            with torch.set_grad_enabled(keep):
                logq = lm_head.logits(h).log_softmax(-1)
                values = (logp.exp() * (logp - logq)).sum(-1)
                kl[part] = values.detach()
                if keep:
                    (d_hidden[part],) = torch.autograd.grad(values.sum(), h)
        ctx.save_for_backward(d_hidden)
        return kl

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (d_hidden,) = ctx.saved_tensors
        return (gradient[:, None] * d_hidden.to(gradient.dtype)).to(d_hidden.dtype), None, None
