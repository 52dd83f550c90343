"""A configuration as the YAML of a complete recipe: every key, under the docstring of its field."""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from lowalign.config.verbs import verb_of


def dump(config: Any) -> str:
    """The YAML of a whole configuration, each key under its explanation. Parsing it gives an equal configuration."""
    verb = verb_of(type(config))
    head = [f"# The command that this recipe is for.\nverb: {verb}"] if verb else []
    return "\n".join([_comment(type(config)) + "\n", *head, *_entries(config)]) + "\n"


def scalar(value: Any) -> str:
    """A value, or a list of them, as YAML on one line."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(scalar, value))}]"
    plain = str(value) if isinstance(value, Path) else value
    style = '"' if isinstance(plain, str) and not plain.isprintable() else None
    text = yaml.safe_dump(plain, default_flow_style=True, default_style=style, width=float("inf"), allow_unicode=True)
    return text.removesuffix("...\n").rstrip("\n")


@cache
def docs(config: type) -> dict[str, str]:
    """The docstrings under the fields of a dataclass and of those it is made from."""
    inherited = {name: doc for parent in config.__bases__ if is_dataclass(parent) for name, doc in docs(parent).items()}
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(config))).body
    pairs = zip(body.body, body.body[1:], strict=False)
    return inherited | {
        field.target.id: inspect.cleandoc(doc.value.value) if isinstance(doc, ast.Expr) else ""
        for field, doc in pairs
        if isinstance(field, ast.AnnAssign)
    }


def _entries(config: Any) -> Iterator[str]:
    explained = docs(type(config))
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    for name, value in sorted(values.items(), key=lambda item: is_dataclass(item[1])):  # plain keys, then sections
        if is_dataclass(value):
            yield f"\n{_comment(type(value))}\n{name}:\n" + textwrap.indent("\n".join(_entries(value)), "  ")
        else:
            yield textwrap.indent(explained[name], "# ") + f"\n{name}: {scalar(value)}"


def _comment(config: type) -> str:
    return textwrap.indent(inspect.getdoc(config) or "", "# ")
