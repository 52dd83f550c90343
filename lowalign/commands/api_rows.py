"""The rows that the functions of lowalign.commands.api are given, as files of the run's folder."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from lowalign.durable import file_hash, write_jsonl
from lowalign.errors import UserError
from lowalign.train import checkpoint

Data = str | Path | Iterable  # a file or Hub id, several, rows, or a datasets.Dataset


def with_files(given: dict[str, Any], out: Path) -> dict[str, Any]:
    """The options, with the rows of `data` and `eval` in files under `out`. Raises UserError for rows that are none, and for
    other rows than those of the run that `out` holds."""
    files = {key: _files(given[key], out / f"{key}.jsonl") for key in ("data", "eval") if key in given}
    return {**given, **files, "out": out}


def _files(data: Data, file: Path) -> list[str]:
    """The files that hold the data; rows are written to `file`."""
    if isinstance(data, str | Path):
        return [str(data)]
    if hasattr(data, "to_parquet"):  # a datasets.Dataset, which may be larger than memory; its types are kept
        return _written(file.with_suffix(".parquet"), lambda path: data.to_parquet(str(path)))
    if isinstance(data, Mapping):
        raise UserError(f"data has the splits {', '.join(map(str, data))}: give one of them, such as data['train']")
    items = list(data)
    if all(isinstance(item, str | Path) for item in items):
        return [str(item) for item in items]
    if not all(isinstance(item, Mapping) for item in items):
        raise UserError("data is a file, several files, or rows: dictionaries such as {'prompt': …, 'completion': …}")
    return _written(file, lambda path: write_jsonl(path, map(dict, items)))


def _written(file: Path, write: Callable[[Path], object]) -> list[str]:
    """Write the file, unless a run in its folder was made with another content: that run can then still be resumed."""
    out = file.parent
    out.mkdir(parents=True, exist_ok=True)
    new = file.with_name(f".new-{file.name}")
    try:
        write(new)
        if file.exists() and _has_results(out) and file_hash(file) != file_hash(new):
            raise UserError(f"{out} holds results of a run on other rows than these ({file.name}); choose another out")
        new.replace(file)
    finally:
        new.unlink(missing_ok=True)
    return [str(file)]


def _has_results(out: Path) -> bool:
    return bool(checkpoint.steps(out)) or any((out / name).exists() for name in ("adapter", "best.jsonl"))
