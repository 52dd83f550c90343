"""Recipes: find one, parse it together with the user's flags, complete it, compare two configurations.

A recipe is flags written in YAML: its keys become flags, the user's own flags follow, one parser checks them all.
"""

import contextlib
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, replace
from itertools import zip_longest
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import tyro

from lowalign.config.dump import docs, dump, scalar
from lowalign.config.flags import checked
from lowalign.config.help import readable_help
from lowalign.config.verbs import RECIPE, verb_of, verbs
from lowalign.config.yaml_flags import Flag, flag_of, options, read, suggest, verb_in
from lowalign.errors import UserError

T = TypeVar("T")

DATA_FOLDERS = ("presets", "templates")  # of adapters/: meanings of columns, not recipes
# What may differ when a run is resumed. `out` may: a run folder can be moved, and named in several ways.
MAY_CHANGE = {
    *("out", "resume", "train.steps", "train.save_every", "train.log_every", "train.eval_every", "train.keep"),
    *("train.track", "train.run_name", "train.token_budget", "train.result", "rounds", "rollout.eval_every"),
    *("base.leave_free", "fit", "train.epochs"),
    "train.optimizer",  # paged or not; the state of another optimizer is refused when it is read
}


def packaged() -> dict[str, Path]:
    """The recipes that come with lowalign, by name: {"lora/sft": path}."""
    return {name: path for name, path in _shipped().items() if name.partition("/")[0] not in DATA_FOLDERS}


def data_presets() -> dict[str, Path]:
    """What --data.preset knows by name: {"dolly": path, "templates/summarisation": path}."""
    files = {name: path for name, path in _shipped().items() if name.partition("/")[0] in DATA_FOLDERS}
    return {name.removeprefix("presets/"): path for name, path in files.items()}


def _shipped() -> dict[str, Path]:
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
        raise UserError(f"there is no recipe {name}{suggest(short, known)} (`lowalign recipes list` names them)")
    return known[short]


def parse(config: type[T], flags: Sequence[str], recipe: Path | None = None, prog: str = "lowalign") -> T:
    """A `config` from the flags of `recipe` followed by `flags`; where both set an option, `flags` holds.

    Raises UserError for whatever is wrong in either, and SystemExit(0) once it has answered --help.
    """
    if recipe and flags and not flags[0].startswith("-"):  # it would join the last list of the recipe
        raise UserError(f"{prog}: options begin with --, found {flags[0]}")
    if recipe:
        _check_verb(recipe, config)
    words = checked(_with_values(flags), config, prog.removesuffix(f" {RECIPE}"))
    return _parse(config, words, recipe, read(recipe, config) if recipe else [], prog)


def parse_entries(config: type[T], entries: list[Flag], file: Path, recipe: Path | None = None) -> T:
    """A `config` from the flags in a part of `file`, which hold over those of `recipe`. Raises UserError."""
    own = {flag.key for flag in entries}
    below = [flag for flag in read(recipe, config) if flag.key not in own] if recipe else []
    return _parse(config, [], file, [*entries, *below], "lowalign")


def diff(old: Any, new: Any) -> list[str]:
    """The keys in which two configurations differ, less those that may change when a run is resumed."""
    changed = []
    for name, _ in options(type(new)):
        before, after = (attrgetter(name)(config) for config in (old, new))
        if before != after and name not in MAY_CHANGE:
            changed.append(f"{name}: {scalar(before)} -> {scalar(after)}")
    return changed


def complete(recipe: Path) -> str:
    """A recipe with every key under its explanation, below its own first comment."""
    named = verb_in(recipe)
    if named and named[0] == "run":  # a pipeline: its stages have the keys of their recipes
        return recipe.read_text()
    config = next((verb.config for verb in verbs() if named and verb.name == named[0]), None)
    if config is None:
        raise UserError(f"{recipe}: add the command that it is for, as a line `verb: sft`")
    entries = read(recipe, config)
    absent = [name for name in _required(config) if name not in {flag.key for flag in entries}]
    parsed = _parse(config, [f"{flag_of(name)}=" for name in absent], recipe, entries, "lowalign")
    title = re.match(r"(#.*\n)*", recipe.read_text())[0]
    return f"{title}\n{dump(replace(parsed, **dict.fromkeys(absent)))}"


def _parse(config: type[T], flags: Sequence[str], recipe: Path | None, entries: list[Flag], prog: str) -> T:
    overridden = {re.sub(r"(^--|\.)no-", r"\1", _name(flag)) for flag in flags}
    entries = [flag for flag in entries if flag_of(flag.key) not in overridden]
    for key, line, _, problem in entries:
        if problem:
            raise UserError(f"{recipe}:{line}: {key}: {problem}")
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            args = [*(t for flag in entries for t in flag.tokens), *flags]
            with readable_help() if {"-h", "--help"} & set(args) else contextlib.nullcontext():
                return tyro.cli(config, args=args, prog=prog)
    except UserError as error:  # from a __post_init__
        raise UserError(_located(str(error), recipe, {flag.key: flag.line for flag in entries})) from None
    except SystemExit as stop:
        if not stop.code:
            raise
    text = complaint.getvalue().rstrip()
    raise UserError(_missing(config, text) or _unboxed(text))


def _check_verb(recipe: Path, config: type) -> None:
    """Raise UserError when the recipe is for another verb than that of `config`."""
    named, verb = verb_in(recipe), verb_of(config)
    if not named or not verb or named[0] == verb:
        return
    known = packaged()
    name = next((name for name, path in known.items() if path == recipe), None)
    if name is None:
        raise UserError(
            f"{recipe}:{named[1]}: this is a recipe for {named[0]}, not for {verb}: lowalign {named[0]} {recipe}"
        )
    other = f"{name.partition('/')[0]}/{verb.replace('-', '_')}"
    question = f"; did you mean {other}?" if other in known else ""
    raise UserError(f"{name} is a recipe for {named[0]}, not for {verb}{question}")


def _with_values(flags: Sequence[str]) -> list[str]:
    """The flags, with `auto` after each --fit that stands alone."""
    words: list[str] = []
    for flag, following in zip_longest(flags, flags[1:], fillvalue="-"):
        words += (flag, "auto") if flag == "--fit" and following.startswith("-") else (flag,)
    return words


def _located(message: str, recipe: Path | None, lines: Mapping[str, int]) -> str:
    """The message with FILE:LINE before it, and keys instead of flags, where it names options set in the recipe.

    lines: the line of each key.
    """
    keys = {flag_of(key): key for key in lines}
    named = []

    def replaced(match: re.Match) -> str:
        key = keys.get(match[0])
        named.append(key)
        return key or match[0]

    message = re.sub(r"--\w+(?:[-.]\w+)*", replaced, message)
    line = next((lines[key] for key in named if key), None)
    return f"{recipe}:{line}: {message}" if line else message


def _missing(config: type, text: str) -> str:
    """A line for each required option that the parser's message says is missing; "" where that is not its message."""
    if "Missing from" not in text or "Unrecognized" in text:
        return ""
    explained, hints = docs(config), get_type_hints(config, include_extras=True)
    lines = []
    for name in _required(config):
        metavar = _metavar(hints[name])
        positional = tyro.conf.Positional in getattr(hints[name], "__metadata__", ())
        if re.search(rf"\b{re.escape(metavar)}\b" if positional else rf"{flag_of(name)}\b", text):
            what = explained[name].partition(". ")[0].rstrip(".")
            given = metavar if positional else f"{flag_of(name)} {metavar}"
            lines.append(f"give {given}: {what[0].lower()}{what[1:]}")
    return "\n".join(lines)


def _unboxed(text: str) -> str:
    """The parser's message on one line, without the frame."""
    inside = re.sub(r"[─╭╮╰╯│]", " ", text).partition("For full helptext")[0]
    return " ".join(inside.split())


def _required(config: type) -> list[str]:
    return [f.name for f in fields(config) if f.default is MISSING and f.default_factory is MISSING]


def _metavar(hint: Any) -> str:
    marks = (getattr(mark, "metavar", None) for mark in getattr(hint, "__metadata__", ()))
    return next(filter(None, marks), "VALUE")


def _name(flag: str) -> str:
    return flag.partition("=")[0].replace("_", "-")
