"""The range of every number among the options, checked where a configuration is made.

    batch_size: PositiveInt = 16
    top_p: Annotated[float, Range(0, 1, above=True)] = 1.0

A number without a range is a failure of tests/config/test_ranges.py.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any, get_args, get_type_hints

from lowalign.config.yaml_flags import flag_of
from lowalign.errors import UserError


@dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`, never NaN or infinity. above, below: without `low`, without `high` itself. or_zero: what
    0 means, where it is valid besides."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False
    or_zero: str = ""

    def __contains__(self, value: float) -> bool:
        if not math.isfinite(value):
            return False
        inside = value > self.low if self.above else value >= self.low
        inside = inside and (value < self.high if self.below else value <= self.high)
        return inside or (value == 0 and bool(self.or_zero))

    def __str__(self) -> str:
        if self.low == -math.inf:
            return "a finite number"
        text = f"above {self.low:,}" if self.above else f"at least {self.low:,}"
        if self.high < math.inf:
            text += f" and below {self.high:,}" if self.below else f" and at most {self.high:,}"
        return text + (f", or 0 ({self.or_zero})" if self.or_zero else "")


PositiveInt = Annotated[int, Range(1)]
NonNegativeInt = Annotated[int, Range(0)]
PositiveFloat = Annotated[float, Range(0, above=True)]
NonNegativeFloat = Annotated[float, Range(0)]
FiniteFloat = Annotated[float, Range()]
Seed = Annotated[int, Range(0, 2**63 - 1)]


class Checked:
    """A dataclass of options whose numbers, and those of its sections, are in their ranges. `__post_init__` raises UserError."""

    def __post_init__(self) -> None:
        check_numbers(self)


def check_numbers(config: Any, prefix: str = "") -> None:
    """Raise UserError, naming the flag, the value and the range, for a number that is outside. prefix: "sampling." for a section."""
    for name, range_, value in numbers(config, prefix):
        if value not in range_:
            raise UserError(f"{flag_of(name)} is {value}; it must be {range_}")


def numbers(config: Any, prefix: str = "") -> Iterator[tuple[str, Range, float]]:
    """(dotted name, range, value) of all numbers with a range; of a tuple, of each element."""
    hints = get_type_hints(type(config), include_extras=True)
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            yield from numbers(value, f"{prefix}{field.name}.")
        elif (range_ := range_of(hints[field.name])) is not None:
            each = value if isinstance(value, tuple) else (value,)
            yield from ((prefix + field.name, range_, number) for number in each if number is not None)


def range_of(hint: Any) -> Range | None:
    """The Range in a type hint, also inside `… | None` and tuple[…]."""
    for mark in getattr(hint, "__metadata__", ()):
        if isinstance(mark, Range):
            return mark
    return next((inner for arg in get_args(hint) if (inner := range_of(arg)) is not None), None)
