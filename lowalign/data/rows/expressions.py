"""Jinja in presets and flags, in a sandbox and for a limited time: `{{…}}` in a text, or a value if it is the whole text."""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import jinja2
from jinja2 import StrictUndefined, Undefined, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

from lowalign.data.rows.time_limit import TookTooLong, time_limit
from lowalign.data.rows.transcripts import alternating, function_calls, json_objects, transcript
from lowalign.data.rows.turns import expected
from lowalign.data.sources.row import RowError
from lowalign.data.sources.strict_json import json_value
from lowalign.errors import UserError

LONGEST = 50_000_000  # characters, or items: what a template may build with one * or **
Compiled = Callable[[Mapping[str, Any]], Any]


class _Sandbox(ImmutableSandboxedEnvironment):
    """No attribute that begins with an underscore, no change of a value, no `"a" * 10**12`."""

    intercepted_binops = frozenset(["*", "**"])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        for value, count in ((left, right), (right, left)):
            sequence = operator == "*" and isinstance(value, str | list | tuple) and isinstance(count, int)
            if sequence and len(value) * count > LONGEST:
                raise SecurityError(f"a repetition of {len(value) * count:,} characters or items")
        if operator == "**" and (abs(right) > 1000 or abs(left) > 10**9):
            raise SecurityError("a power of too large numbers")
        return super().call_binop(context, operator, left, right)


SANDBOX = _Sandbox(undefined=StrictUndefined, autoescape=False)
SANDBOX.filters |= {
    "fromjson": json_value,
    "tojson": lambda value: json.dumps(value, ensure_ascii=False),
    "transcript": transcript,
    "function_calls": function_calls,
    "json_objects": json_objects,
    "alternating": alternating,
    "zip": lambda first, *others: zip(first, *others, strict=True),
}


def compiled(value: Any, what: str) -> Compiled:
    """A function of a row's columns that returns the value, with each text of it evaluated.

    what: the flag or the key, for messages. The function raises RowError, and TookTooLong. Raises UserError for a text that is
    not Jinja.
    """
    if isinstance(value, dict):
        inner = {key: compiled(item, f"{what}.{key}") for key, item in value.items()}
        return lambda columns: {key: evaluate(columns) for key, evaluate in inner.items()}
    if isinstance(value, list):
        items = [compiled(item, f"{what}[{i}]") for i, item in enumerate(value)]
        return lambda columns: [evaluate(columns) for evaluate in items]
    if not isinstance(value, str) or not ("{{" in value or "{%" in value):
        return lambda columns: value
    try:
        if expression := _expression(value.strip()):
            return _guarded(SANDBOX.compile_expression(expression, undefined_to_none=False), what)
        return _guarded(SANDBOX.from_string(value).render, what)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"{what}: not a Jinja template ({error.message}): {value}") from error
    except RecursionError as error:
        raise UserError(f"{what}: nested too deeply for a template") from error


def _expression(template: str) -> str | None:
    """The expression of a template that is `{{…}}` as a whole; None for others."""
    match SANDBOX.parse(template).body:
        case [nodes.Output(nodes=[node])] if template[:2] == "{{" and template[-2:] == "}}":
            return None if isinstance(node, nodes.TemplateData) else re.sub(r"^[-+]|[-+]$", "", template[2:-2])
    return None


def _guarded(evaluate: Callable[..., Any], what: str) -> Compiled:
    def guarded(columns: Mapping[str, Any]) -> Any:
        try:
            with time_limit():
                return _defined(evaluate(columns))
        except jinja2.UndefinedError as error:
            name = re.fullmatch(r"'([^']+)' is undefined", error.message or "")
            reason = expected(name[1], [name for name in columns if name != "row"]) if name else error.message
            raise RowError(f"{what}: {reason}") from error
        except TookTooLong as error:
            raise TookTooLong(f"{what}: the template does not end: {error}") from error
        except Exception as error:  # a template is a program: it can fail in any way
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise RowError(f"{what}: the template fails on this row: {reason}") from error

    return guarded


def _defined(value: Any) -> Any:
    """The value. Raises UndefinedError where it is undefined, or has something undefined in it."""
    if isinstance(value, Undefined):
        raise jinja2.UndefinedError(value._undefined_message)
    if isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            _defined(inner)
    return value
