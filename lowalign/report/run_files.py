"""What a run has written, read again: its folder, finished or not. Whatever is broken in it is left out and counted."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from lowalign.config.verbs import verbs
from lowalign.config.yaml_flags import compose
from lowalign.errors import UserError

Points = Sequence[tuple[float, float]]  # (step, value)
RESULTS = ("report.json", "result.json")  # of best-of-n and judge; of compare
DEPTH = 3  # of folders in which runs are searched: a pipeline, its stage, the rounds of best-of-n
NO_RUNS = ("adapter", "checkpoints", "tensorboard", "wandb")  # folders of a run
LARGEST = 1e150  # of a value that can be drawn
SAMPLES = {"samples.jsonl": 50_000, "candidates.jsonl": 4, "pairs.jsonl": 4}  # lines that are read


@dataclass(frozen=True)
class RunFiles:
    """A run. folder: as the user named it. metrics: the lines of metrics.jsonl. broken: lines of it that cannot be read.
    recipe: every option. meta: the adapter's or the merged model's lowalign.json. results: of RESULTS. samples: by file."""

    folder: Path
    recipe: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    broken: int = 0
    meta: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    samples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    @property
    def verb(self) -> str | None:
        """The verb that wrote the folder; None where nothing says it."""
        known_by = {"merge": "merge" in self.meta, "best-of-n": "mean_reward" in self.results}
        known_by["compare"] = "win_rate" in self.results
        named = self.recipe.get("verb") or self.meta.get("method")
        name = named or next((verb for verb, known in known_by.items() if known), None)
        return name if name in {verb.name for verb in verbs()} else None

    @property
    def finished(self) -> bool:
        """Whether the run ended by itself."""
        rounds = self.folder / f"round-{self.recipe.get('rounds')}"  # of best-of-n --train
        return bool(self.meta or self.results) or (rounds / "sft" / "adapter" / "lowalign.json").is_file()

    def names(self) -> list[str]:
        """The metrics, in the order in which they first appear."""
        return [name for name in dict.fromkeys(key for line in self.metrics for key in line) if name != "step"]


def run_folder(path: Path) -> Path:
    """The folder of a run, for the path that names it: the folder itself, or the adapter in it."""
    path = Path(path).expanduser()
    return path.parent if path.name == "adapter" and (path.parent / "recipe.yaml").is_file() else path


def find_runs(folder: Path) -> list[Path]:
    """The runs of a folder: the folder itself, and those below it, as a pipeline or best-of-n in rounds has them; a
    pipeline's in the order of its stages. Raises UserError when there is none."""
    if not folder.is_dir():
        what = "a file" if folder.exists() else "not there"
        raise UserError(f"{folder} is {what}; give the folder of a run, such as runs/first")
    try:
        runs = list(_runs_in(folder, DEPTH)) or [folder] * (folder / "lowalign.json").is_file()
    except OSError as error:
        raise UserError(f"{error.filename or folder} cannot be read: {error.strerror}") from error
    if not runs:
        raise UserError(
            f"{folder} is no run: neither it nor a folder in it has a recipe.yaml, metrics.jsonl, "
            f"{', '.join(RESULTS)} or lowalign.json"
        )
    return runs


def _runs_in(folder: Path, depth: int) -> Iterator[Path]:
    own = ("recipe.yaml", "metrics.jsonl", *RESULTS)
    if any((folder / name).is_file() for name in own) or "merge" in read_object(folder / "lowalign.json"):
        yield folder
    if depth:
        place = {name: i for i, name in enumerate(stages_of(folder))}
        for path in sorted(_inner(folder), key=lambda path: (place.get(path.name, len(place)), _begun(path))):
            yield from _runs_in(path, depth - 1)


def _inner(folder: Path) -> list[Path]:
    """The folders in it where runs may be, by name."""
    try:
        return [
            path
            for path in sorted(folder.iterdir())
            if path.name not in NO_RUNS and not path.name.startswith(".") and path.is_dir() and not path.is_symlink()
        ]
    except FileNotFoundError:  # removed since it was listed
        return []


def _begun(folder: Path) -> float:
    try:
        return (folder / "recipe.yaml").stat().st_mtime
    except OSError:
        return math.inf


def stages_of(folder: Path) -> dict[str, dict[str, Any]]:
    """The finished stages of a pipeline, from its pipeline.json; {} for any other folder."""
    stages = read_object(folder / "pipeline.json").get("stages")
    return (
        {name: value for name, value in stages.items() if isinstance(value, dict)} if isinstance(stages, dict) else {}
    )


def read_run(folder: Path) -> RunFiles:
    """Everything that a report shows of a run."""
    metrics, broken = read_metrics(folder / "metrics.jsonl")
    read = (read_object(folder / name) for name in RESULTS)
    samples = {name: _objects(folder / name, most)[0] for name, most in SAMPLES.items()}
    return RunFiles(
        folder,
        _recipe(folder / "recipe.yaml"),
        metrics,
        broken,
        read_object(folder / "adapter" / "lowalign.json") or read_object(folder / "lowalign.json"),
        read_object(folder / "data_report.json"),
        next(filter(None, read), {}),
        {name: lines for name, lines in samples.items() if lines},
    )


def read_metrics(file: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines of a metrics.jsonl, and how many of it are broken. A last line without its end is not counted: it is being
    written, or a kill left it."""
    lines, broken = _objects(file)
    steps = [line for line in lines if type(line.get("step")) is int and abs(line["step"]) < 2**53]
    return steps, broken + len(lines) - len(steps)


def points_of(lines: Sequence[dict[str, Any]], name: str) -> Points:
    """(step, value) of a metric, in the order of the steps, without the values that are not finite."""
    points = [(line["step"], line[name]) for line in lines if name in line and is_number(line[name])]
    return sorted(points, key=lambda point: point[0])


def is_number(value: Any) -> bool:
    """Whether a value of a JSON file is a number that can be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -LARGEST < value < LARGEST


def read_object(file: Path) -> dict[str, Any]:
    """A JSON object; {} for a file that is not there, or holds anything else."""
    try:
        value = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _objects(file: Path, most: int | None = None) -> tuple[list[dict[str, Any]], int]:
    """The JSON objects of the first lines of a file, and how many of these lines hold anything else."""
    lines, broken = [], 0
    try:
        with file.open("rb") as stream:
            for raw in islice(stream, most):
                try:
                    line = json.loads(raw)
                except (ValueError, RecursionError):
                    line = None
                if isinstance(line, dict):
                    lines.append(line)
                elif raw.endswith(b"\n") and raw.strip():
                    broken += 1
    except OSError:
        pass
    return lines, broken


def _recipe(file: Path) -> dict[str, Any]:
    """The options of a recipe.yaml; {} where it is not there or cannot be read. It has no aliases: they could grow."""
    try:
        compose(file)
        options = yaml.safe_load(file.read_bytes())
    except (UserError, OSError, ValueError, yaml.YAMLError):
        return {}
    return options if isinstance(options, dict) else {}
