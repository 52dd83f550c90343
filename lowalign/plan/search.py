"""The largest value that fits in memory, by dry runs."""

from collections.abc import Callable


def largest(memory: Callable[[int], int], limit: int, low: int, high: int, grain: int) -> int | None:
    """The largest multiple of `grain` between low and high whose memory(n), which grows with n, is at most `limit`.

    None when even low does not fit. Memory grows nearly linearly, so a line through the two nearest known points says
    where to look, and few values of memory(n) are computed.
    """
    known: dict[int, int] = {}

    def fits(n: int) -> bool:
        known[n] = memory(n)
        return known[n] <= limit

    low, high = -(-low // grain), high // grain  # in grains
    if high < low or not fits(low * grain):
        return None
    if fits(high * grain):
        return high * grain
    while high - low > 1:
        a, b = low * grain, high * grain
        guess = low + (high - low) * (limit - known[a]) // max(1, known[b] - known[a])
        # A guess at the edge is one grain off at most: ask for the neighbour, which closes the interval.
        n = min(max(guess, low + 1), high - 1)
        if fits(n * grain):
            low = n
        else:
            high = n
    return low * grain
