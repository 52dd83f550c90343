"""The YAML of a recipe, as flags: its keys, their values as text, and the line of each.

The YAML is only composed into nodes (by yaml.SafeLoader), never built into objects: a value reaches the parser of flags
as the text in the file, so `2e-4` is a number, and every error names its line. Aliases and tags are refused.
"""

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import yaml

from lowalign.config.renamed import RENAMED, warn
from lowalign.errors import UserError

SIZE_LIMIT = 100_000  # bytes; a recipe with every key has about 8,000
VERB = "verb"  # the key that names the command a recipe is for; every other key is an option
FLAG_OF = {
    "data.files": "data",
    "train.track": "track",
    "train.run_name": "run_name",
    "sft.train.track": "track",  # of best-of-n
    "sft.train.run_name": "run_name",
}  # every other key is the flag of the same name


class Flag(NamedTuple):
    """One key of a recipe as the tokens of a command line. problem: why its value cannot be used, if it cannot."""

    key: str
    line: int
    tokens: list[str]
    problem: str | None = None


def read(recipe: Path, config: type) -> list[Flag]:
    """The flags that a recipe stands for. Raises UserError, with file and line, for what is no key of `config`."""
    return flags_in(compose(recipe), recipe, config)


def flags_in(node: yaml.Node | None, recipe: Path, config: type) -> list[Flag]:
    """The flags that a part of a file stands for. Raises as `read` does."""
    keys = dict(options(config))
    flags: dict[str, Flag] = {}
    for name, key, value in _entries(node, recipe):
        if name == VERB:
            continue
        place = at(recipe, key)
        if name not in keys and RENAMED.get(name) in keys:
            warn(f"{place}: {name}", RENAMED[name])
            name = RENAMED[name]
        name = f"{name}.files" if f"{name}.files" in keys else name  # `data: rows.jsonl`
        section = any(option.startswith(f"{name}.") for option in keys)
        if is_null(value) and (section or name in keys):
            continue  # a key without a value keeps its default, a section without keys all of them
        if section:
            raise UserError(f"{place}: {name} is a section: write its keys below it, one per line")
        if name not in keys:
            raise UserError(f"{place}: there is no key {name}{suggest(name, [*keys, VERB])}")
        if name in flags:
            raise UserError(f"{place}: {name} is set twice (first in line {flags[name].line})")
        flags[name] = _flag(name, keys[name], key.start_mark.line + 1, value, recipe)
    return list(flags.values())


def verb_in(recipe: Path) -> tuple[str, int] | None:
    """The verb that a recipe names, and the line; None for a recipe that names none (before 0.2 none did)."""
    for name, key, value in _entries(compose(recipe), recipe):
        if name == VERB and not is_null(value):
            if not isinstance(value, yaml.ScalarNode):
                raise UserError(f"{at(recipe, key)}: verb takes the name of one command, such as sft")
            return value.value, key.start_mark.line + 1
    return None


def options(config: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, type) of every option of a configuration class."""
    for name, hint in get_type_hints(config).items():
        if is_dataclass(hint):
            yield from options(hint, f"{prefix}{name}.")
        else:
            yield prefix + name, hint


def flag_of(key: str) -> str:
    """train.learning_rate -> --train.learning-rate."""
    short = next((flag for name, flag in FLAG_OF.items() if key == name or key.endswith(f".{name}")), key)
    return f"--{short}".replace("_", "-")


def suggest(name: str, known: Iterable[str]) -> str:
    """A question to append to a message, where something known looks like `name` or ends in the same word."""
    known = list(known)
    last = name.rpartition(".")[2]
    near = difflib.get_close_matches(name, known, n=1) or [k for k in known if k.rpartition(".")[2] == last]
    return f"; did you mean {near[0]}?" if near else ""


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.tag:
            what = "an alias (*name)" if isinstance(event, yaml.AliasEvent) else "a tag (!name)"
            raise yaml.MarkedYAMLError(problem=f"{what} is not allowed in a recipe", problem_mark=event.start_mark)
        return super().compose_node(parent, index)


def compose(recipe: Path) -> yaml.Node | None:
    """The nodes of a YAML file. Raises UserError for a file that is none, or has aliases or tags."""
    try:
        with recipe.open("rb") as file:
            raw = file.read(SIZE_LIMIT + 1)
        if len(raw) > SIZE_LIMIT:
            raise UserError(f"{recipe}: larger than {SIZE_LIMIT:,} bytes, so not a recipe")
        return yaml.compose(raw.decode(), Loader=_Loader)
    except OSError as error:
        raise UserError(f"{recipe}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{recipe}: not UTF-8 text, so not a recipe") from error
    except RecursionError as error:
        raise UserError(f"{recipe}: nested too deeply for a recipe") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{recipe}:{mark.line + 1}" if mark else recipe
        raise UserError(f"{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from error


def _entries(node: yaml.Node | None, recipe: Path, prefix: str = "") -> Iterator[tuple[str, yaml.Node, yaml.Node]]:
    """(dotted name, key, value) of every key that has no keys below it."""
    if node is None or (is_null(node) and not prefix):
        return
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{at(recipe, node)}: a recipe is made of lines `key: value`")
    lines: dict[str, int] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise UserError(f"{at(recipe, key)}: a key is one word")
        name = prefix + key.value.replace("-", "_")
        if name in lines:
            raise UserError(f"{at(recipe, key)}: {name} is set twice (first in line {lines[name]})")
        lines[name] = key.start_mark.line + 1
        if isinstance(value, yaml.MappingNode):
            yield from _entries(value, recipe, f"{name}.")
        else:
            yield name, key, value


def _flag(name: str, hint: Any, line: int, value: yaml.Node, recipe: Path) -> Flag:
    flag = flag_of(name)
    if get_origin(hint) is tuple:
        items = value.value if isinstance(value, yaml.SequenceNode) else [value]
        for item in items:
            if not isinstance(item, yaml.ScalarNode) or is_null(item):
                raise UserError(f"{at(recipe, item)}: {name} is a list of plain values")
            if item.value.startswith("-"):  # the parser would take it for a flag
                raise UserError(f"{at(recipe, item)}: {name}: an item may not begin with '-': {item.value}")
        texts = [item.value for item in items]
        return Flag(name, line, [flag, *texts], _tuple_problem(hint, texts))
    if not isinstance(value, yaml.ScalarNode):
        raise UserError(f"{at(recipe, value)}: {name} takes one value, not a list")
    if hint is not bool:
        return Flag(name, line, [f"{flag}={value.value}"], _problem(hint, value.value))
    if not value.tag.endswith(":bool"):
        return Flag(name, line, [], f"expected true or false, not {value.value!r}")
    section, dot, last = flag.removeprefix("--").rpartition(".")
    on = yaml.SafeLoader.bool_values[value.value.lower()]
    return Flag(name, line, [flag if on else f"--{section}{dot}no-{last}"])


def flag_problem(hint: Any, texts: list[str]) -> str | None:
    """Why these words are no value of a flag for an option of this type; None where they are."""
    if hint is bool:
        return f"takes no value, found {' '.join(texts)}" if texts else None
    if get_origin(hint) is tuple:
        return _tuple_problem(hint, texts)
    if len(texts) != 1:
        return f"takes one value, found {' '.join(texts)}" if texts else "needs a value (=VALUE where it begins with -)"
    return _problem(hint, texts[0])


def _tuple_problem(hint: Any, texts: list[str]) -> str | None:
    kinds = get_args(hint)
    if kinds[-1] is not ... and len(texts) != len(kinds):
        return f"expected {len(kinds)} values, not {len(texts)}"
    return next(filter(None, (_problem(kinds[0], text) for text in texts)), None)


def _problem(hint: Any, text: str) -> str | None:
    """Why a text is no value of an option of this type; None where it is."""
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if NoneType in kinds and text == "None":
        return None
    choices = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    if choices:
        return None if text in choices else f"expected one of {', '.join(dict.fromkeys(choices))}, not {text!r}"
    for kind, name in ((int, "a whole number"), (float, "a number")):
        if kind in kinds:
            try:
                kind(text)
            except ValueError:
                return f"expected {name}, not {text!r}"
    return None


def is_null(node: yaml.Node) -> bool:
    """Whether there is no value."""
    return node.tag.endswith(":null")


def at(recipe: Path, node: yaml.Node) -> str:
    """FILE:LINE."""
    return f"{recipe}:{node.start_mark.line + 1}"
