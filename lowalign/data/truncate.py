"""What is done with rows longer than they may be."""

from dataclasses import replace

from lowalign.data.pack import Example


def fit(example: Example, max_length: int, front: list[int]) -> tuple[Example | None, str | None]:
    """An Example whose prompt and any of its completions together have at most `max_length` tokens, and what was cut:
    "prompt", "completion" or None.

    The prompt is cut from the left, all but `front` (bos), so that the longest completion fits. Completions that are too
    long even without a prompt are cut on the right. None in place of an Example: no supervised token is left in one.
    """
    cut = None
    prompt, longest = example.prompt, max(map(len, example.completions))
    if len(prompt) + longest > max_length:
        kept = front if prompt[: len(front)] == front else []
        cut = "prompt"
        if longest > max_length:
            longest = max_length - len(kept)
            cut = "completion"
        room = max_length - longest
        # A completion of just max_length goes without bos rather than without its end of turn.
        kept = kept if len(kept) <= room else []
        tail = prompt[len(kept) :]
        prompt = kept + tail[len(tail) - (room - len(kept)) :]
        masks = [mask[:longest] for mask in example.masks]
        completions = [completion[:longest] for completion in example.completions]
        example = replace(example, prompt=prompt, completions=completions, masks=masks)
    return (example if all(any(example.mask(i)) for i in range(len(example.completions))) else None), cut


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
