"""A Python function as a reward: load it, call it, and report its errors by file and line."""

import copy
import difflib
import inspect
import math
import sys
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from lowalign.data.rows.turns import Prompt
from lowalign.errors import UserError

EXPECTED = "def reward(prompts, completions, **columns)"
EXPECTS = f". Expected {EXPECTED}, which returns a number for each completion"
GIVEN = ("stopped", "completion_ids")  # what a function may ask for besides the columns of the rows


@dataclass(frozen=True)
class Samples:
    """What a function may ask for besides prompts and completions. columns: of each prompt's row, the same ones in every row
    (see same_columns). stopped: by prompt, whether each completion ended by itself, not at the length limit; None where it is
    not known. has_ids: whether the ids of the completions are known."""

    columns: Sequence[Mapping[str, Any]]
    stopped: Sequence[Sequence[bool]] | None
    has_ids: bool = True


@dataclass(frozen=True)
class FunctionReward:
    """A function of prompts and completions, two lists of one length, that returns a number for each completion.

    file, name: where it is defined. A prompt is text or messages; a completion is text. The function may have more
    parameters: `stopped`, `completion_ids`, and columns of the rows by name. It gets each as a list with one element for
    each completion; with **columns it gets all of them.
    """

    file: Path
    name: str
    function: Callable
    parameters: "Parameters"

    @classmethod
    def of(cls, file: Path, name: str, function: Callable) -> "FunctionReward":
        """Raises UserError when it has no parameters for prompts and completions."""
        reward = cls(file, name, function, Parameters.of(function))
        if reward.parameters.too_few:
            raise UserError(f"{reward.where} takes no prompts and completions; expected {EXPECTED}")
        return reward

    @property
    def where(self) -> str:
        """FILE:LINE: NAME."""
        code = getattr(inspect.unwrap(self.function), "__code__", None)
        return f"{self.file}:{code.co_firstlineno}: {self.name}" if code else f"{self.file}:{self.name}"

    def check_columns(self, columns: Collection[str]) -> None:
        """Raises UserError when the function requires a parameter that is neither one of `columns` nor one of GIVEN."""
        known = [*columns, *GIVEN]
        for name in self.parameters.required:
            if name not in known:
                similar = difflib.get_close_matches(name, known, 1)
                raise UserError(
                    f"{self.where} requires {name}, which is no column of the prompts' rows"
                    f"{f' (did you mean {similar[0]}?)' if similar else ''}. Their columns: "
                    f"{', '.join(sorted(columns)) or 'none'}. Expected {EXPECTED}, where {' and '.join(GIVEN)} may be "
                    "named too"
                )

    def __call__(
        self,
        prompts: Sequence[Prompt],
        _: object,
        completions: Sequence[Sequence[str]],
        completion_ids: Sequence[Sequence[Sequence[int]]],
        samples: Samples | None = None,
    ) -> list[list[float]]:
        """Its numbers by prompt and completion. samples: None where completions come without a row of prompts.

        Raises UserError when it fails, does not return a finite number for each completion, or requires what is not known.
        """
        texts = [text for group in completions for text in group]
        sizes = list(map(len, completions))
        named = self._named(completion_ids, samples, sizes)
        both = {"prompts": _for_each(prompts, sizes), "completions": list(texts)}
        try:
            if self.parameters.by_name:
                wanted = {key: value for key, value in both.items() if self.parameters.takes(key)}
                values = list(self.function(**wanted, **named))
            else:
                values = list(self.function(*both.values(), **named))
        except Exception as error:  # the user's code can fail in any way
            raise UserError(
                f"{_place(error, self.file)}: {self.name}: {type(error).__name__}: {error}{EXPECTS}"
            ) from error
        if len(values) != len(texts):
            raise UserError(f"{self.where} returned {len(values):,} numbers for {len(texts):,} completions{EXPECTS}")
        numbers = iter([_number(value, self.where, text) for value, text in zip(values, texts, strict=True)])
        return [[next(numbers) for _ in group] for group in completions]

    def _named(
        self, completion_ids: Sequence[Sequence[Sequence[int]]], samples: Samples | None, sizes: Sequence[int]
    ) -> dict[str, list]:
        """The arguments besides prompts and completions, by name. Raises UserError like check_columns."""
        if samples is None:
            if unknown := self.parameters.required:
                raise UserError(f"{self.where} requires {unknown[0]}, which is known only of prompts that were sampled")
            return {}
        columns = list(samples.columns[0])
        known: dict[str, Callable[[], list]] = {
            key: partial(_for_each, [row[key] for row in samples.columns], sizes) for key in columns
        }
        if samples.stopped is not None:
            known["stopped"] = lambda: [stop for group in samples.stopped for stop in group]
        if samples.has_ids:
            known["completion_ids"] = lambda: [list(ids) for group in completion_ids for ids in group]
        self.check_columns(columns)
        if unknown := [key for key in self.parameters.required if key not in known]:
            raise UserError(f"{self.where} requires {unknown[0]}, which is known only of completions that were sampled")
        wanted = [key for key in known if self.parameters.takes(key) and key not in self.parameters.first]
        return {key: known[key]() for key in wanted}


@dataclass(frozen=True)
class Parameters:
    """The parameters of a reward function. names: of all. first: those of prompts and completions. by_name: whether these
    are passed by name. required: the others without a default. any: whether it has **columns."""

    names: tuple[str, ...]
    first: tuple[str, ...]
    by_name: bool
    required: tuple[str, ...]
    any: bool
    too_few: bool

    def takes(self, name: str) -> bool:
        """Whether it can be called with this name."""
        return self.any or name in self.names

    @property
    def uses_columns(self) -> bool:
        """Whether it may get columns of the rows."""
        return self.any or any(name not in (*self.first, *GIVEN) for name in self.names)

    @classmethod
    def of(cls, function: Callable) -> "Parameters":
        """The first two are prompts and completions, whatever their names; where one called `completions` is not the second,
        both are known by their names, as in `def reward(completions, answer)`."""
        try:
            parameters = list(inspect.signature(function).parameters.values())
        except (TypeError, ValueError):  # a builtin has none
            return cls((), (), False, (), False, too_few=False)
        kinds = [p.kind for p in parameters]
        positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        several, any_name = inspect.Parameter.VAR_POSITIONAL in kinds, inspect.Parameter.VAR_KEYWORD in kinds
        names = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        by_name = "completions" in names and [p.name for p in positional[1:2]] != ["completions"]
        by_name = by_name or (any_name and not names and not several)
        first = ("prompts", "completions") if by_name else tuple(p.name for p in positional[:2])
        required = [p.name for p in parameters if p.name in names and p.name not in first and p.default is p.empty]
        too_few = not by_name and not several and len(positional) < 2
        return cls(tuple(names), first, by_name, tuple(required), any_name, too_few)


def same_columns(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each row with the columns of all rows; None where it lacks one."""
    columns = dict.fromkeys(key for row in rows for key in row)
    return [{key: row.get(key) for key in columns} for row in rows]


def _for_each(values: Sequence, sizes: Sequence[int]) -> list:
    """A copy of the value of each prompt for each of its completions: the function may change them."""
    return [copy.deepcopy(value) for value, size in zip(values, sizes, strict=True) for _ in range(size)]


def load_function(file: Path, name: str) -> FunctionReward:
    """Run a Python file and take the function of that name. Raises UserError when the file fails or has no such function, or
    when it has no parameters for prompts and completions."""
    module = _imported(file)
    function = getattr(module, name, None)
    if function is None:
        similar = difflib.get_close_matches(name, [n for n, v in vars(module).items() if callable(v)], 1)
        raise UserError(f"{file}: there is no function {name}" + (f"; did you mean {similar[0]}?" if similar else ""))
    if not callable(function):
        raise UserError(f"{file}: {name} is not a function, it is of type {type(function).__name__}")
    return FunctionReward.of(file, name, function)


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
        raise UserError(
            f"{name} returned {value!r}, which is not a finite number, for the completion {shown!r}{EXPECTS}"
        )
    return number
