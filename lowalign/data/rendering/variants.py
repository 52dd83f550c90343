"""The forms in which a conversation is offered to a chat template that lacks tools, a system role or free order of roles."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from lowalign.data.rendering.support import Support
from lowalign.data.rows.rewrite import (
    alternating,
    system_as_user,
    tools_as_text,
    tools_in_system,
    with_call_form,
    with_short_ids,
)
from lowalign.data.rows.turns import Message, Tools

TOOLS_NOTE = "tools written as plain text: the chat template does not support tools"
CALLS_NOTE = "tools written as plain text: the chat template supports tools, but refuses these calls"
DESCRIBED_NOTE = "functions described in the system text: the chat template writes calls, but no descriptions"
IDS_NOTE = "ids of calls rewritten to nine letters and digits: the chat template refuses others"
SYSTEM_NOTE = "system text put before the first user turn: the chat template has no system role"
JOINED_NOTE = "turns joined or a first assistant turn left out: the chat template requires alternating roles"


@dataclass(frozen=True)
class Variant:
    """A conversation, the same in the template's form of calls (`rendered`), and notes on what was changed in it."""

    messages: list[Message]
    tools: Tools
    rendered: list[Message]
    notes: list[str] = field(default_factory=list)


def variants(messages: list[Message], tools: Tools, support: Support, tool_template: bool) -> Iterator[Variant]:
    """The conversation, then variants of it, in the order in which the template is to try them. tool_template: rows with
    tools have a template of their own, which is chosen by a list of tools."""
    for variant in _with_calls(messages, tools, support, tool_template):
        if any(m["role"] == "system" for m in variant.messages) and not support.system:
            variant = _rewritten(variant, system_as_user, SYSTEM_NOTE)
        yield variant
        joined = _rewritten(variant, alternating, JOINED_NOTE)
        if joined.messages != variant.messages:
            yield joined


def _with_calls(messages: list[Message], tools: Tools, support: Support, tool_template: bool) -> Iterator[Variant]:
    if not tools and not any(m["role"] == "tool" or "tool_calls" in m for m in messages):
        yield Variant(messages, tools, messages)
        return
    form = support.calls
    if form is not None:
        functions = [] if tools is None and tool_template else tools
        turns, notes = messages, []
        if tools and not form.described:
            turns, functions, notes = tools_in_system(messages, tools), None, [DESCRIBED_NOTE]
        as_called = with_call_form(turns, form.text, form.null)
        yield Variant(turns, functions, as_called, notes)
        if (renamed := with_short_ids(as_called)) != as_called:
            yield Variant(turns, functions, renamed, [*notes, IDS_NOTE])
    as_text = tools_as_text(messages, tools)
    yield Variant(as_text, None, as_text, [CALLS_NOTE if form else TOOLS_NOTE])


def _rewritten(variant: Variant, rewrite, note: str) -> Variant:
    messages, rendered = rewrite(variant.messages), rewrite(variant.rendered)
    return replace(variant, messages=messages, rendered=rendered, notes=[*variant.notes, note])
