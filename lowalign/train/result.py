"""Which weights of a finished run become its adapter: those with the lowest held-out loss (ppo: the highest reward), or the last."""

from dataclasses import dataclass
from typing import Literal

from lowalign.config.training import RunConfig
from lowalign.errors import UserError
from lowalign.model.host import Host
from lowalign.train import checkpoint
from lowalign.train.engine import Result
from lowalign.train.metrics import metrics_at


@dataclass(frozen=True)
class Chosen:
    """The weights that an adapter is saved with. step: after which they were. why: for the log."""

    step: int
    metrics: dict[str, float]
    why: str


def refuse_best_without_heldout(config: RunConfig) -> None:
    """Raise UserError for --train.result best without held-out rows."""
    if config.train.result == "best" and not (config.data.eval or config.data.eval_rows):
        raise UserError("--train.result best chooses by held-out rows: add --data.eval-rows N or --data.eval FILE")


def choose(host: Host, config: RunConfig, result: Result) -> Chosen:
    """Choose by --train.result and leave the chosen weights on the host, which has the last ones."""
    kind, why = _kind(config, result)
    if kind == "last":
        return Chosen(result.step, result.metrics, f"it has the weights of step {result.step}, the last; {why}")
    if result.best_step == result.step:
        return Chosen(result.step, result.metrics, f"it has the weights of step {result.step}, the last and the best")
    _, weights = checkpoint.read_best(config.out)
    for adapter, tensors in checkpoint.by_adapter(weights).items():
        host.flat(adapter).load(tensors)
    metrics = metrics_at(config.out, result.best_step)
    goal = _goal(result)
    best, last = (m.get(goal.split()[1], float("nan")) for m in (metrics, result.metrics))
    why = f"it has the weights of step {result.best_step}, with the {goal}: {best:.4g}, after the last step {last:.4g}"
    return Chosen(result.best_step, metrics, why)


def _kind(config: RunConfig, result: Result) -> tuple[Literal["best", "last"], str]:
    """-> which weights, and why the last ones."""
    if result.best_step is None:
        return "last", "there were no held-out rows to choose by"
    if config.train.result == "last":
        return "last", f"the {_goal(result)} was at step {result.best_step} (lowalign checkpoint {config.out}@best)"
    stored = checkpoint.read_best(config.out)
    if stored is None or stored[0] != result.best_step:  # a run that went further was resumed with fewer steps
        return "last", f"those of step {result.best_step}, with the {_goal(result)}, are not kept any more"
    return "best", ""


def _goal(result: Result) -> str:
    """By what the best weights are chosen: that of PPO's held-out prompts is their reward."""
    return "lowest eval/loss" if "eval/loss" in result.metrics else "highest eval/reward"
