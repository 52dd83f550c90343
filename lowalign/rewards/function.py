"""A Python function of the user's as a reward: loading it, calling it, and what it does wrong in words."""

import copy
import difflib
import math
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from lowalign.data.prompts import Prompt
from lowalign.errors import UserError


@dataclass(frozen=True)
class FunctionReward:
    """A Python function, the file it stands in and its name there."""

    file: Path
    name: str
    function: Callable

    def __call__(
        self, prompts: Sequence[Prompt], _: object, completions: Sequence[Sequence[str]], __: object
    ) -> list[list[float]]:
        """The function's numbers. Raises UserError when it fails or returns anything but a finite number for each."""
        texts = [text for group in completions for text in group]
        asked = [copy.deepcopy(p) for p, group in zip(prompts, completions, strict=True) for _ in group]
        name = f"{self.file}:{self.name}"
        try:
            values = list(self.function(asked, list(texts)))
        except Exception as error:  # somebody else's program: it can fail in any way
            raise UserError(f"{_place(error, self.file)}: {type(error).__name__}: {error}") from error
        if len(values) != len(texts):
            raise UserError(f"{name} returned {len(values):,} numbers for {len(texts):,} completions")
        numbers = iter([_number(value, name, text) for value, text in zip(values, texts, strict=True)])
        return [[next(numbers) for _ in group] for group in completions]


def load_function(file: Path, name: str) -> FunctionReward:
    """The function of that name in a Python file, which is run. Raises UserError when it fails or has no such function."""
    module = _imported(file)
    function = getattr(module, name, None)
    if function is None:
        near = difflib.get_close_matches(name, [n for n, v in vars(module).items() if callable(v)], 1)
        raise UserError(f"{file}: there is no function {name}" + (f"; did you mean {near[0]}?" if near else ""))
    if not callable(function):
        raise UserError(f"{file}: {name} is no function, it is of type {type(function).__name__}")
    return FunctionReward(file, name, function)


def _imported(file: Path) -> ModuleType:
    module = ModuleType(f"lowalign_reward_{file.stem}")
    module.__file__ = str(file)
    sys.modules[module.__name__] = module  # dataclasses and typing look their module up there
    try:
        # Not importlib, which leaves a __pycache__ beside the file, and may take one that is not of this text.
        exec(compile(file.read_bytes(), file, "exec"), vars(module))
    except Exception as error:
        raise UserError(f"{_place(error, file)}: {type(error).__name__}: {error}") from error
    return module


def _place(error: Exception, file: Path) -> str:
    """FILE:LINE of what failed: the innermost line that stands in the user's file."""
    if isinstance(error, SyntaxError) and error.filename == str(file):
        return f"{file}:{error.lineno}"
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) == file]
    return f"{file}:{lines[-1]}" if lines else str(file)


def _number(value: object, name: str, text: str) -> float:
    try:
        number = math.nan if isinstance(value, str) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        shown = text if len(text) <= 60 else text[:60] + " …"
        raise UserError(f"{name} returned {value!r}, which is no finite number, for the completion {shown!r}")
    return number
