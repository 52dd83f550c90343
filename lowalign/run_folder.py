"""A run folder of work whose result is a file of lines: what it was started with, and what is done already.

OUT/recipe.yaml   the whole configuration
OUT/inputs.json   a fingerprint of what the configuration names, so that it is known when a file was changed
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lowalign import recipe
from lowalign.data.cache import write_whole
from lowalign.errors import UserError
from lowalign.train.durable import sync


class Journal:
    """A file of JSON lines that is added to a block at a time; a block is on the disk before the next one is begun.

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
        raw = [json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in lines]
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


def begin(config: Any, begun: bool, inputs: Mapping[str, object]) -> None:
    """Write OUT/recipe.yaml and OUT/inputs.json, or compare with those a resumed run was started with.

    config: has `out` and `resume`. begun: whether OUT holds results. inputs: what is read from files, by the name of its
    option. Raises UserError when there are results and --resume is not given, or they were made from something else.
    """
    recipe_file, inputs_file = config.out / "recipe.yaml", config.out / "inputs.json"
    prints = {name: hashlib.sha256(json.dumps(value).encode()).hexdigest() for name, value in inputs.items()}
    if begun and not config.resume:
        raise UserError(f"{config.out} holds results of an earlier run: go on with --resume, or choose another --out")
    if begun:
        changed = recipe.diff(recipe.parse(type(config), [], recipe_file), config)
        before = json.loads(inputs_file.read_text())
        changed += [f"{name}: the content has changed" for name in prints if prints[name] != before.get(name)]
        if changed:
            listed = "\n  ".join(changed)
            raise UserError(
                f"--resume goes on with the run in {config.out}, but these differ from what it was started with:\n"
                f"  {listed}\nGive the same, or start anew in another --out"
            )
    write_whole(recipe_file, recipe.dump(replace(config, resume=False)).encode())
    write_whole(inputs_file, (json.dumps(prints, indent=2) + "\n").encode())
