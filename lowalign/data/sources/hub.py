"""Rows of Hub datasets, and of folders that `Dataset.save_to_disk` wrote. No code of a dataset is ever run."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from lowalign.data.sources.row import Row
from lowalign.errors import UserError

SPLIT = r"(?P<split>[\w.-]+)(?P<slice>\[[\d%:-]*\])?"
HUB_ID = re.compile(rf"(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<subset>[\w.-]+)(?=:))?(:{SPLIT})?(@(?P<revision>[\w./-]+))?")
SAVED = re.compile(rf"(?P<folder>.+?)(:{SPLIT})?")
BATCH = 500  # rows


@dataclass(frozen=True)
class HubSource:
    """NAME[:SUBSET][:SPLIT][@REVISION]; SPLIT may have a slice, as train[:1000]. The default split is train."""

    name: str

    @property
    def parts(self) -> dict[str, str | None]:
        """name, subset, split (with its slice) and revision."""
        match = HUB_ID.fullmatch(self.name)
        split = (match["split"] or "train") + (match["slice"] or "")
        return {"name": match["name"], "subset": match["subset"], "split": split, "revision": match["revision"]}

    def rows(self, limit: int | None = None) -> Iterator[Row]:
        """The rows, numbered from 1 in the split or slice. Raises UserError where the dataset cannot be loaded."""
        import datasets

        parts = self.parts
        try:
            rows = datasets.load_dataset(
                parts["name"],
                parts["subset"],
                split=parts["split"],
                revision=parts["revision"],
                trust_remote_code=False,
            )
        except Exception as error:  # the Hub, the network and dataset builders raise many types
            raise UserError(
                f"{self.name}: no such file, and as a Hub dataset (NAME:SUBSET:SPLIT@REVISION) it cannot be loaded "
                f"({type(error).__name__}: {_reason(error)})"
            ) from error
        where = ":".join(filter(None, (parts["name"], parts["subset"], parts["split"])))
        yield from dataset_rows(rows, where, limit)


@dataclass(frozen=True)
class SavedSource:
    """A folder that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote: FOLDER or FOLDER:SPLIT."""

    folder: Path
    split: str | None

    def rows(self, limit: int | None = None) -> Iterator[Row]:
        """The rows, numbered from 1. Raises UserError for a split that is not there, and for a damaged folder."""
        import datasets

        split, _, part = (self.split or "").partition("[")
        try:
            loaded = datasets.load_from_disk(str(self.folder))
        except Exception as error:  # whatever a damaged folder makes it raise
            raise UserError(f"{self.folder}: the saved dataset cannot be loaded ({_reason(error)})") from error
        if isinstance(loaded, datasets.DatasetDict):
            split = split or "train"
            if split not in loaded:
                raise UserError(
                    f"{self.folder} has no split {split}; write {self.folder}:SPLIT, of {', '.join(loaded)}"
                )
            loaded = loaded[split]
        elif split not in ("", "train", str(loaded.split)):
            raise UserError(f"{self.folder} has no split {split}: it is one dataset; write {self.folder}")
        if part:
            start, stop = _bounds(part.removesuffix("]"), len(loaded), self.split)
            loaded = loaded.select(range(start, stop))
        yield from dataset_rows(loaded, f"{self.folder}:{self.split}" if self.split else str(self.folder), limit)


def dataset_rows(rows: Any, where: str, limit: int | None = None) -> Iterator[Row]:
    """The rows of a datasets.Dataset as plain values: images and audio stay encoded, so that nothing decodes them."""
    batches = rows.with_format("arrow").iter(BATCH)
    plain = (data for batch in batches for data in batch.to_pylist())
    for number, data in enumerate(islice(plain, limit), 1):
        yield Row(data, where, number)


def saved_source(name: str) -> SavedSource | None:
    """The folder of a saved dataset in FOLDER or FOLDER:SPLIT; None where there is none."""
    match = SAVED.fullmatch(name)
    folder = Path(match["folder"]).expanduser() if match else None
    if folder is None or not any((folder / file).is_file() for file in ("dataset_dict.json", "state.json")):
        return None
    return SavedSource(folder, (match["split"] or "") + (match["slice"] or "") or None)


def _bounds(part: str, total: int, split: str | None) -> tuple[int, int]:
    """The begin and end of a slice: rows, or shares as 10%."""
    ends = [end.strip() for end in part.split(":")]
    try:
        if len(ends) != 2:
            raise ValueError
        numbers = [int(total * int(e[:-1]) / 100) if e.endswith("%") else int(e) for e in ends if e]
    except ValueError as error:
        raise UserError(f"{split}: write a slice as [START:STOP], in rows or per cent") from error
    begin = numbers.pop(0) if ends[0] else 0
    return slice(begin, numbers[0] if numbers else None).indices(total)[:2]


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
