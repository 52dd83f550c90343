"""--reward taken apart: [WEIGHT*]RUN (a reward run, an adapter folder or a Hub id) or [WEIGHT*]FILE.py:NAME (a function)."""

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from lowalign.errors import UserError

FUNCTIONS: dict[str, Callable] = {}
"""Functions that were given from Python, by their names in a spec."""


class RewardSpec(NamedTuple):
    """One reward. name: RUN or FILE.py:NAME, without the weight."""

    weight: float
    name: str

    @property
    def is_run(self) -> bool:
        """Whether it names a reward run. Raises as `function` does."""
        return self.name not in FUNCTIONS and self.function() is None

    def function(self, option: str = "--reward") -> tuple[Path, str] | None:
        """(FILE, NAME) of a function; None for a run. option: the flag, for a message. Raises UserError when there is no such
        file."""
        match = re.fullmatch(r"(?P<file>.+\.py):(?P<name>\w+)", self.name)
        if match:
            file = Path(match["file"]).expanduser()
            if not file.is_file():
                raise UserError(f"{option} {self.name}: there is no file {file}")
            return file, match["name"]
        if re.search(r"\.py(:|$)", self.name):
            raise UserError(
                f"{option} {self.name}: name the function after the file: {self.name.partition(':')[0]}:NAME"
            )
        return None


def parse_spec(text: str, option: str = "--reward") -> RewardSpec:
    """ "0.5*runs/reward" -> (0.5, "runs/reward"); the weight is 1 when left out. option: the flag, for a message. Raises
    UserError."""
    weight, star, name = text.rpartition("*")
    try:
        number = float(weight) if star else 1.0
    except ValueError:
        number = math.nan
    if not name or not math.isfinite(number):
        raise UserError(f"{option} {text}: expected [WEIGHT*]RUN or [WEIGHT*]FILE.py:NAME, as in 0.5*runs/reward")
    return RewardSpec(number, name)


def files_and_runs(specs: Sequence[str]) -> tuple[list[str], list[str]]:
    """The Python files, and the reward runs, that the specs name. Raises UserError like RewardSpec.function."""
    parsed = [parse_spec(spec) for spec in specs]
    files = [str(function[0]) for spec in parsed if (function := spec.function())]
    return files, [spec.name for spec in parsed if spec.is_run]


def require_flags(prompts: Sequence[str], reward: Sequence[str]) -> None:
    """Raise UserError, before anything is read or loaded, where --data or --reward is missing."""
    if not prompts:
        raise UserError("no prompts: give --data FILE…")
    if not reward:
        raise UserError("no reward: give --reward RUN or --reward FILE.py:NAME")
