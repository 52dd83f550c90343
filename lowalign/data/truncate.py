"""Shorten or split Examples that are longer than the limit."""

from dataclasses import replace

from lowalign.data.example import Example


def fit(example: Example, max_length: int, bos_ids: list[int]) -> tuple[Example | None, str | None]:
    """-> the Example shortened so that its prompt with its longest completion has at most `max_length` tokens, and what
    was cut: "prompt", "completion" or None.

    The prompt is cut from the left, except `bos_ids`, until the longest completion fits. Completions that are too long
    even without a prompt are cut on the right. None for the Example: a completion has no supervised token left.
    """
    cut = None
    prompt, longest = example.prompt, max(map(len, example.completions))
    if len(prompt) + longest > max_length:
        bos = bos_ids if prompt[: len(bos_ids)] == bos_ids else []
        cut = "prompt"
        if longest > max_length:
            longest = max_length - len(bos)
            cut = "completion"
        room = max_length - longest
        # A completion of exactly max_length tokens keeps its end of turn and loses bos.
        bos = bos if len(bos) <= room else []
        rest = prompt[len(bos) :]
        prompt = bos + rest[len(rest) - (room - len(bos)) :]
        example = replace(_begin(example, longest), prompt=prompt)
    return (example if all(any(example.mask(i)) for i in range(len(example.completions))) else None), cut


def _begin(example: Example, tokens: int) -> Example:
    cut = lambda lists: None if lists is None else [values[:tokens] for values in lists]  # noqa: E731
    lists = {name: cut(getattr(example, name)) for name in ("completions", "masks", "token_weights")}
    return replace(example, **lists)


def whole_turns(example: Example, max_length: int) -> Example | None:
    """The Example up to the last supervised turn of its completion that ends within `max_length` tokens; None when not even
    the first one does."""
    room = max_length - len(example.prompt)
    end = max((end for end in turn_ends(example) if end <= room), default=0)
    return up_to(example, end) if end else None


def turn_ends(example: Example) -> list[int]:
    """The lengths of the completion at which its supervised turns end."""
    mask = [*example.masks[0], False]
    return [i + 1 for i in range(len(mask) - 1) if mask[i] and not mask[i + 1]]


def up_to(example: Example, end: int) -> Example:
    """The Example with the first `end` tokens of its completion."""
    return _begin(example, end)


def chunks(document: Example, max_length: int) -> list[Example]:
    """Split a document into consecutive Examples of at most `max_length` tokens; each token is supervised in one of them.

    Each begins with bos as the document does. Without bos, its prompt is the one token before it.
    """
    bos, ids = document.prompt, document.completions[0]
    pieces, start = [], 0
    while start < len(ids):
        prompt = bos or ids[start - 1 : start] if start else bos
        piece = ids[start : start + max_length - len(prompt)]
        pieces.append(Example(list(prompt), [piece], [[True] * len(piece)]))
        start += len(piece)
    return pieces
