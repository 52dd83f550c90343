"""One batch of the sampler in a dry run: the prompts, and a token at each size of the cache."""

import itertools

from lowalign.model.attention.sampler_cache import ROOM
from lowalign.model.sampling.batcher import SampleBatcher


class PlannedSampler(SampleBatcher):
    """A batcher whose forwards are computed one by one, for samples of any length so far."""

    def start(self) -> None:
        """Compute the prompts of the first batch, and draw the first token of each sample."""
        self._start(self._admit())

    def token(self, generated: int) -> None:
        """Compute one more token of samples that have `generated` tokens."""
        for row in self.rows:
            row.ids = [0] * generated
        self._append(self.rows, self._next_logits())

    def lengths(self) -> dict[int, float]:
        """Tokens so far -> the number of tokens that a forward at this length stands for.

        The lengths are those at which the buffers of keys have grown, in order, and the last one.
        """
        last = max(row.prompt.limit for row in self.rows) - 1
        if not last:
            return {}
        grown = [1]
        while max(ROOM, 2 * (grown[-1] - 1)) < last:
            grown.append(max(ROOM, 2 * (grown[-1] - 1)) + 1)
        points = sorted({*grown, last})
        # The cost grows linearly between two of them: half of the tokens for each.
        halves = [(b - a) / 2 for a, b in itertools.pairwise(points)]
        return {n: a + b for n, a, b in zip(points, [1.0, *halves], [*halves, 0.0], strict=True)}
