"""What the engine asks of a method and of a host."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from lowalign.data.pack import Example
from lowalign.model.adapters.flat import FlatWeights


class Method(Protocol):
    """A training method: the engine uses nothing else of it, and a method does not import the engine."""

    lr_multipliers: dict[str, float]
    """Learning-rate multiplier of each trained adapter, by name."""
    token_budget: int
    """Most tokens of a micro-batch. The engine sets it before each `batch`; it shrinks when memory runs out."""
    last_metrics: dict[str, float]
    """Metrics of the last finished step, which the engine sets after it; a resumed run starts with those of `state`."""

    def batch(self, step: int) -> list[Example]:
        """The examples of optimizer step `step`, counted from 0. torch is seeded from (seed, step) before the call.

        Idempotent per step, also across save and restore: a step that a signal interrupted is repeated.
        """

    def epoch(self, steps: int) -> float:
        """Passes over the data in the first `steps` steps."""

    def normalizers(self, examples: Sequence[Example]) -> dict[str, float]:
        """Denominators of the step's means, such as {"tokens": …}."""

    def loss(
        self, examples: Sequence[Example], normalizers: dict[str, float]
    ) -> tuple[Tensor, dict[str, Tensor | float]]:
        """Loss and metrics of a micro-batch, divided by the normalizers of the whole STEP, so that they add up. Of
        metrics whose names end with _max the highest counts."""

    def state(self) -> dict[str, Any]:
        """What a resumed run needs besides the step: tensors and JSON values."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""


@runtime_checkable
class MixingMethod(Protocol):
    """A method whose Examples may be a mixture of sources."""

    def shares(self, steps: int) -> dict[str, float]:
        """Metrics share/NAME: the share of each source in the first `steps` steps; empty without a mixture."""


@runtime_checkable
class SamplingMethod(Protocol):
    """A method whose held-out rows are prompts, judged by the reward of what it samples, not by a loss."""

    def evaluate(self, prompts: Sequence[Any]) -> dict[str, float]:
        """Metrics of the held-out prompts, among them `reward`: the weights with the highest are kept as the best."""

    def evaluation_due(self, step: int) -> bool:
        """Whether to evaluate before optimizer step `step`, besides the times of TrainConfig.eval_every."""


class FrozenBase(Protocol):
    """The base under the adapters."""

    def checksum(self) -> int:
        """Changes when a weight of the base changes."""


@runtime_checkable
class TrainableHost(Protocol):
    """What the engine uses of a host."""

    base: FrozenBase
    check: Callable[[], None]
    """Interrupt hook between no-grad forwards; raises to abort."""

    def train_only(self, *names: str) -> None:
        """Only these adapters get gradients."""

    def flat(self, name: str) -> FlatWeights:
        """The weights of an adapter in one buffer."""

    def training(self, checkpointing: str | None, **memory: int) -> None:
        """Train mode with activation checkpointing "on", "off" or "offload"; None: evaluation mode.

        memory: `tile`, `keep_layers` and `every` (train.checkpoint_every)."""
