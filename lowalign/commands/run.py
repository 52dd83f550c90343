"""`lowalign run`: the stages of a pipeline on one load of the base.

OUT/NAME            the results of stage NAME, as its verb writes them
OUT/pipeline.json   the finished stages: their options, seconds and figures
OUT/report.html     the page of `lowalign report` over all stages
"""

import hashlib
import inspect
import json
import time
from collections.abc import Iterator
from dataclasses import fields, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lowalign.commands.report import report
from lowalign.config.commands import PipelineConfig
from lowalign.config.dump import dump
from lowalign.config.pipeline import Stage, read_pipeline
from lowalign.config.report import ReportConfig
from lowalign.durable import write_json
from lowalign.errors import UserError
from lowalign.log import log
from lowalign.report.recipe_summary import changed_options
from lowalign.train.lock import lock_folder

if TYPE_CHECKING:
    from lowalign.model.base.base import Base

FIGURES = ("loss", "eval/loss", "eval/accuracy", "accuracy", "reward", "kl", "top1", "win_rate", "bytes")


def run(config: PipelineConfig, base: "Base | None" = None) -> int:
    """Run the command; `base` is one that is loaded already. Returns the exit code of the stage that ended it, else 0."""
    stages = read_pipeline(config)
    if config.dry_run:
        for stage in stages:
            options = yaml.safe_dump(changed_options(dump(stage.config)), sort_keys=False, allow_unicode=True)
            print(f"# {stage.name}: lowalign {stage.verb.name} → {stage.out or 'no folder'}\n{options}")
        return 0
    with lock_folder(config.out):
        return _run_stages(config, stages, base)


def _run_stages(config: PipelineConfig, stages: list[Stage], base: "Base | None") -> int:
    finished = _Finished(config.out / "pipeline.json")
    for i, stage in enumerate(stages):
        if finished.has(stage):
            log(f"stage {stage.name}: finished before")
            continue
        log(
            f"\nstage {i + 1} of {len(stages)}, {stage.name}: lowalign {stage.verb.name} → {stage.out or stage.verb.name}"
        )
        function = _function(stage)
        shares = "base" in inspect.signature(function).parameters
        if shares and base is None and stage.config.model:
            from lowalign.model.base.base import Base  # after the messages above: it takes seconds

            base = Base.load(stage.config.model, **vars(config.base))
        started = time.monotonic()
        try:
            options = _resumed(stage)
            code = function(options, base) if shares else function(options)
        except UserError as error:
            raise UserError(
                f"stage {stage.name}: {error}\n(finished stages are kept; the same command goes on here)"
            ) from error
        if code:
            return code
        finished.add(stage, time.monotonic() - started)
    try:
        report(ReportConfig(runs=(config.out,)))
    except UserError as error:  # the stages are finished all the same
        log(f"no report: {error}")
    log("\n".join(finished.table(stages)))
    return 0


class _Finished:
    """The file pipeline.json: what ended well, by stage."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.stages: dict[str, dict[str, Any]] = json.loads(file.read_text())["stages"] if file.exists() else {}

    def has(self, stage: Stage) -> bool:
        """Whether the stage is done. Raises UserError when it was done with other options."""
        entry = self.stages.get(stage.name)
        if entry and entry["options"] != _hash(stage):
            raise UserError(
                f"stage {stage.name} is finished in {self.file.parent}, with other options; use another --out, or remove "
                f"{stage.out or self.file} and the stages that build on it"
                if stage.out and stage.out.exists()
                else f"stage {stage.name} is finished with other options; use another --out"
            )
        return bool(entry) and (stage.out is None or stage.out.exists())

    def add(self, stage: Stage, seconds: float) -> None:
        """Store that the stage is done."""
        entry = {"verb": stage.verb.name, "options": _hash(stage), "seconds": round(seconds, 1)}
        self.stages[stage.name] = entry | {"figures": dict(_figures(stage))}
        write_json(self.file, {"stages": self.stages})

    def table(self, stages: list[Stage]) -> Iterator[str]:
        """A line for each stage."""
        yield f"\n{'stage':16}{'verb':12}{'seconds':>8}  results"
        for stage in stages:
            entry = self.stages[stage.name]
            figures = "  ".join(f"{name} {value:.4g}" for name, value in entry["figures"].items())
            yield f"{stage.name:16}{entry['verb']:12}{entry['seconds']:8.0f}  {figures}"


def _function(stage: Stage) -> Any:
    module, _, name = stage.verb.function.partition(":")
    return getattr(import_module(f"lowalign.{module}"), name)


def _resumed(stage: Stage) -> Any:
    """Its options, with resume where it has begun."""
    can = any(field.name == "resume" for field in fields(stage.config))
    begun = stage.out is not None and (stage.out / "recipe.yaml").exists()
    return replace(stage.config, resume=True) if can and begun else stage.config


def _hash(stage: Stage) -> str:
    config = stage.config
    if any(field.name == "resume" for field in fields(config)):
        config = replace(config, resume=False)
    return hashlib.sha256(f"{stage.verb.name}\n{dump(config)}".encode()).hexdigest()[:16]


def _figures(stage: Stage) -> Iterator[tuple[str, float]]:
    """The figures that a stage ended with, from the file that its verb writes."""
    if stage.out is None:
        return
    for name in ("adapter/lowalign.json", "lowalign.json", "result.json", "report.json"):
        file = stage.out / name
        if file.exists():
            content = json.loads(file.read_text())
            values = content | content.get("metrics", {}) | content.get("merge", {}) | content.get("reward", {})
            yield from ((key, values[key]) for key in FIGURES if isinstance(values.get(key), int | float))
            return
