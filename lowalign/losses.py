"""Losses as pure functions: tensors in and out, equation and source at the line."""

from torch import Tensor


def negative_log_likelihood(logps: list[Tensor], tokens: float) -> Tensor:
    """-1/tokens Σ log π(y_t | x, y_<t): the supervised tokens' log-probs, each (length,), over the count of the whole step.

    Dividing by the step's count, not by this micro-batch's, is what makes the sum over micro-batches the step's mean.
    """
    return -sum(logp.sum() for logp in logps) / tokens
