"""The report on the rows that were read: counts and lengths, as JSON and as text."""

import heapq
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lowalign.data.example import Example
from lowalign.data.record import hash_of
from lowalign.data.rows.votes import agreement

LONGEST = 5  # rows that are named
PLACES = 5  # of each reason why rows are dropped
SPAN_END = re.compile(rb"\x01(?!\x01)")  # in a mask as bytes


class FileStats:
    """Counts over the rows of one file. Lengths are those before truncation."""

    def __init__(self, file: str):
        self.file = file
        self.rows = self.used = self.examples = self.tokens = self.supervised = 0
        self.turns = self.ended = 0
        self.formats: Counter[str] = Counter()
        self.prompt_formats: Counter[str] = Counter()
        self.ignored: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()
        self.cut: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()
        self.first_dropped: dict[str, list[str]] = {}  # by reason
        self.verdicts: list[dict[str, str]] = []  # for each pair of answers {annotator: verdict}
        self.where = ""  # of the row that is measured
        self._longest: list[tuple[int, str]] = []  # a heap
        self._lengths: dict[str, Counter[int]] = {name: Counter() for name in ("prompt", "completion", "total")}
        self._contents = array("Q")  # hashes of what each row became

    def measure(self, example: Example) -> None:
        """Count the lengths of an Example before truncation."""
        prompt, completions = len(example.prompt), [len(completion) for completion in example.completions]
        self._lengths["prompt"][prompt] += 1
        self._lengths["completion"].update(completions)
        total = prompt + max(completions)
        self._lengths["total"][total] += 1
        self._add_longest(total, self.where)

    def drop(self, where: str, reason: str) -> None:
        """Count a row that is left out."""
        self._drop(reason, 1, [where])

    def add(self, examples: Sequence[Example], facts: np.ndarray, end_ids: set[int], document: bool, rows: int) -> None:
        """Count the Examples of one row, or of a group of `rows`. facts: theirs. document: they are parts of one text, which ends
        once."""
        self.used += rows
        self.examples += len(examples)
        self.tokens += int(facts["tokens"].sum())
        self.supervised += int(facts["supervised"].sum())
        turns, ended = count_turns(examples[-1:] if document else examples, end_ids)
        self.turns, self.ended = self.turns + turns, self.ended + ended
        self._contents.append(hash_of(facts["content"].tobytes()))

    def merge(self, later: "FileStats") -> None:
        """Add the counts of rows further down in the same file."""
        for name in ("rows", "used", "examples", "tokens", "supervised", "turns", "ended"):
            setattr(self, name, getattr(self, name) + getattr(later, name))
        for name in ("formats", "prompt_formats", "ignored", "notes", "cut"):
            getattr(self, name).update(getattr(later, name))
        for reason, count in later.dropped.items():
            self._drop(reason, count, later.first_dropped[reason])
        self.verdicts += later.verdicts
        for total, where in later._longest:
            self._add_longest(total, where)
        for name, counts in later._lengths.items():
            self._lengths[name].update(counts)
        self._contents.extend(later._contents)

    def _drop(self, reason: str, count: int, places: Sequence[str]) -> None:
        self.dropped[reason] += count
        first = self.first_dropped.setdefault(reason, [])
        first += places[: PLACES - len(first)]

    def _add_longest(self, total: int, where: str) -> None:
        heapq.heappush(self._longest, (total, where))
        if len(self._longest) > LONGEST:
            heapq.heappop(self._longest)

    def as_dict(self, bad: int) -> dict[str, Any]:
        """The counts as JSON."""
        return {
            "file": self.file,
            "rows": self.rows,
            "shapes": dict(self.formats),
            "prompt_formats": dict(self.prompt_formats),
            "used": self.used,
            "examples": self.examples,
            "bad": bad,
            "dropped": {why: {"rows": rows, "first": self.first_dropped[why]} for why, rows in self.dropped.items()},
            "cut": dict(self.cut),
            "lengths": {name: spread_of(counts) for name, counts in self._lengths.items()},
            "histogram": histogram(self._lengths["total"]),
            "longest": [[where, tokens] for tokens, where in sorted(self._longest, reverse=True)],
            "tokens": self.tokens,
            "supervised_tokens": self.supervised,
            "end_of_turn": {"turns": self.turns, "ended": self.ended},
            "duplicates": len(self._contents) - len(np.unique(np.frombuffer(self._contents, np.uint64))),
            "ignored_columns": dict(self.ignored),
            "notes": dict(self.notes),
            **({"agreement": agreement(self.verdicts)} if self.verdicts else {}),
        }


def count_turns(examples: Iterable[Example], end_ids: set[int]) -> tuple[int, int]:
    """-> the number of supervised spans, and of those that end in one of `end_ids`."""
    turns = ended = 0
    for example in examples:
        for ids, mask in zip(example.completions, example.masks, strict=True):
            ends = [match.start() for match in SPAN_END.finditer(bytes(mask))]
            turns += len(ends)
            ended += sum(ids[i] in end_ids for i in ends)
    return turns, ended


def spread(values: Iterable[int]) -> dict[str, int]:
    """Minimum, median, 95th percentile (nearest rank) and maximum; empty for no values."""
    return spread_of(Counter(values))


def spread_of(counts: Mapping[int, int]) -> dict[str, int]:
    """As spread. counts: how often there is each value."""
    if not counts:
        return {}
    ordered = sorted(counts)
    ends = np.cumsum([counts[value] for value in ordered])
    percentile = lambda p: ordered[int(np.searchsorted(ends, max(1, -(-int(ends[-1]) * p // 100))))]  # noqa: E731
    return {"min": ordered[0], "median": percentile(50), "p95": percentile(95), "max": ordered[-1]}


def histogram(values: Mapping[int, int]) -> list[list[int]]:
    """[upper bound, how many are above the bound before and at most this] by powers of two, without gaps. values: how often
    there is each."""
    counts: Counter[int] = Counter()
    for value, count in values.items():
        counts[(value - 1).bit_length() if value > 0 else 0] += count
    return [[2**k, counts[k]] for k in range(min(counts), max(counts) + 1)] if counts else []


def merge_reports(files: Sequence[dict[str, Any]], max_length: int, heldout: bool) -> dict[str, Any]:
    """The report over all files: sums, and the reports of the files."""
    sums = {k: sum(f[k] for f in files) for k in ("rows", "used", "examples", "bad", "tokens", "supervised_tokens")}
    sums["dropped"] = sum(reason["rows"] for f in files for reason in f["dropped"].values())
    sums["cut"] = sum(sum(f["cut"].values()) for f in files)
    sums["prompt_formats"] = dict(sum((Counter(f["prompt_formats"]) for f in files), Counter()))
    sums["end_of_turn"] = {k: sum(f["end_of_turn"][k] for f in files) for k in ("turns", "ended")}
    return {"heldout": heldout, "max_length": max_length, **sums, "files": list(files)}


def report_lines(report: dict[str, Any]) -> list[str]:
    """The report as lines of text, file by file."""
    lines = [line for file in report["files"] for line in _file_lines(file, report["max_length"])]
    if asked := report.get("max_length_asked"):
        lines.append(
            f"a row has at most {report['max_length']:,} tokens, the base's positions, not the {asked:,} of --data.max-length"
        )
    return lines


def _file_lines(file: dict[str, Any], max_length: int) -> list[str]:
    counts = file["shapes"]
    each = (
        list(counts) if list(counts.values()) == [file["rows"]] else [f"{n:,} {shape}" for shape, n in counts.items()]
    )
    shapes = ", ".join(each) or "no known shape"
    lines = [f"{file['file']}: {file['rows']:,} rows ({shapes}), {file['used']:,} used"]
    if file["examples"] != file["used"]:
        lines.append(f"  {file['examples']:,} examples from them")
    if plain := file["prompt_formats"].get("text"):
        lines.append(
            f"  {plain:,} rows are plain text, without the chat template (--data.prompt-format chat: turns of a chat)"
        )
    for name, lengths in file["lengths"].items():
        if lengths:
            numbers = ", ".join(f"{label} {count:,}" for label, count in lengths.items())
            lines.append(f"  tokens, {name}: {numbers}")
    if file["used"]:
        turns = file["end_of_turn"]
        lines.append(f"  supervised: {file['supervised_tokens']:,} of {file['tokens']:,} tokens")
        lines.append(f"  end of turn in loss: {turns['ended']:,}/{turns['turns']:,}")
    of_rows = f"of {file['rows']:,} rows"
    longest = f"longest {file['lengths']['total'].get('max', 0):,} > {max_length:,} tokens"
    cuts = {"prompt": "cut in the prompt", "completion": "cut in the completion", "chunked": "split"}
    cuts["turns"] = "without the turns at the end that do not fit"
    lines += [f"  {count:,} {of_rows} {cuts[kind]}, {longest}" for kind, count in file["cut"].items()]
    if file["bad"]:
        lines.append(f"  {file['bad']:,} {of_rows} bad")
    for reason, places in file["dropped"].items():
        lines.append(f"  {places['rows']:,} {of_rows} dropped: {reason} (first: {', '.join(places['first'])})")
    if file["duplicates"]:
        lines.append(f"  {file['duplicates']:,} {of_rows} repeat an earlier one")
    if file["ignored_columns"]:
        lines.append(f"  columns not used: {', '.join(file['ignored_columns'])}")
    if "agreement" in file:
        lines += _agreement_lines(file["agreement"])
    return lines + [f"  {count:,} {of_rows}: {note}" for note, count in file["notes"].items()]


def _agreement_lines(figures: dict[str, Any]) -> list[str]:
    lines = [
        f"  {figures['verdicts']:,} verdicts of {figures['annotators']:,} annotators on {figures['pairs']:,} pairs"
    ]
    if figures["agreement"] is not None:
        lines.append(f"  two annotators of a pair agree: {figures['agreement']:.1%}")
    if figures["alpha"] is not None:
        lines.append(f"  Krippendorff's alpha: {figures['alpha']:.3f} (1: always agreed, 0: as by chance)")
    return lines
