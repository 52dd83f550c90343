"""A run's folder: recipe, input hashes, journal, saved adapter.

OUT/recipe.yaml   the whole configuration
OUT/inputs.json   hashes of the files and adapters that the configuration names, to detect changes on --resume
OUT/adapter       the trained adapter, of the commands that train one
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass, replace
from itertools import accumulate
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar

from lowalign import processes
from lowalign.config import recipe
from lowalign.config.training import RunConfig
from lowalign.config.yaml_flags import options
from lowalign.data.chat import Chat
from lowalign.data.sources.read import source_hashes
from lowalign.durable import file_hash, json_line, sync, write_file, write_json
from lowalign.errors import UserError
from lowalign.log import log, progress
from lowalign.model.adapters import files as adapter_files
from lowalign.model.host import Host
from lowalign.model.policy import Stack
from lowalign.train.result import Chosen

META = "adapter_meta.json"
RECIPE_FILE = "recipe.yaml"
B = TypeVar("B", range, list)  # a block


class Journal:
    """A file of JSON lines that grows by blocks; `add` returns when its block is on the disk.

    lines: the complete lines of the file. `keep` removes an incomplete line that a kill or a power cut left after them.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: list[dict[str, Any]] = []
        self._sizes: list[int] = []
        for raw in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
            try:
                line = json.loads(raw)
            except ValueError:
                break
            if not raw.endswith(b"\n") or not isinstance(line, dict):
                break
            self.lines.append(line)
            self._sizes.append(len(raw))

    def resume(self, blocks: Sequence[B]) -> Sequence[B]:
        """The blocks that are still to be computed. The file gets one line for each element of a block.

        A block is always computed as a whole: it then has the same bits however often a run was interrupted. So the lines
        of an incomplete block are removed.
        """
        ends = list(accumulate(map(len, blocks), initial=0))
        complete = sum(end <= len(self.lines) for end in ends) - 1
        self.keep(ends[complete])
        return blocks[complete:]

    def fill(self, blocks: Sequence[B], compute: Callable[[B], Sequence[dict[str, Any]]], unit: str) -> None:
        """Add the lines that `compute` returns for each block, behind a progress bar in units of lines."""
        done = len(self.lines)
        with progress(total=done + sum(map(len, blocks)), initial=done, unit=unit) as bar:
            for block in blocks:
                self.add(compute(block))
                bar.update(len(block))

    def keep(self, count: int) -> None:
        """Truncate the file to its first `count` lines."""
        del self.lines[count:], self._sizes[count:]
        if self.path.exists() and processes.is_main():
            os.truncate(self.path, sum(self._sizes))

    def add(self, lines: Sequence[dict[str, Any]]) -> None:
        """Append a block. Raises UserError when it cannot be written; earlier blocks are then intact."""
        raw = [json_line(line).encode() for line in lines]
        if not processes.is_main():
            return
        try:
            new = not self.path.exists()
            with self.path.open("ab") as file:
                file.write(b"".join(raw))
                file.flush()
                os.fsync(file.fileno())
            if new:
                sync(self.path.parent)
        except OSError as error:
            raise UserError(
                f"{self.path} could not be written ({error.strerror}); make room and go on with --resume"
            ) from error
        self.lines += lines
        self._sizes += map(len, raw)


def announce_start(resume: bool, results: Path) -> None:
    """With --resume where there is nothing to resume, say so before anything else is logged. results: the file or folder."""
    if resume and not results.exists():
        log(f"--resume: {results.parent} has no run yet; this starts one")


def check_or_write_inputs(config: Any, has_results: bool, inputs: Mapping[str, object]) -> None:
    """Write OUT/recipe.yaml and OUT/inputs.json; for a resumed run, first compare them with the earlier ones.

    config: a config with `out` and `resume`. has_results: whether OUT holds results. inputs: hashes or content, as JSON
    values, by name of file, adapter or option. Raises UserError when there are results and --resume is not given, or
    when recipe or inputs differ.
    """
    recipe_file, inputs_file = config.out / RECIPE_FILE, config.out / "inputs.json"
    hashes = content_hashes(inputs)
    if has_results and not config.resume:
        raise UserError(f"{config.out} holds results of an earlier run: go on with --resume, or choose another --out")
    if has_results:
        changed = recipe.diff(recipe.parse(type(config), [], recipe_file), config)
        before = json.loads(inputs_file.read_text()) if inputs_file.exists() else {}
        changed += [f"{name}: the content has changed" for name in hashes if hashes[name] != before.get(name)]
        if changed:
            listed = "\n  ".join(changed)
            raise UserError(
                f"--resume goes on with the run in {config.out}, but these differ from what it was started with:\n"
                f"  {listed}\nUse the same (for a longer run change only --train.steps or --train.epochs, for more rounds of "
                "best-of-n --rounds), or start a new run in another --out"
            )
    write_file(recipe_file, recipe.dump(replace(config, resume=False)))
    write_json(inputs_file, hashes)


def content_hashes(inputs: Mapping[str, object]) -> dict[str, str]:
    """As OUT/inputs.json has them."""
    return {name: hashlib.sha256(json.dumps(value).encode()).hexdigest() for name, value in inputs.items()}


def input_hashes(files: Sequence[str], adapters: Sequence[str]) -> dict[str, str]:
    """sha256 of the files of these sources (Hub ids have none) and of these adapters' weights, by name. Raises UserError for
    one that cannot be read."""
    hashes: dict[str, str] = {}
    for name in files:
        path = Path(name).expanduser()
        hashes |= {name: file_hash(path)} if path.is_file() else source_hashes(name)
    for adapter in adapters:
        folder = adapter_files.locate(adapter)
        adapter_files.read(folder)  # to report errors in it now
        hashes[adapter] = adapter_files.weights_hash(folder)
    return hashes


def save_adapter(
    host: Host, policy: Stack, chat: Chat, config: RunConfig, chosen: Chosen, meta: dict[str, Any], folder: Path
) -> None:
    """Write the adapter that is trained in `policy` to a folder. meta: more entries of its lowalign.json, with "method"."""
    host.save(
        policy[-1],
        folder,
        parents=policy[:-1],
        files={"chat_template.jinja": chat.template},
        scalar_head=meta["method"] == "reward",  # the head of a value function is only needed in training
        **meta,
        step=chosen.step,
        metrics={k: v for k, v in chosen.metrics.items() if math.isfinite(v)},
        recipe=recipe.dump(_without_paths(replace(config, model=host.base.identity.name))),
    )


def flat_options(config: Any) -> dict[str, str | int | float | bool | None]:
    """Every option by its dotted name, with names instead of paths, as a tracker shows them."""
    public = _without_paths(config)
    values = {name: attrgetter(name)(public) for name, _ in options(type(config))}
    plain = str | int | float | bool | None
    return {
        name: ", ".join(map(str, value))
        if isinstance(value, tuple)
        else value
        if isinstance(value, plain)
        else str(value)
        for name, value in values.items()
    }


def _without_paths(config: Any) -> Any:
    """The config with names instead of paths, so that the adapter can be published."""
    changed = {}
    for name, value in vars(config).items():
        if is_dataclass(value):
            changed[name] = _without_paths(value)
        elif isinstance(value, tuple):
            changed[name] = tuple(map(_without_folder, value))
        else:
            changed[name] = _without_folder(value)
    return replace(config, **changed)


def _without_folder(value: Any) -> Any:
    """The last part of a path that exists here, also inside WEIGHT*FILE.py:NAME; a Hub id stays as it is."""
    if isinstance(value, Path):
        return Path(value.name)
    if not isinstance(value, str):
        return value
    weight, star, name = value.rpartition("*")
    file, colon, function = name.partition(".py:")
    path = Path(file + (".py" if colon else "")).expanduser()
    return weight + star + path.name + (f":{function}" if colon else "") if path.exists() else value
