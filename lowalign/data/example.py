"""Example: a prompt and its completions, as token ids."""

from dataclasses import dataclass
from functools import lru_cache


@dataclass
class Example:
    """One prompt with one or more completions, as token ids.

    masks: for each completion, which of its tokens are supervised; None: all. Without a prompt, the first token of a
    completion has no context and is never supervised.
    rank: of each completion, lowest is best; equal numbers tie. margin: required lead of the better completion (reward
    model). label: thumbs up (True) or down, for a single completion. weight: factor of the Example in the loss.
    reference: for each completion, the summed log-probability of its supervised tokens under the reference.
    token_weights: for each completion, the factors of its tokens in the loss of SFT; None: 1 for every supervised token.
    source: where the row is, file:line. dataset: the short name of its source, where there are several.
    """

    prompt: list[int]
    completions: list[list[int]]
    masks: list[list[bool]] | None = None
    rank: list[float] | None = None
    margin: float = 0.0
    label: bool | None = None
    weight: float = 1.0
    reference: list[float] | None = None
    token_weights: list[list[float]] | None = None
    source: str = ""
    dataset: str = ""

    def __post_init__(self) -> None:
        if not self.completions or not all(self.completions):
            raise ValueError(f"an Example needs at least one completion, and none of them empty {self.source}".rstrip())
        for name, lists in (("masks", self.masks), ("token_weights", self.token_weights)):
            if lists is not None and list(map(len, lists)) != list(map(len, self.completions)):
                raise ValueError(f"{name} and completions of an Example differ in length {self.source}".rstrip())
        if self.rank is not None and len(self.rank) != len(self.completions):
            raise ValueError(f"rank and completions of an Example differ in length {self.source}".rstrip())

    @property
    def length(self) -> int:
        """Tokens in a Pack: the prompt once, and all completions."""
        return len(self.prompt) + sum(map(len, self.completions))

    def mask(self, i: int) -> list[bool]:
        """Which tokens of completion i are supervised, one bool per token."""
        mask = [True] * len(self.completions[i]) if self.masks is None else list(self.masks[i])
        if not self.prompt:
            mask[0] = False
        return mask

    @property
    def supervised(self) -> int:
        """Number of supervised tokens in all completions."""
        return sum(sum(self.mask(i)) for i in range(len(self.completions)))

    def weights(self, i: int) -> list[float]:
        """The factor of each token of completion i in the loss of SFT; 0 where it is not supervised."""
        mask = self.mask(i)
        return mask if self.token_weights is None else [w * m for w, m in zip(self.token_weights[i], mask, strict=True)]


@lru_cache(maxsize=10_000)
def all_supervised(length: int) -> list[bool]:
    """The mask of a completion that is all supervised: the same list for equal lengths, not to be changed."""
    return [True] * length
