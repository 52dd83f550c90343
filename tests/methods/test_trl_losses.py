"""The losses against trl's own code, on the same numbers.

Skipped where trl is not installed (pip install lowalign[bench]). trl computes its losses inside methods of its trainers;
those are called with a stand-in that has nothing but what they read.
"""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from lowalign.methods import losses

pytest.importorskip("trl", minversion="1.16")

from trl import DPOTrainer, KTOTrainer, RewardTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

PAIRS, LENGTH = 6, 9
SAME = {"atol": 1e-6, "rtol": 1e-6}


def stand_in(**more) -> SimpleNamespace:
    """What the loss methods of trl's trainers read from themselves."""
    same = lambda x: x  # noqa: E731
    accelerator = SimpleNamespace(device="cpu", gather=same, gather_for_metrics=same)
    always = {"aux_loss_enabled": False, "_total_train_tokens": 0, "_tp_size": 1}
    metrics = defaultdict(lambda: defaultdict(list))
    training = SimpleNamespace(training=True)
    return SimpleNamespace(accelerator=accelerator, model=training, _metrics=metrics, **always, **more)


def completions(rows: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """-> log-probs (rows, LENGTH - 1), zero outside the completion; its mask (rows, LENGTH); the reference's sums (rows,)."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(rows, LENGTH, dtype=torch.long)
    for row, (start, stop) in enumerate(zip(torch.randint(1, 4, (rows,), generator=generator), torch.randint(5, LENGTH + 1, (rows,), generator=generator), strict=True)):  # fmt: skip
        mask[row, start:stop] = 1
    logps = -3 * torch.rand(rows, LENGTH - 1, generator=generator, dtype=torch.float64) * mask[:, 1:]
    reference = logps.sum(1) + torch.randn(rows, generator=generator, dtype=torch.float64)
    return logps, mask, reference


def trl_model(logps: Tensor):
    """A model whose fused head gives these log-probs."""
    rest = {"entropy": logps.detach(), "mean_logits": logps.detach(), "is_top1": logps.detach() > -1}
    return lambda **_: SimpleNamespace(log_probs=logps, **rest)


def inputs_of(mask: Tensor) -> dict[str, Tensor]:
    ids = torch.ones_like(mask)
    return {"input_ids": ids, "attention_mask": ids, "completion_mask": mask}


def trl_dpo(kind: str, beta: float, smoothing: float) -> tuple[Tensor, Tensor]:
    """-> trl's DPO loss and its gradient."""
    logps, mask, reference = completions(2 * PAIRS, seed=1)
    logps.requires_grad_()
    trainer = stand_in(
        ld_alpha=None, precompute_ref_logps=True, f_divergence_type="reverse_kl", loss_types=[kind], loss_weights=[1.0],
        beta=beta, label_smoothing=smoothing, use_weighting=False,
    )  # fmt: skip
    inputs = inputs_of(mask) | {"ref_chosen_logps": reference[:PAIRS], "ref_rejected_logps": reference[PAIRS:]}
    loss = DPOTrainer._compute_loss(trainer, trl_model(logps), inputs, return_outputs=False)
    return loss.detach(), torch.autograd.grad(loss, logps)[0]


def log_ratios(per_token: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The same numbers as `trl_dpo` -> log-probs (leaf), and log π/π_ref of the chosen and the rejected (PAIRS,)."""
    logps, mask, reference = completions(2 * PAIRS, seed=1)
    logps.requires_grad_()
    ratios = (logps.sum(1) - reference) / (mask.sum(1) if per_token else 1)
    return logps, ratios[:PAIRS], ratios[PAIRS:]


@pytest.mark.parametrize(
    "kind, ours",
    [
        ("sigmoid", lambda h: losses.dpo(h, 0.3)),
        ("hinge", lambda h: losses.hinge(h, 0.3)),
        ("robust", lambda h: losses.dpo(h, 0.3, smoothing=0.1, robust=True)),
        ("ipo", lambda h: losses.ipo(h, 0.3)),
    ],
)
def test_dpo(kind, ours):
    logps, chosen, rejected = log_ratios(per_token=kind == "ipo")
    loss = ours(chosen - rejected).mean()
    want, gradient = trl_dpo(kind, beta=0.3, smoothing=0.1 if kind == "robust" else 0.0)
    torch.testing.assert_close(loss, want, **SAME)
    torch.testing.assert_close(torch.autograd.grad(loss, logps)[0], gradient, **SAME)


def averages(seed: int) -> tuple[Tensor, Tensor]:
    """Log-probs averaged over a completion's tokens, of PAIRS chosen and rejected completions."""
    logps, mask, _ = completions(2 * PAIRS, seed)
    return (logps.sum(1) / mask.sum(1)).split(PAIRS)


def trl_cpo(loss_type: str, beta: float, smoothing: float = 0.0, gamma: float = 0.0):
    trainer = stand_in(alpha=0.0, loss_type=loss_type, beta=beta, label_smoothing=smoothing, simpo_gamma=gamma)
    return lambda chosen, rejected: CPOTrainer.cpo_loss(trainer, chosen, rejected)[0]


def test_label_smoothing():
    """cDPO: trl has it without a reference only, which is DPO's with h the difference of log-probs."""
    chosen, rejected = averages(seed=2)
    want = trl_cpo("sigmoid", beta=0.7, smoothing=0.2)(chosen, rejected)
    torch.testing.assert_close(losses.dpo(chosen - rejected, 0.7, smoothing=0.2), want, **SAME)


def test_simpo():
    """trl counts the margin in units of 1/β, as the paper's β (p_w - p_l) - γ."""
    chosen, rejected = averages(seed=3)
    want = trl_cpo("simpo", beta=2.0, gamma=0.8)(chosen, rejected)
    torch.testing.assert_close(losses.simpo(chosen, rejected, beta=2.0, gamma=0.8), want, **SAME)


def test_odds_ratio():
    """trl computes in fp32 and gives β log σ, without the minus."""
    chosen, rejected = averages(seed=4)
    want = ORPOTrainer.odds_ratio_loss(stand_in(beta=0.5), chosen, rejected)[0]
    torch.testing.assert_close(0.5 * losses.odds_ratio(chosen, rejected), -want.double(), **SAME)


@pytest.mark.parametrize("moved", [True, False])
def test_kto(moved):
    """moved: whether the divergence of the step is above zero, where it is held otherwise."""
    logps, mask, reference = completions(PAIRS, seed=5)
    logps.requires_grad_()
    label = torch.tensor([True, False, True, True, False, False])
    kl = torch.full((PAIRS,), 0.4 if moved else -0.4, dtype=torch.float64)
    trainer = stand_in(
        _compute_kl_logps=lambda model, batch: kl, calculate_KL=True, precompute_ref_logps=True, loss_type="kto",
        beta=0.3, desirable_weight=1.5, undesirable_weight=0.75,
    )  # fmt: skip
    inputs = inputs_of(mask) | {"label": label, "ref_logps": reference, "ref_KL_logps": torch.zeros_like(kl)}
    want = KTOTrainer._compute_loss(trainer, trl_model(logps), inputs, return_outputs=False)
    weights = torch.where(label, 1.5, 0.75)
    ours = (weights * losses.kto(logps.sum(1) - reference, label, kl.mean().clamp(min=0), 0.3)).mean()
    torch.testing.assert_close(ours, want, **SAME)
    gradients = [torch.autograd.grad(loss, logps)[0] for loss in (ours, want)]
    torch.testing.assert_close(*gradients, **SAME)


@pytest.mark.parametrize("centring", [None, 0.05])
@pytest.mark.parametrize("margin", [None, torch.linspace(0, 1, PAIRS, dtype=torch.float64)])
def test_bradley_terry(margin, centring):
    scores = torch.randn(2 * PAIRS, 1, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    inputs = {"attention_mask": torch.ones(2 * PAIRS, 3)} | ({} if margin is None else {"margin": margin})
    trainer = stand_in(args=SimpleNamespace(center_rewards_coefficient=centring))
    want = RewardTrainer.compute_loss(trainer, lambda **_: SimpleNamespace(logits=scores), inputs)
    chosen, rejected = scores[:, 0].split(PAIRS)
    ours = losses.bradley_terry(chosen, rejected, 0.0 if margin is None else margin)
    if centring is not None:
        ours = ours + centring * losses.centring(chosen, rejected)
    torch.testing.assert_close(ours.mean(), want, **SAME)
