"""Keyword arguments as the flags of a command line, so that one parser checks both.

`train={"steps": 200}` is --train.steps 200, and so is `steps=200`: where several sections have an option of one name, that of
`train` is meant.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lowalign.config.yaml_flags import flag_of, options, suggest
from lowalign.errors import UserError

NAMED_FIRST = "train."


def flags_of(verb: str, config: type, given: Mapping[str, Any]) -> list[str]:
    """The words of the command line. config: the verb's options. Raises UserError for a keyword that is none of them."""
    keys = [name for name, _ in options(config)]
    return [flag for name, value in given.items() for flag in _flags(verb, name, value, keys)]


def _flags(verb: str, name: str, value: Any, keys: Sequence[str]) -> Iterator[str]:
    """The words of the command line for one option. Raises UserError for one that the verb does not have."""
    if isinstance(value, Mapping):
        if not any(key.startswith(f"{name}.") for key in keys):
            raise UserError(f"{verb} has no section {name}{suggest(name, keys)}")
        for inner, inner_value in value.items():
            yield from _flags(verb, f"{name}.{inner}", inner_value, keys)
        return
    key = _key(verb, name, keys)
    if value is None:
        return
    flag = flag_of(key)
    if isinstance(value, bool):
        section, dot, last = flag.removeprefix("--").rpartition(".")
        yield flag if value else f"--{section}{dot}no-{last}"
    elif isinstance(value, list | tuple):
        yield from (flag, *map(str, value))
    else:
        yield f"{flag}={value}"


def _key(verb: str, name: str, keys: Sequence[str]) -> str:
    for whole in (name, f"{name}.files"):
        if whole in keys:
            return whole
    matches = [key for key in keys if key.rpartition(".")[2] == name]
    preferred = [key for key in matches if key == NAMED_FIRST + name] or matches
    if len(preferred) > 1:
        raise UserError(f"{name} could be {' or '.join(preferred)}: give it in its section, {_section(preferred[0])}")
    if not preferred:
        last = [key.rpartition(".")[2] for key in keys]
        raise UserError(f"{verb} has no option {name}{suggest(name, last)}")
    return preferred[0]


def _section(key: str) -> str:
    section, _, last = key.rpartition(".")
    return f'{section}={{"{last}": …}}'
