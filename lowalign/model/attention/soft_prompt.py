"""The soft prompt of a forward: learned states that stand before every prompt."""

from dataclasses import dataclass

import torch
from torch import Tensor

KeysValues = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class SoftPrompt:
    """At most one of the two; `SoftPrompt()` is none.

    embeddings (v, hidden): of virtual tokens (prompt tuning, arXiv 2104.08691).
    keys_values: for each layer, (1, kv_heads, v, head_dim) each (prefix tuning, arXiv 2101.00190).
    """

    embeddings: Tensor | None = None
    keys_values: list[KeysValues] | None = None

    @property
    def virtual_tokens(self) -> int:
        """Virtual tokens in the row itself; 0 for a prefix, which is in the keys only."""
        return 0 if self.embeddings is None else len(self.embeddings)

    @property
    def prefix_length(self) -> int:
        """Keys before the row, which is also the position of its first token; 0 without a prefix."""
        return 0 if self.keys_values is None else self.keys_values[0][0].shape[2]

    @property
    def length(self) -> int:
        """Positions taken before every prompt."""
        return self.virtual_tokens + self.prefix_length

    def prepend(self, words: Tensor) -> Tensor:
        """(T, hidden) embeddings of a prompt -> (virtual_tokens + T, hidden), in their dtype."""
        return words if self.embeddings is None else torch.cat([self.embeddings.to(words.dtype), words])

    def layer(self, layer: int, dtype: torch.dtype) -> KeysValues | None:
        """The prefix of one layer in `dtype`."""
        if self.keys_values is None:
            return None
        key, value = self.keys_values[layer]
        return key.to(dtype), value.to(dtype)


NO_SOFT_PROMPT = SoftPrompt()
