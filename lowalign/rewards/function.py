"""A Python function as a reward: load it, call it, and report its errors by file and line."""

import copy
import difflib
import math
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from lowalign.data.rows.turns import Prompt
from lowalign.errors import UserError


@dataclass(frozen=True)
class FunctionReward:
    """A function of prompts and completions, two lists of one length, that returns a number for each completion.

    file, name: where it is defined. A prompt is text or messages; a completion is text.
    """

    file: Path
    name: str
    function: Callable

    def __call__(
        self, prompts: Sequence[Prompt], _: object, completions: Sequence[Sequence[str]], __: object
    ) -> list[list[float]]:
        """Its numbers by prompt and completion. Raises UserError when it fails, or does not return a finite number for
        each completion."""
        texts = [text for group in completions for text in group]
        prompt_of_each = [copy.deepcopy(p) for p, group in zip(prompts, completions, strict=True) for _ in group]
        name = f"{self.file}:{self.name}"
        try:
            values = list(self.function(prompt_of_each, list(texts)))
        except Exception as error:  # the user's code can fail in any way
            raise UserError(f"{_place(error, self.file)}: {type(error).__name__}: {error}") from error
        if len(values) != len(texts):
            raise UserError(f"{name} returned {len(values):,} numbers for {len(texts):,} completions")
        numbers = iter([_number(value, name, text) for value, text in zip(values, texts, strict=True)])
        return [[next(numbers) for _ in group] for group in completions]


def load_function(file: Path, name: str) -> FunctionReward:
    """Run a Python file and take the function of that name. Raises UserError when the file fails or has no such function."""
    module = _imported(file)
    function = getattr(module, name, None)
    if function is None:
        similar = difflib.get_close_matches(name, [n for n, v in vars(module).items() if callable(v)], 1)
        raise UserError(f"{file}: there is no function {name}" + (f"; did you mean {similar[0]}?" if similar else ""))
    if not callable(function):
        raise UserError(f"{file}: {name} is not a function, it is of type {type(function).__name__}")
    return FunctionReward(file, name, function)


def _imported(file: Path) -> ModuleType:
    module = ModuleType(f"lowalign_reward_{file.stem}")
    module.__file__ = str(file)
    sys.modules[module.__name__] = module  # dataclasses and typing look their module up there
    try:
        # Not importlib: it would leave a __pycache__ beside the file, and could load an outdated one.
        exec(compile(file.read_bytes(), file, "exec"), vars(module))
    except Exception as error:
        raise UserError(f"{_place(error, file)}: {type(error).__name__}: {error}") from error
    return module


def _place(error: Exception, file: Path) -> str:
    """FILE:LINE of an error: the innermost line in the user's file."""
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
        raise UserError(f"{name} returned {value!r}, which is not a finite number, for the completion {shown!r}")
    return number
