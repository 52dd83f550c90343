"""What became of the rows, in numbers and in words."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from lowalign.data.pack import Example
from lowalign.data.rows.votes import agreement


class Tally:
    """Counts over the rows of one file. Lengths are those before anything is cut."""

    def __init__(self, file: str):
        self.file = file
        self.rows = self.used = self.examples = self.tokens = self.supervised = 0
        self.turns = self.ended = self.duplicates = 0
        self.shapes: Counter[str] = Counter()
        self.ignored: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()
        self.cut: Counter[str] = Counter()
        self.dropped: dict[str, list[str]] = {}
        self.verdicts: list[dict[str, str]] = []  # for each pair of answers what each annotator said of it
        self._lengths: dict[str, list[int]] = {"prompt": [], "completion": [], "total": []}
        self._seen: set[int] = set()

    def measure(self, example: Example) -> None:
        """Note the lengths of an Example as it was rendered."""
        prompt, completions = len(example.prompt), [len(completion) for completion in example.completions]
        self._lengths["prompt"].append(prompt)
        self._lengths["completion"] += completions
        self._lengths["total"].append(prompt + max(completions))

    def drop(self, where: str, reason: str) -> None:
        """Note that a row is left out."""
        self.dropped.setdefault(reason, []).append(where)

    def add(self, examples: Sequence[Example], end_ids: set[int], document: bool, rows: int) -> None:
        """Note the Examples that came of one row, or of several that belong together. document: they are stretches of
        one text, which ends once."""
        self.used += rows
        self.examples += len(examples)
        for example in examples:
            self.tokens += example.length
            self.supervised += example.supervised
        turns, ended = count_turns(examples[-1:] if document else examples, end_ids)
        self.turns, self.ended = self.turns + turns, self.ended + ended
        content = hash(tuple((tuple(e.prompt), *map(tuple, e.completions), e.label) for e in examples))
        self.duplicates += content in self._seen
        self._seen.add(content)

    def as_dict(self, bad: int) -> dict[str, Any]:
        """The counts as JSON."""
        agreed = {"agreement": agreement(self.verdicts)} if self.verdicts else {}
        return {
            "file": self.file,
            "rows": self.rows,
            "shapes": dict(self.shapes),
            "used": self.used,
            "examples": self.examples,
            "bad": bad,
            "dropped": {why: {"rows": len(places), "first": places[:5]} for why, places in self.dropped.items()},
            "cut": dict(self.cut),
            "lengths": {name: spread(lengths) for name, lengths in self._lengths.items()},
            "tokens": self.tokens,
            "supervised_tokens": self.supervised,
            "end_of_turn": {"turns": self.turns, "ended": self.ended},
            "duplicates": self.duplicates,
            "ignored_columns": dict(self.ignored),
            "notes": dict(self.notes),
            **agreed,
        }


def count_turns(examples: Iterable[Example], end_ids: set[int]) -> tuple[int, int]:
    """How many supervised stretches there are, and how many of them end in one of `end_ids`."""
    turns = ended = 0
    for example in examples:
        for ids, mask in zip(example.completions, example.masks, strict=True):
            last = [i for i, m in enumerate(mask) if m and not (i + 1 < len(mask) and mask[i + 1])]
            turns += len(last)
            ended += sum(ids[i] in end_ids for i in last)
    return turns, ended


def spread(values: Sequence[int]) -> dict[str, int]:
    """Smallest, median, 95th percentile (nearest rank) and largest; empty for no values."""
    if not values:
        return {}
    ordered = sorted(values)
    at = lambda share: ordered[max(0, -(-len(ordered) * share // 100) - 1)]  # noqa: E731
    return {"min": ordered[0], "median": at(50), "p95": at(95), "max": ordered[-1]}


def totals(files: Sequence[dict[str, Any]], max_length: int, heldout: bool) -> dict[str, Any]:
    """The report over all files, with theirs in it."""
    summed = {k: sum(f[k] for f in files) for k in ("rows", "used", "examples", "bad", "tokens", "supervised_tokens")}
    summed["dropped"] = sum(reason["rows"] for f in files for reason in f["dropped"].values())
    summed["cut"] = sum(sum(f["cut"].values()) for f in files)
    summed["end_of_turn"] = {k: sum(f["end_of_turn"][k] for f in files) for k in ("turns", "ended")}
    return {"heldout": heldout, "max_length": max_length, **summed, "files": list(files)}


def report_lines(report: dict[str, Any]) -> list[str]:
    """The report in lines of text, a paragraph for each file."""
    return [line for file in report["files"] for line in _describe_file(file, report["max_length"])]


def _describe_file(file: dict[str, Any], max_length: int) -> list[str]:
    shapes = ", ".join(f"{count:,} {shape}" for shape, count in file["shapes"].items()) or "no known shape"
    lines = [f"{file['file']}: {file['rows']:,} rows ({shapes}), {file['used']:,} used"]
    if file["examples"] != file["used"]:
        lines.append(f"  {file['examples']:,} examples made of them")
    for name, lengths in file["lengths"].items():
        if lengths:
            words = ", ".join(f"{label} {count:,}" for label, count in lengths.items())
            lines.append(f"  tokens, {name}: {words}")
    if file["used"]:
        ends = file["end_of_turn"]
        lines.append(f"  supervised: {file['supervised_tokens']:,} of {file['tokens']:,} tokens")
        lines.append(f"  end of turn in loss: {ends['ended']:,}/{ends['turns']:,}")
    of_rows = f"of {file['rows']:,} rows"
    longest = f"longest {file['lengths']['total'].get('max', 0):,} > {max_length:,} tokens"
    cuts = {"prompt": "cut in the prompt", "completion": "cut in the completion", "chunked": "split"}
    lines += [f"  {count:,} {of_rows} {cuts[what]}, {longest}" for what, count in file["cut"].items()]
    if file["bad"]:
        lines.append(f"  {file['bad']:,} {of_rows} bad")
    for reason, places in file["dropped"].items():
        lines.append(f"  {places['rows']:,} {of_rows} dropped: {reason} (first: {', '.join(places['first'])})")
    if file["duplicates"]:
        lines.append(f"  {file['duplicates']:,} {of_rows} repeat an earlier one")
    if file["ignored_columns"]:
        lines.append(f"  columns not used: {', '.join(file['ignored_columns'])}")
    if "agreement" in file:
        lines += _describe_agreement(file["agreement"])
    return lines + [f"  {count:,} {of_rows}: {note}" for note, count in file["notes"].items()]


def _describe_agreement(found: dict[str, Any]) -> list[str]:
    lines = [f"  {found['verdicts']:,} verdicts of {found['annotators']:,} annotators on {found['pairs']:,} pairs"]
    if found["agreement"] is not None:
        lines.append(f"  two annotators of a pair agree: {found['agreement']:.1%}")
    if found["alpha"] is not None:
        lines.append(f"  Krippendorff's alpha: {found['alpha']:.3f} (1: always agreed, 0: as by chance)")
    return lines
