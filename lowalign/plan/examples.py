"""Examples of a given length, as a command's micro-batch has them. Their tokens have no meaning."""

from lowalign.data.pack import Example


def tokens(count: int, vocabulary: int) -> list[int]:
    """`count` token ids of a vocabulary, none of which is among its first three."""
    return [3 + 7 * i % (vocabulary - 3) for i in range(count)]


def conversation(length: int, vocabulary: int) -> Example:
    """For SFT: `length` tokens, the second half supervised."""
    ids = tokens(length, vocabulary)
    return Example(ids[: length // 2], [ids[length // 2 :]])


def preference(length: int, vocabulary: int) -> Example:
    """A pair: prompt and completion have `length` tokens together, half of them each."""
    ids = tokens(length, vocabulary)
    answer = ids[length // 2 :]
    return Example(ids[: length // 2], [answer, answer[::-1]], rank=[0, 1])


def rated(length: int, vocabulary: int, label: bool) -> Example:
    """For KTO: one completion with a thumb up or down."""
    ids = tokens(length, vocabulary)
    return Example(ids[: length // 2], [ids[length // 2 :]], label=label)


def as_many_as_fit(example: Example, token_budget: int, at_least: int = 1) -> list[Example]:
    """A micro-batch of this Example, again and again."""
    return [example] * max(at_least, token_budget // example.length)
