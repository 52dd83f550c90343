"""Judgements on disk. Each one is there before the next item is shown.

.OUT.run/judgements.jsonl   everything that annotators did: judge, skip, undo; only ever appended to
OUT                         the rows that follow from it, for `lowalign reward` and `lowalign dpo`

Two answers make a row of verdicts (completion_a, completion_b, annotator, verdict), so that the votes of several annotators on
a pair are one example. More answers, or an edited one, make a row of a ranking (completions, ranks).
"""

import threading
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lowalign.data.rows.turns import Prompt, as_messages
from lowalign.durable import json_line, write_jsonl
from lowalign.errors import UserError
from lowalign.labelling.items import Item
from lowalign.train.run_folder import Journal

Event = dict[str, Any]  # do: judge, skip or undo; annotator, item, at; of judge: ranks, order and row too


class Judgements:
    """What every annotator did, in order. Safe to call from several threads."""

    def __init__(self, out: Path, folder: Path) -> None:
        """Read what is there, and write OUT from it. Raises UserError when OUT holds anything else."""
        self.out = out
        self._journal = Journal(folder / "judgements.jsonl")
        self._journal.keep(len(self._journal.lines))  # without a line that a kill left incomplete
        self._rows: Journal | None = None  # OUT; None: to be written again
        self._lock = threading.Lock()
        self._done: dict[str, dict[str, Event]] = {}  # by annotator, then by item
        if _has_other_rows(out, self._journal.lines):
            raise UserError(f"{out} exists and holds no judgements of lowalign label; choose another --out")
        for event in self._journal.lines:
            self._apply(event)
        self._rewrite()

    @property
    def annotators(self) -> list[str]:
        """Those with a judgement or a skip."""
        return [name for name, done in list(self._done.items()) if done]  # another thread may add one

    def of(self, annotator: str) -> dict[str, Event]:
        """The judgements and skips of one, by key of the item, in order of time."""
        return dict(self._done.get(annotator, {}))

    def judge(
        self, item: Item, annotator: str, ranks: Sequence[int], edit: tuple[int, str] | None, ratings: Sequence[int]
    ) -> bool:
        """Keep a judgement. ranks: of each answer, 1 for the best, equal ranks tie. edit: number of the answer that was made
        better, and its text. ratings: of each answer, or empty. False: the annotator has judged this item already."""
        row = row_of(item, annotator, ranks, edit, ratings)
        event = {
            "do": "judge",
            "ranks": list(ranks),
            "order": item.order(annotator),
            "edited": edit is not None,
            "row": row,
        }
        return self._keep(item.key, annotator, event)

    def skip(self, item: Item, annotator: str) -> bool:
        """Show the item no more. False: the annotator has judged it already."""
        return self._keep(item.key, annotator, {"do": "skip"})

    def undo(self, annotator: str) -> str | None:
        """Take back the last judgement or skip of the annotator -> the key of its item; None where there is none."""
        with self._lock:
            done = self._done.get(annotator)
            if not done:
                return None
            key = next(reversed(done))
            self._write({"do": "undo", "annotator": annotator, "item": key, "at": _now()})
            self._rewrite()
            return key

    def close(self) -> None:
        """Wait until the judgement that is being written is on the disk; later ones are never written."""
        self._lock.acquire()

    def _keep(self, key: str, annotator: str, event: Event) -> bool:
        with self._lock:
            if key in self._done.get(annotator, {}):
                return False
            event = {"do": event["do"], "annotator": annotator, "item": key, "at": _now(), **event}
            self._write(event)
            if "row" in event:
                self._add_row(event["row"])
            return True

    def _write(self, event: Event) -> None:
        try:
            self._journal.add([event])
        except UserError:
            self._journal.keep(len(self._journal.lines))  # nothing can be read behind half a line
            raise
        self._apply(event)

    def _add_row(self, row: dict[str, Any]) -> None:
        """Append a row whose event is on the disk. When that fails, the next judgement writes OUT again."""
        if self._rows is None:
            self._rewrite()
            return
        try:
            self._rows.add([row])
        except UserError:
            self._rows = None
            raise

    def _apply(self, event: Event) -> None:
        done = self._done.setdefault(event["annotator"], {})
        if event["do"] == "undo":
            done.pop(event["item"], None)
        else:
            done[event["item"]] = event

    def _rewrite(self) -> None:
        """OUT from the judgements that hold, in the order of their time."""
        events = [event for done in self._done.values() for event in done.values() if "row" in event]
        write_jsonl(self.out, [event["row"] for event in sorted(events, key=lambda event: event["at"])])
        self._rows = Journal(self.out)


def _has_other_rows(out: Path, events: Sequence[Event]) -> bool:
    """Whether OUT has a line that follows from none of the events, but for a last one that a kill left incomplete."""
    lines = out.read_bytes().splitlines(keepends=True) if out.exists() else []
    written = {json_line(event["row"]).encode() for event in events if "row" in event}
    return bool(lines) and (not events or any(line.endswith(b"\n") and line not in written for line in lines))


def row_of(
    item: Item, annotator: str, ranks: Sequence[int], edit: tuple[int, str] | None = None, ratings: Sequence[int] = ()
) -> dict[str, Any]:
    """The row of a judgement. An edited answer is above all others."""
    answers, ranks, policies = list(item.answers), list(ranks), list(item.policies)
    known = {"annotator": annotator, "source": item.source}
    if len(answers) == 2 and edit is None:
        verdict = "tie" if ranks[0] == ranks[1] else "a" if ranks[0] < ranks[1] else "b"
        row = {"prompt": item.prompt, "completion_a": answers[0], "completion_b": answers[1], "verdict": verdict}
        return (
            row | known | ({"policies": policies} if policies else {}) | ({"ratings": list(ratings)} if ratings else {})
        )
    if edit is not None:
        text = edit[1]
        edited: Prompt = text if isinstance(item.prompt, str) else as_messages(text, "assistant")
        answers, ranks = [edited, *answers], [0, *ranks]
        policies = [annotator, *policies] if policies else []
    best_first = sorted(range(len(answers)), key=lambda k: ranks[k])
    levels = {rank: i for i, rank in enumerate(sorted(set(ranks)), 1)}
    row = {
        "prompt": item.prompt,
        "completions": [answers[k] for k in best_first],
        "ranks": [levels[ranks[k]] for k in best_first],
        **known,
    }
    if policies:
        row["policies"] = [policies[k] for k in best_first]
    if ratings and edit is None:
        row["ratings"] = [ratings[k] for k in best_first]
    return row | ({"edited": True} if edit is not None else {})


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")
