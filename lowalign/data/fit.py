"""What is done with rows longer than they may be."""

from lowalign.data.pack import Example


def fit(example: Example, max_length: int, front: list[int]) -> tuple[Example | None, str | None]:
    """An Example of one completion in at most `max_length` tokens, and what was cut: "prompt", "completion" or None.

    The prompt is cut from the left, all but `front` (bos). A completion that is too long even without a prompt is cut on
    the right. None in place of an Example: no supervised token is left.
    """
    cut = None
    if example.length > max_length:
        prompt, completion, mask = example.prompt, example.completions[0], example.mask(0)
        kept = front if prompt[: len(front)] == front else []
        cut = "prompt"
        if len(completion) > max_length:
            completion, mask = completion[: max_length - len(kept)], mask[: max_length - len(kept)]
            cut = "completion"
        room = max_length - len(completion)
        # A completion of just max_length goes without bos rather than without its end of turn.
        kept = kept if len(kept) <= room else []
        tail = prompt[len(kept) :]
        prompt = kept + tail[len(tail) - (room - len(kept)) :]
        example = Example(prompt, [completion], [mask])
    return (example if example.supervised else None), cut


def chunks(document: Example, max_length: int) -> list[Example]:
    """Consecutive stretches of a document of at most `max_length` tokens, each token supervised in one of them.

    Every stretch begins like the document does: after bos, or, where there is none, after the token before it.
    """
    front, ids = document.prompt, document.completions[0]
    found, at = [], 0
    while at < len(ids):
        prompt = front or ids[at - 1 : at] if at else front
        taken = ids[at : at + max_length - len(prompt)]
        found.append(Example(list(prompt), [taken], [[True] * len(taken)]))
        at += len(taken)
    return found
