"""A recipe is flags written down: its YAML becomes flags, the user's own flags follow, one parser checks them all.

The YAML is only composed into nodes (by yaml.SafeLoader), never built into objects: a value reaches the parser as the
text it was written as, so `2e-4` is a number, and every complaint names its line. Aliases and tags are refused.
"""

import ast
import contextlib
import difflib
import inspect
import io
import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_origin, get_type_hints

import tyro
import yaml

from lowalign.errors import UserError

T = TypeVar("T")

SIZE_LIMIT = 100_000  # bytes; a recipe has about 5,000
FLAG_OF = {"data.files": "data"}  # every other key is the flag of the same name
# What may differ when a run is resumed. `out` may: a run folder can be moved, and named in several ways.
MAY_CHANGE = {
    *("out", "resume", "train.steps", "train.save_every", "train.log_every", "train.eval_every", "train.keep"),
    *("train.track", "train.token_budget", "rounds"),
}


class Flag(NamedTuple):
    """One key of a recipe as the tokens of a command line, and its line in the file."""

    line: int
    tokens: list[str]


def packaged() -> dict[str, Path]:
    """The recipes that come with lowalign, by name: {"lora/sft": path}."""
    package = Path(__file__).parents[1]
    inside = package / "adapters"  # where a wheel has them; a clone has them beside the package
    root = inside if inside.is_dir() else package.parent / "adapters"
    return {path.relative_to(root).with_suffix("").as_posix(): path for path in sorted(root.rglob("*.yaml"))}


def find(name: str) -> Path:
    """The file meant by a path or by the name of a packaged recipe (lora/sft)."""
    if Path(name).is_file():
        return Path(name)
    known = packaged()
    short = name.removesuffix(".yaml")
    if short not in known:
        raise UserError(f"there is no recipe {name}{_suggest(short, known)} (`lowalign recipes list` names them)")
    return known[short]


def parse(config: type[T], flags: Sequence[str], recipe: Path | None = None, prog: str = "lowalign") -> T:
    """A `config` from the flags of `recipe` followed by `flags`; where both say something, `flags` holds.

    Raises UserError for whatever is wrong in either, and SystemExit(0) once it has answered --help.
    """
    if flags and not flags[0].startswith("-"):  # it would join the last list of the recipe
        raise UserError(f"{prog}: options begin with --, found {flags[0]}")
    written = read(recipe, config) if recipe else []
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(config, args=[*(t for flag in written for t in flag.tokens), *flags], prog=prog)
    except SystemExit as stop:
        if not stop.code:
            raise
    text = complaint.getvalue().rstrip()
    named = re.search(r"--[\w.-]+", text)  # tyro names the offending flag first
    overridden = {_name(flag) for flag in flags}
    lines = {_name(flag.tokens[0]): flag.line for flag in written if _name(flag.tokens[0]) not in overridden}
    line = lines.get(named[0]) if named else None
    raise UserError(f"{f'{recipe}:{line}: ' if line else ''}the options cannot be used\n{text}")


def read(recipe: Path, config: type) -> list[Flag]:
    """The flags that a recipe stands for. Raises UserError, with file and line, for what is no key of `config`."""
    keys = dict(_leaves(config))
    flags = []
    for name, key, value in _entries(_compose(recipe), recipe):
        name = f"{name}.files" if f"{name}.files" in keys else name  # `data: rows.jsonl`
        section = any(known.startswith(f"{name}.") for known in keys)
        if _is_null(value) and (section or name in keys):
            continue  # a key without a value keeps its default, a section without keys all of them
        if section:
            raise UserError(f"{_at(recipe, key)}: {name} is a section; its keys stand below it, one a line")
        if name not in keys:
            raise UserError(f"{_at(recipe, key)}: there is no key {name}{_suggest(name, keys)}")
        flags.append(Flag(key.start_mark.line + 1, _tokens(name, keys[name], value, recipe)))
    return flags


def dump(config: Any) -> str:
    """The YAML of a whole configuration, each key under its explanation. Reading it gives an equal configuration."""
    return "\n".join([_comment(type(config)) + "\n", *_written(config)]) + "\n"


def diff(old: Any, new: Any) -> list[str]:
    """The keys in which two configurations differ, less those that may change when a run is resumed."""
    changed = []
    for name, _ in _leaves(type(new)):
        before, after = (attrgetter(name)(config) for config in (old, new))
        if before != after and name not in MAY_CHANGE:
            changed.append(f"{name}: {_scalar(before)} -> {_scalar(after)}")
    return changed


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.tag:
            what = "an alias (*name)" if isinstance(event, yaml.AliasEvent) else "a tag (!name)"
            raise yaml.MarkedYAMLError(problem=f"{what} is not allowed in a recipe", problem_mark=event.start_mark)
        return super().compose_node(parent, index)


def _compose(recipe: Path) -> yaml.Node | None:
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
    if node is None or (_is_null(node) and not prefix):
        return
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{_at(recipe, node)}: a recipe is made of lines `key: value`")
    seen: dict[str, int] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise UserError(f"{_at(recipe, key)}: a key is one word")
        name = prefix + key.value.replace("-", "_")
        if name in seen:
            raise UserError(f"{_at(recipe, key)}: {name} stands here again (it stands in line {seen[name]} already)")
        seen[name] = key.start_mark.line + 1
        if isinstance(value, yaml.MappingNode):
            yield from _entries(value, recipe, f"{name}.")
        else:
            yield name, key, value


def _tokens(name: str, hint: Any, value: yaml.Node, recipe: Path) -> list[str]:
    flag = f"--{FLAG_OF.get(name, name)}".replace("_", "-")
    if get_origin(hint) is tuple:
        items = value.value if isinstance(value, yaml.SequenceNode) else [value]
        for item in items:
            if not isinstance(item, yaml.ScalarNode) or _is_null(item):
                raise UserError(f"{_at(recipe, item)}: {name} is a list of plain values")
            if item.value.startswith("-"):  # the parser would take it for a flag
                raise UserError(f"{_at(recipe, item)}: {name}: an item may not begin with '-': {item.value}")
        return [flag, *(item.value for item in items)]
    if not isinstance(value, yaml.ScalarNode):
        raise UserError(f"{_at(recipe, value)}: {name} takes one value, not a list")
    if hint is not bool:
        return [f"{flag}={value.value}"]
    if not value.tag.endswith(":bool"):
        raise UserError(f"{_at(recipe, value)}: {name} is true or false, not {value.value}")
    if yaml.SafeLoader.bool_values[value.value.lower()]:
        return [flag]
    section, dot, last = flag.removeprefix("--").rpartition(".")
    return [f"--{section}{dot}no-{last}"]


def _leaves(config: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, type) of every option of a configuration class."""
    for name, hint in get_type_hints(config).items():
        if is_dataclass(hint):
            yield from _leaves(hint, f"{prefix}{name}.")
        else:
            yield prefix + name, hint


def _written(config: Any) -> Iterator[str]:
    docs = _docs(type(config))
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    for name, value in sorted(values.items(), key=lambda item: is_dataclass(item[1])):  # plain keys, then sections
        if is_dataclass(value):
            yield f"\n{_comment(type(value))}\n{name}:\n" + textwrap.indent("\n".join(_written(value)), "  ")
        else:
            yield textwrap.indent(docs[name], "# ") + f"\n{name}: {_scalar(value)}"


def _scalar(value: Any) -> str:
    """A value, or a list of them, as YAML on one line."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(_scalar, value))}]"
    plain = str(value) if isinstance(value, Path) else value
    style = '"' if isinstance(plain, str) and not plain.isprintable() else None
    text = yaml.safe_dump(plain, default_flow_style=True, default_style=style, width=float("inf"), allow_unicode=True)
    return text.removesuffix("...\n").rstrip("\n")


def _comment(config: type) -> str:
    return textwrap.indent(inspect.getdoc(config) or "", "# ")


def _docs(config: type) -> dict[str, str]:
    """The docstrings under the fields of a dataclass and of those it is made from."""
    inherited = {
        name: doc for parent in config.__bases__ if is_dataclass(parent) for name, doc in _docs(parent).items()
    }
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(config))).body
    pairs = zip(body.body, body.body[1:], strict=False)
    return inherited | {
        field.target.id: inspect.cleandoc(doc.value.value) if isinstance(doc, ast.Expr) else ""
        for field, doc in pairs
        if isinstance(field, ast.AnnAssign)
    }


def _is_null(node: yaml.Node) -> bool:
    return node.tag.endswith(":null")


def _at(recipe: Path, node: yaml.Node) -> str:
    return f"{recipe}:{node.start_mark.line + 1}"


def _name(flag: str) -> str:
    return flag.partition("=")[0].replace("_", "-")


def _suggest(name: str, known: Iterable[str]) -> str:
    """A question to append to a message, where something known looks like `name` or ends in the same word."""
    last = name.rpartition(".")[2]
    near = difflib.get_close_matches(name, known, n=1) or [k for k in known if k.rpartition(".")[2] == last]
    return f"; did you mean {near[0]}?" if near else ""
