"""Write the pages that follow from the code: docs/options.md from the dataclasses of the options, docs/api.md from docstrings.

    python scripts/reference.py

tests/test_docs.py fails where a page is not up to date.
"""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import lowalign
from lowalign.config.dump import docs, scalar
from lowalign.config.verbs import VERBS, Verb
from lowalign.errors import UserError
from lowalign.train.method import Method

DOCS = Path(__file__).parents[1] / "docs"
NOTE = "<!-- Written by scripts/reference.py; edit the docstrings instead. -->\n"
FUNCTIONS = ("sft", "reward", "dpo", "ppo", "best_of_n", "train_with", "merge", "push", "pull")
MAKERS = ("LoRA", "PromptTuning", "PrefixTuning")
CLASSES = ("Run", "Base", "Host", "Example", "Sampling")


def main() -> None:
    for name, text in pages().items():
        (DOCS / name).write_text(text, encoding="utf-8")


def pages() -> dict[str, str]:
    """The text of each page."""
    return {"options.md": "\n".join(options_page()), "api.md": "\n".join(api_page())}


# -- options -----------------------------------------------------------------------------------------------------------


def options_page() -> Iterator[str]:
    """Each verb with its own options, and below them the sections that verbs share."""
    yield f"# All options\n\n{NOTE}"
    yield "A flag `--train.batch-size` is the key `batch_size` in the section `train` of a recipe, and in Python"
    yield '`train={"batch_size": …}`, or `batch_size=…` where one option has that name. `lowalign VERB --help` shows the same. An option that is'
    yield "a list takes several values: `--data a.jsonl b.jsonl`. A switch `--resume` is turned off by `--no-resume`.\n"
    sections: dict[type, str] = {}
    for group, verbs in VERBS.items():
        for verb in verbs:
            if verb.config is not None:
                yield from verb_options(verb, group, sections)
    yield "## Sections\n"
    for kind, prefix in list(sections.items()):
        yield f"### {heading(kind, prefix)}\n\n{cell(inspect.getdoc(kind))}\n"
        yield from table(kind, prefix, kind())


def verb_options(verb: Verb, group: str, sections: dict[type, str]) -> Iterator[str]:
    """One verb. Its sections are added to `sections`."""
    yield f"## {verb.name}\n\n{cell(inspect.getdoc(verb.config))}\n\n`lowalign {verb.name} {verb.usage}`\n"
    yield from table(verb.config, "", None)
    links = []
    for name, kind, default, prefix in sections_of(verb.config):
        nested = [(f"{prefix}{n}.", k) for n, k, _, _ in sections_of(kind)]
        for inner, of in ((prefix, kind), *nested):
            sections.setdefault(of, inner)
        other = [
            f"`{f.name}` {scalar(getattr(default, f.name))}"
            for f in fields(kind)
            if not is_dataclass(getattr(default, f.name)) and getattr(default, f.name) != getattr(kind(), f.name)
        ]
        title = heading(kind, sections[kind])
        text = f"[`{name}`](#{anchor(title)})" + (f" (flags without `{name}.`)" if not prefix else "")
        links.append(text + (f", with other defaults: {', '.join(other)}" if other else ""))
    if links:
        yield f"Sections: {'; '.join(links)}.\n"


def sections_of(config: type) -> Iterator[tuple[str, type, Any, str]]:
    """(name, class, default, prefix of its flags) of the options that are sections."""
    hints = get_type_hints(config, include_extras=True)
    for field in fields(config):
        kind, marks = plain(hints[field.name])
        if is_dataclass(kind):
            named = [mark.name for mark in marks if getattr(mark, "name", None) is not None]
            yield field.name, kind, field.default_factory(), "" if named == [""] else f"{field.name}."


def table(config: type, prefix: str, default: Any) -> Iterator[str]:
    """Flag, values, default and meaning of each option that is no section."""
    explained, hints = docs(config), get_type_hints(config, include_extras=True)
    rows = []
    for field in fields(config):
        kind, marks = plain(hints[field.name])
        if is_dataclass(kind):
            continue
        value = (
            field.default
            if field.default is not MISSING
            else field.default_factory()
            if field.default_factory is not MISSING
            else MISSING
        )
        shown = (
            "required"
            if value is MISSING
            else ""
            if value in (None, ())
            else f"`{value if isinstance(value, str) else scalar(value)}`"
        )
        rows.append(f"| {flag(prefix, field.name, marks)} | {values(kind)} | {shown} | {cell(explained[field.name])} |")
    if rows:
        yield "\n".join(["| option | values | default | |", "|---|---|---|---|", *rows, ""])


def flag(prefix: str, name: str, marks: tuple) -> str:
    """As on the command line; an argument without a flag by its name."""
    name = next((mark.name for mark in marks if getattr(mark, "name", None)), name)
    if any(getattr(mark, "prefix_name", None) is False for mark in marks):
        prefix = ""
    if any("Positional" in repr(mark) for mark in marks):
        return next((f"`{mark.metavar}`" for mark in marks if getattr(mark, "metavar", None)), f"`{name.upper()}`")
    aliases = [alias for mark in marks for alias in getattr(mark, "aliases", None) or ()]
    return ", ".join(f"`{text}`" for text in (*aliases, f"--{prefix}{name}".replace("_", "-")))


def plain(hint: Any) -> tuple[Any, tuple]:
    """The type below Annotated, and its marks."""
    marks: tuple = ()
    while get_origin(hint) is Annotated:
        hint, *more = get_args(hint)
        marks += tuple(more)
    return hint, marks


def values(kind: Any) -> str:
    """What an option takes, in words."""
    kind, _ = plain(kind)
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(values(inner) for inner in get_args(kind) if inner is not type(None))
    if get_origin(kind) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(kind))
    if get_origin(kind) is tuple:
        inner = get_args(kind)
        return f"list of {values(inner[0])}" if inner[-1] is ... else f"{len(inner)} of {values(inner[0])}"
    return {bool: "switch", int: "whole number", float: "number", str: "text", Path: "path"}[kind]


def heading(kind: type, prefix: str) -> str:
    """Of a section: its name and the class."""
    return f"{prefix.rstrip('.') or 'sampling'}: {kind.__name__}"


def anchor(title: str) -> str:
    """The id that a heading gets."""
    return "".join(c for c in title.lower().replace(" ", "-") if c.isalnum() or c in "-_")


def cell(text: str | None) -> str:
    """Of a docstring, in one cell of a table."""
    return " ".join((text or "").split()).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


# -- Python ------------------------------------------------------------------------------------------------------------


def api_page() -> Iterator[str]:
    """The functions and classes of `import lowalign`."""
    yield f"# API reference\n\n{NOTE}"
    yield "`import lowalign as la` has these. [Python](python.md) shows how they go together; the options of the functions are those of the"
    yield "commands ([all options](options.md)).\n"
    for title, names in (("Runs", FUNCTIONS), ("Adapters", MAKERS)):
        yield f"## {title}\n"
        for name in names:
            yield from described(f"la.{name}", getattr(lowalign, name), "###")
    for name in CLASSES:
        yield from class_of(f"la.{name}", getattr(lowalign, name))
    yield from class_of("lowalign.train.method.Method", Method)
    yield from class_of("lowalign.errors.UserError", UserError)


def class_of(name: str, kind: type) -> Iterator[str]:
    """A class: its docstring, its fields, its public methods and properties."""
    yield f"## {name}\n\n{prose(kind)}\n"
    if is_dataclass(kind) and (explained := {key: text for key, text in docs(kind).items() if text}):
        yield "\n".join(
            ["| field | |", "|---|---|", *(f"| `{key}` | {cell(text)} |" for key, text in explained.items()), ""]
        )
    for member, value in vars(kind).items():
        if member.startswith("_"):
            continue
        function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        if inspect.isfunction(function) and function.__module__ == kind.__module__:
            yield from described(member, function, "###", "" if isinstance(value, property) else None)


def described(name: str, function: Any, marks: str, signature: str | None = None) -> Iterator[str]:
    """A function: its signature and docstring. signature: "" for a property."""
    yield f"{marks} {name}\n"
    if signature is None:
        yield f"```python\n{signature_of(name.rpartition('.')[2], function)}\n```\n"
    yield f"{prose(function)}\n"


def signature_of(name: str, function: Any) -> str:
    """As it is written, one line or an argument a line."""
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    node.args.args = [argument for argument in node.args.args if argument.arg not in ("self", "cls")]
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    line = f"{name}({ast.unparse(node.args)}){returns}"
    if len(line) <= 100:
        return line
    return f"{name}(\n" + "".join(f"    {argument},\n" for argument in arguments(node.args)) + f"){returns}"


def arguments(args: ast.arguments) -> Iterator[str]:
    """Each argument with its annotation and default."""
    defaults = [None] * (len(args.args) - len(args.defaults)) + list(args.defaults)
    written = lambda a, d: ast.unparse(a) + (f" = {ast.unparse(d)}" if d is not None else "")  # noqa: E731
    yield from (written(a, d) for a, d in zip(args.args, defaults, strict=True))
    if args.vararg:
        yield f"*{ast.unparse(args.vararg)}"
    elif args.kwonlyargs:
        yield "*"
    yield from (written(a, d) for a, d in zip(args.kwonlyargs, args.kw_defaults, strict=True))
    if args.kwarg:
        yield f"**{ast.unparse(args.kwarg)}"


def prose(thing: Any) -> str:
    """A docstring as Markdown."""
    text = inspect.getdoc(thing) or ""
    return "\n".join(
        line if line.startswith("    ") else line.replace("<", "&lt;").replace("*", "\\*") for line in text.splitlines()
    )


if __name__ == "__main__":
    main()
