"""What the page asks for and sends: the next item, judgements, undo. Everything that it sends is checked here."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lowalign.data.rows.answers import as_text
from lowalign.data.rows.turns import Prompt
from lowalign.labelling.items import Item
from lowalign.labelling.judgements import Judgements

LONGEST_NAME = 60  # characters of an annotator's name
BEST_RATING = 5


class BadRequest(Exception):
    """What the page sent cannot be used; the text says why."""


@dataclass(frozen=True)
class Labelling:
    """The items, what was judged so far, and how: "pick" the best, "rank" all, or "rate" each. annotator: the name that the
    page proposes."""

    items: Sequence[Item]
    judgements: Judgements
    mode: str
    annotator: str = ""
    _by_key: dict[str, Item] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._by_key.update({item.key: item for item in self.items})

    def next(self, request: dict[str, Any]) -> dict[str, Any]:
        """What the page of an annotator shows: the first item that it has not judged (None: none is left), and the counts."""
        name = _name(request)
        done = self.judgements.of(name)
        item = next((item for item in self.items if item.key not in done), None)
        own = [done[item.key]["do"] for item in self.items if item.key in done]
        shown = None
        if item is not None:
            answers = [item.answers[k] for k in item.order(name)]
            shown = {"key": item.key, "prompt": _turns(item.prompt), "answers": list(map(_answer, answers))}
        counts = {"judged": own.count("judge"), "skipped": own.count("skip"), "total": len(self.items)}
        return {"annotator": name, "mode": self.mode, "item": shown, "can_undo": bool(own), **counts}

    def judge(self, request: dict[str, Any]) -> dict[str, Any]:
        """Keep a judgement or a skip, then answer as `next` does."""
        name, item = _name(request), self._item(request)
        if request.get("skip") is True:
            kept = self.judgements.skip(item, name)
        else:
            order = item.order(name)
            ranks = _numbers(request.get("ranks"), len(order), len(order), "ranks")
            ratings = request.get("ratings")
            ratings = [] if ratings is None else _numbers(ratings, len(order), BEST_RATING, "ratings")
            edit = _edit(request.get("edit"), item, order)
            place = {k: shown for shown, k in enumerate(order)}
            own = [[values[place[k]] for k in range(len(order))] if values else [] for values in (ranks, ratings)]
            kept = self.judgements.judge(item, name, own[0], edit, own[1])
        return self.next(request) | ({} if kept else {"repeated": True})

    def undo(self, request: dict[str, Any]) -> dict[str, Any]:
        """Take the last one back, then answer as `next` does."""
        self.judgements.undo(_name(request))
        return self.next(request)

    def _item(self, request: dict[str, Any]) -> Item:
        item = self._by_key.get(request.get("item")) if isinstance(request.get("item"), str) else None
        if item is None:
            raise BadRequest("there is no such item; reload the page")
        return item


def _turns(prompt: Prompt) -> list[dict[str, str]]:
    """The prompt as the page shows it: a text has no role."""
    if isinstance(prompt, str):
        return [{"role": "", "text": prompt}]
    return [{"role": turn["role"], "text": as_text([turn | {"role": "assistant"}])} for turn in prompt]


def _answer(answer: Prompt) -> dict[str, Any]:
    """editable: a single text, which another text can replace."""
    return {"text": as_text(answer), "editable": isinstance(answer, str) or _is_plain(answer)}


def _is_plain(turns: list[dict[str, Any]]) -> bool:
    return len(turns) == 1 and turns[0].keys() <= {"role", "content"}


def _name(request: dict[str, Any]) -> str:
    name = request.get("annotator")
    name = name.strip() if isinstance(name, str) else ""
    if not name or len(name) > LONGEST_NAME or not name.isprintable():
        raise BadRequest(f"the name of an annotator has 1 to {LONGEST_NAME} characters")
    return name


def _numbers(values: Any, count: int, most: int, what: str) -> list[int]:
    valid = isinstance(values, list) and len(values) == count and all(type(v) is int and 1 <= v <= most for v in values)
    if not valid:
        raise BadRequest(f"{what}: {count} numbers from 1 to {most}")
    return values


def _edit(value: Any, item: Item, order: Sequence[int]) -> tuple[int, str] | None:
    """(number of the answer, its text) from the place where it is shown."""
    if value is None:
        return None
    place, text = (value.get("answer"), value.get("text")) if isinstance(value, dict) else (None, None)
    if type(place) is not int or not 0 <= place < len(order) or not isinstance(text, str) or not text.strip():
        raise BadRequest("an edited answer needs its place and a text")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise BadRequest("the edited answer has half a character; edit it again")
    k = order[place]
    if not _answer(item.answers[k])["editable"]:
        raise BadRequest("an answer with tool calls or several turns cannot be edited")
    if text in map(as_text, item.answers):
        raise BadRequest("the edited answer equals one that is shown; change it, or pick that one")
    return k, text
