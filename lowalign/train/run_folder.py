"""A run's folder: what it was started with, what is done already, and what it leaves.

OUT/recipe.yaml   the whole configuration
OUT/inputs.json   a fingerprint of the files and adapters that the configuration names, so that it is known when one was
                  changed
OUT/adapter       where an adapter is trained: the adapter
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any

from lowalign.config import recipe
from lowalign.config.training import RunConfig
from lowalign.data.chat import Chat
from lowalign.durable import file_hash, json_line, sync, write_file, write_json
from lowalign.errors import UserError
from lowalign.log import log
from lowalign.model.adapters import files as adapter_files
from lowalign.model.host import Host
from lowalign.train.engine import Result


class Journal:
    """A file of JSON lines that is added to a block at a time; a block is on the disk before the next one is has_results.

    lines: those that are there whole. What a kill or a power cut left behind them is cut off by `keep`.
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

    def keep(self, count: int) -> None:
        """Cut off all but the first `count` lines."""
        del self.lines[count:], self._sizes[count:]
        if self.path.exists():
            os.truncate(self.path, sum(self._sizes))

    def add(self, lines: Sequence[dict[str, Any]]) -> None:
        """Write a block. Raises UserError when the disk does not take it; the blocks before it are intact."""
        raw = [json_line(line).encode() for line in lines]
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


def check_or_write_inputs(config: Any, has_results: bool, inputs: Mapping[str, object]) -> None:
    """Write OUT/recipe.yaml and OUT/inputs.json, or compare with those a resumed run was started with.

    config: has `out` and `resume`. has_results: whether OUT holds results. inputs: what is read from files, by their names
    or that of the option. Raises UserError when there are results and --resume is not given, or they were made from
    something else.
    """
    recipe_file, inputs_file = config.out / "recipe.yaml", config.out / "inputs.json"
    hashes = {name: hashlib.sha256(json.dumps(value).encode()).hexdigest() for name, value in inputs.items()}
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
                f"  {listed}\nGive the same, or start anew in another --out"
            )
    write_file(recipe_file, recipe.dump(replace(config, resume=False)))
    write_json(inputs_file, hashes)


def input_hashes(files: Sequence[str], adapters: Sequence[str]) -> dict[str, str]:
    """By name, what is in these files (Hub ids have nothing here) and adapters. Raises UserError for what is no adapter."""
    found = {name: file_hash(Path(name).expanduser()) for name in files if Path(name).expanduser().is_file()}
    for source in adapters:
        folder = adapter_files.locate(source)
        adapter_files.read(folder)  # which complains where something is wrong with it
        found[source] = adapter_files.weights_hash(folder)
    return found


def save_adapter(
    host: Host,
    policy: tuple[str, ...],
    chat: Chat,
    config: RunConfig,
    result: Result,
    method: str,
    more: dict[str, Any],
) -> None:
    """OUT/adapter: what the run was for."""
    told = {k: v for k, v in result.metrics.items() if math.isfinite(v)}
    host.save(
        policy[-1],
        config.out / "adapter",
        parents=policy[:-1],
        files={"chat_template.jinja": chat.template},
        head=method == "reward",  # a value function's head has done its work
        **more,
        method=method,
        step=result.step,
        metrics=told,
        recipe=recipe.dump(_without_paths(replace(config, model=host.base.identity.name))),
    )
    log(f"the adapter is in {config.out / 'adapter'}")


def _without_paths(config: Any) -> Any:
    """The recipe as it may be published with the adapter: names of files, but not where they lie on this machine."""
    changed = {}
    for name, value in vars(config).items():
        if is_dataclass(value):
            changed[name] = _without_paths(value)
        elif isinstance(value, tuple):
            changed[name] = tuple(map(_name, value))
        else:
            changed[name] = _name(value)
    return replace(config, **changed)


def _name(value: Any) -> Any:
    """The last part of a path of this machine, in a WEIGHT*FILE:NAME too; a Hub id stays as it is."""
    if isinstance(value, Path):
        return Path(value.name)
    if not isinstance(value, str):
        return value
    weight, star, source = value.rpartition("*")
    path, colon, function = source.partition(".py:")
    here = Path(path + (".py" if colon else "")).expanduser()
    return weight + star + here.name + (f":{function}" if colon else "") if here.exists() else value
