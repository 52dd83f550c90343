"""What the loop asks of a method."""

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from lowalign.data.pack import Example


class Method(Protocol):
    """The engine knows a method only by this, and methods know no engine."""

    lr_multipliers: dict[str, float]
    """Adapter name -> what its learning rate is multiplied by."""
    token_budget: int
    """Most tokens of a micro-batch; the loop sets it before each `batch`, because it shrinks when memory runs out."""

    def batch(self, step: int) -> list[Example]:
        """The examples of optimizer step `step`, counted from 0.

        Asked again for the same step, also after `load_state` of a `state` taken since, it gives the same examples and
        changes nothing: a step that a signal cut short is begun anew. Before it torch is seeded from (seed, step).
        """

    def normalizers(self, examples: Sequence[Example]) -> dict[str, float]:
        """The counts that means are over, such as {"tokens": …}."""

    def loss(
        self, examples: Sequence[Example], normalizers: dict[str, float]
    ) -> tuple[Tensor, dict[str, Tensor | float]]:
        """Loss and metrics of some of the step's examples: sums divided by the STEP's normalizers, so that they add up."""

    def state(self) -> dict[str, Any]:
        """What a resumed run needs besides `step`: tensors, and values that JSON holds."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Take up what `state` gave."""
