"""What a chat template can render: the system role, tools, and the form in which it takes a call."""

from dataclasses import dataclass, replace
from functools import cached_property

from lowalign.data.rendering.template import ANSWER, SYSTEM, USER, Template, Unrenderable
from lowalign.data.rows.rewrite import with_call_form

# The call's id has nine letters and digits: Mistral's templates refuse any other.
FUNCTION = {"name": "probe_name", "description": "probe_description"}
PARAMETERS = {"type": "object", "properties": {"place": {"type": "string", "description": "A place."}}}
TOOL = {"type": "function", "function": FUNCTION | {"parameters": PARAMETERS, "return": {"type": "string"}}}
CALL = {
    "id": "call00001",
    "type": "function",
    "function": {"name": "probe_name", "arguments": {"place": "probe_place", "inner": {"open": True}}},
}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "probe_result", "name": "probe_name", "tool_call_id": "call00001"}
WRITTEN = ("probe_name", "probe_place", "probe_result", "probe_answer")
WRONG = ("'open': True", '\\"open\\"')  # arguments written as Python does, or as a string within JSON


@dataclass(frozen=True)
class CallForm:
    """How a template takes calls. text: the arguments as a JSON string, not an object. null: the content of a turn that
    only calls is null, not "". described: it writes the descriptions of the functions."""

    text: bool = False
    null: bool = False
    described: bool = True


class Support:
    """What a template can render, tried on a conversation of its own."""

    def __init__(self, template: Template):
        self._template = template

    @cached_property
    def system(self) -> bool:
        """Whether it renders a system message."""
        try:
            return "probe_system" in self._template.render([SYSTEM, USER])
        except Unrenderable:
            return False

    @cached_property
    def calls(self) -> CallForm | None:
        """The form in which it renders calls and their results; None: in no form. Of several the one whose arguments are
        JSON, and for which it describes the functions."""
        forms = [CallForm(text, null) for null in (False, True) for text in (False, True)]
        tried = [(form, self._rendered_calls(form)) for form in forms]
        rendered = [(form, text) for form, text in tried if all(word in text for word in WRITTEN)]
        if not rendered:
            return None
        described = lambda text: "probe_description" in text  # noqa: E731
        form, text = max(rendered, key=lambda pair: (not any(w in pair[1] for w in WRONG), described(pair[1])))
        return replace(form, described=described(text))

    def _rendered_calls(self, form: CallForm) -> str:
        turns = with_call_form([USER, CALLING, RESULT, ANSWER], form.text, form.null)
        try:
            return self._template.render(turns, [TOOL])
        except Unrenderable:
            return ""
