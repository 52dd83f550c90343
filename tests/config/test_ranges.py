"""Every number among the options of every verb has a range, and what is outside it is refused with flag or line, value and range."""

import math
from collections.abc import Iterator
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from lowalign.config import recipe
from lowalign.config.plan import PLANNED
from lowalign.config.ranges import PositiveInt, Range, range_of
from lowalign.config.rows import AnswersConfig, JudgedRowsConfig, MeasuredRowsConfig, ShortPromptsConfig
from lowalign.config.sections import Sampling
from lowalign.config.verbs import verbs
from lowalign.config.yaml_flags import flag_of, options
from lowalign.errors import UserError

CONFIGS = {verb.name: verb.config for verb in verbs() if verb.config} | {
    f"plan {v}": c for v, (c, _) in PLANNED.items()
}
del CONFIGS["plan"]  # its options are among those of each "plan VERB"
# Keyword arguments that give each verb a valid configuration.
RUN = {"model": "m", "out": Path("o")}
VALID: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("sft", "reward", "dpo", "ppo", "best-of-n"), RUN),
    **{f"plan {verb}": {"model": "m"} for verb in PLANNED},
    "run": {"file": "p.yaml", "out": Path("o")},
    "data check": {"model": "m", "files": ("f",)},
    "data convert": {"out": Path("o"), "files": ("f",)},
    "data presets": {},
    "chat": {"model": "m"},
    "generate": {"model": "m", "prompt": "a"},
    "score": {"model": "m", "adapter": "a", "data": MeasuredRowsConfig(("f",))},
    "report": {"runs": (Path("r"),)},
    "judge": {"model": "m", "out": Path("o"), "data": AnswersConfig(("f",))},
    "compare": {"a": "a", "b": "base", "out": Path("o"), "data": ShortPromptsConfig(("f",))},
    "eval": {"model": "m", "data": MeasuredRowsConfig(("f",))},
    "label": {"out": Path("o"), "data": JudgedRowsConfig(("f",))},
    "synth": {"model": "m", "guidelines": Path("g"), "out": Path("o"), "n": 5},
    "checkpoint": {"run": "r", "out": Path("o")},
    "merge": {"adapters": ("a",), "out": Path("o")},
    "push": {"path": Path("p"), "repo": "r"},
    "pull": {"repo": "r", "out": Path("o")},
    "bitdelta compress": {"base": "m", "finetuned": "f", "out": Path("o")},
    "bitdelta distil": {"model": "m", "delta": "d", "finetuned": "f", "out": Path("o")},
    "recipes show": {"name": "lora/sft"},
    "recipes copy": {"name": "lora/sft"},
}


def numeric(hint: Any) -> bool:
    """Whether a type hint, without its annotations, has int or float in it."""
    return any(kind in (int, float) for kind in (hint, *getattr(hint, "__args__", ())))


def ranges(config: type, prefix: str = "") -> Iterator[tuple[str, Range | None]]:
    """Of all numeric options, by another way through the sections than the product's: hints, not values."""
    plain, full = get_type_hints(config), get_type_hints(config, include_extras=True)
    for name, hint in plain.items():
        if is_dataclass(hint):
            yield from ranges(hint, f"{prefix}{name}.")
        elif numeric(hint):
            yield prefix + name, range_of(full[name])


NUMBERS = [(verb, name, range_) for verb, config in CONFIGS.items() for name, range_ in ranges(config)]


def outside(range_: Range) -> list[float]:
    """NaN and both infinities, and the numbers next to the range."""
    values = [math.nan, math.inf, -math.inf]
    if range_.low > -math.inf:
        values += [range_.low] if range_.above else []
        values += [range_.low - 1, math.nextafter(range_.low, -math.inf)]
    if range_.high < math.inf:
        values += [range_.high] if range_.below else []
        values += [range_.high * 2, math.nextafter(range_.high, math.inf)]
    return [value for value in values if not (value == 0 and range_.or_zero)]


def inside(range_: Range) -> list[float]:
    """The ends of the range, and a number between them."""
    low, high = max(range_.low, -1e6), min(range_.high, 1e6)
    values = [(low + high) / 2, *([] if range_.above else [low]), *([] if range_.below else [high])]
    return values + ([0] if range_.or_zero else [])


def with_value(config: Any, name: str, value: object) -> Any:
    """The configuration with one option of it, or of its sections, set."""
    first, _, rest = name.partition(".")
    return replace(config, **{first: with_value(getattr(config, first), rest, value) if rest else value})


def test_every_number_of_every_verb_has_a_range():
    assert not [f"{verb}: {name}" for verb, name, range_ in NUMBERS if range_ is None]
    assert {verb for verb, _, _ in NUMBERS} >= {"sft", "ppo", "best-of-n", "compare", "eval", "report", "plan sft"}
    assert len({name for _, name, _ in NUMBERS}) > 90


@pytest.mark.parametrize("verb", CONFIGS)
def test_numbers_outside_their_range_are_refused(verb: str):
    config = CONFIGS[verb](**VALID[verb])
    for _, name, range_ in (number for number in NUMBERS if number[0] == verb):
        pair = isinstance(dict(options(CONFIGS[verb]))[name], type(tuple[int, int]))
        for value in outside(range_):
            with pytest.raises(UserError) as refused:
                with_value(config, name, (0.5, value) if pair else value)
            assert str(refused.value) == f"{flag_of(name)} is {value}; it must be {range_}"


@pytest.mark.parametrize("range_", sorted({range_ for _, _, range_ in NUMBERS}, key=str), ids=str)
def test_numbers_inside_their_range_are_valid(range_: Range):
    assert all(value in range_ for value in inside(range_))
    assert not any(value in range_ for value in outside(range_))


@pytest.mark.parametrize(
    ("range_", "text"),
    [
        (Range(1), "at least 1"),
        (Range(0, above=True), "above 0"),
        (Range(0, 1), "at least 0 and at most 1"),
        (Range(0, 1, below=True), "at least 0 and below 1"),
        (Range(1, above=True, or_zero="off"), "above 1, or 0 (off)"),
        (Range(), "a finite number"),
    ],
)
def test_a_range_in_words(range_: Range, text: str):
    assert str(range_) == text


@pytest.mark.parametrize(
    ("line", "flags", "message"),
    [
        ("train:\n  batch_size: 0", [], r"r.yaml:2: train.batch_size is 0; it must be at least 1"),
        ("train:\n  batch_size: 4", ["--train.batch-size=0"], r"^--train.batch-size is 0; it must be at least 1"),
        ("train:\n  betas: [0.9, nan]", [], r"r.yaml:2: train.betas is nan; it must be at least 0 and below 1"),
        ("value:\n  adapter:\n    r: -8", [], r"r.yaml:3: value.adapter.r is -8; it must be at least 1"),
        ("sampling:\n  temperature: .inf", [], r"r.yaml:2: sampling.temperature: expected a number, not '.inf'"),
        ("sampling:\n  temperature: inf", [], r"r.yaml:2: sampling.temperature is inf; it must be at least 0"),
    ],
)
def test_the_message_names_the_line_of_a_recipe_or_the_flag(tmp_path, line: str, flags: list[str], message: str):
    file = tmp_path / "r.yaml"
    file.write_text(line)
    with pytest.raises(UserError, match=message):
        recipe.parse(CONFIGS["ppo"], ["--model", "m", "--out", "o", *flags], file)


def test_a_section_made_by_itself_is_checked():
    with pytest.raises(UserError, match=r"--sampling.top-p is 1.5; it must be above 0 and at most 1"):
        Sampling(top_p=1.5)
    assert range_of(PositiveInt | None) == Range(1)
