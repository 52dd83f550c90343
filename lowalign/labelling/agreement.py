"""How far annotators agree, and what else their judgements depend on: the place of an answer, and its length."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

from lowalign.data.rows.answers import as_text
from lowalign.data.rows.votes import agreement
from lowalign.labelling.items import Item
from lowalign.labelling.judgements import Event, Judgements

LISTED = 50  # disagreements on the page
SHORT = 300  # characters of a prompt or an answer in the list


def figures(items: Sequence[Item], judgements: Judgements) -> dict[str, Any]:
    """Shares are fractions. agreement and alpha: as in `votes.agreement`, over all two answers of all items.

    annotators: of each, what it judged, and of its verdicts that are no ties the share for the answer that was shown first,
    and for the longer one. pairs: of every two annotators, the verdicts that both gave and the share that is equal. policies:
    of each, the share of its comparisons that it won, a tie for half; only where the answers were sampled.
    """
    by_annotator = {name: judgements.of(name) for name in judgements.annotators}
    verdicts = dict(_verdicts(items, by_annotator))
    both = [(x, y, [v for v in verdicts.values() if x in v and y in v]) for x, y in combinations(by_annotator, 2)]
    return {
        "all": agreement(list(verdicts.values())),
        "annotators": [{"name": name} | _habits(items, done) for name, done in by_annotator.items()],
        "pairs": [
            {"names": [x, y], "verdicts": len(own), "agreement": _share(v[x] == v[y] for v in own)}
            for x, y, own in both
        ],
        "policies": _policies(items, verdicts),
        "disagreements": list(_disagreements(items, verdicts))[:LISTED],
    }


def _verdicts(
    items: Sequence[Item], by_annotator: Mapping[str, Mapping[str, Event]]
) -> Iterator[tuple[tuple[int, int, int], dict[str, str]]]:
    """((number of the item, two of its answers), {annotator: "a", "b" or "tie"}) where there is a verdict."""
    for number, item in enumerate(items):
        ranks = {
            name: done[item.key]["ranks"] for name, done in by_annotator.items() if "ranks" in done.get(item.key, {})
        }
        if ranks:
            for i, j in combinations(range(len(item.answers)), 2):
                yield (number, i, j), {name: _verdict(own[i], own[j]) for name, own in ranks.items()}


def _verdict(a: int, b: int) -> str:
    return "tie" if a == b else "a" if a < b else "b"


def _habits(items: Sequence[Item], done: Mapping[str, Event]) -> dict[str, Any]:
    """What one annotator judged, and how often the better of two answers was shown first, or was the longer one."""
    first, longer, ties, compared = [], [], 0, 0
    for item in items:
        event = done.get(item.key, {})
        for i, j in combinations(range(len(item.answers)), 2) if "ranks" in event else ():
            compared += 1
            best = _verdict(event["ranks"][i], event["ranks"][j])
            if best == "tie":
                ties += 1
                continue
            place = event["order"].index
            first.append((best == "a") == (place(i) < place(j)))
            lengths = [len(as_text(item.answers[k])) for k in (i, j)]
            if lengths[0] != lengths[1]:
                longer.append((best == "a") == (lengths[0] > lengths[1]))
    kinds = [event["do"] for event in done.values()]
    return {
        "judged": kinds.count("judge"),
        "skipped": kinds.count("skip"),
        "edited": sum(event.get("edited", False) for event in done.values()),
        "ties": ties / compared if compared else None,
        "first_shown": _share(first),
        "longer": _share(longer),
    }


def _policies(
    items: Sequence[Item], verdicts: Mapping[tuple[int, int, int], Mapping[str, str]]
) -> list[dict[str, Any]]:
    won: dict[str, list[float]] = {}
    for (number, i, j), given in verdicts.items():
        names = items[number].policies
        for verdict in given.values() if names and names[i] != names[j] else ():
            outcome = {"a": 1.0, "b": 0.0, "tie": 0.5}[verdict]
            won.setdefault(names[i], []).append(outcome)
            won.setdefault(names[j], []).append(1 - outcome)
    shares = [{"name": name, "verdicts": len(own), "won": sum(own) / len(own)} for name, own in won.items()]
    return sorted(shares, key=lambda own: -own["won"])


def _disagreements(
    items: Sequence[Item], verdicts: Mapping[tuple[int, int, int], Mapping[str, str]]
) -> Iterator[dict[str, Any]]:
    for (number, i, j), given in verdicts.items():
        if len(set(given.values())) > 1:
            item = items[number]
            prompt = item.prompt if isinstance(item.prompt, str) else as_text(item.prompt)
            texts = [_short(as_text(item.answers[k])) for k in (i, j)]
            yield {
                "source": item.source,
                "prompt": _short(prompt),
                "a": texts[0],
                "b": texts[1],
                "verdicts": dict(given),
            }


def _short(text: str) -> str:
    return text if len(text) <= SHORT else f"{text[:SHORT]} …"


def _share(values: Any) -> float | None:
    values = list(values)
    return sum(values) / len(values) if values else None
