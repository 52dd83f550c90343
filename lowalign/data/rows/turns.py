"""Turns of a conversation, in OpenAI's or ShareGPT's format, to the messages and tools that chat templates expect.

A message is {"role": "system" | "user" | "assistant" | "tool", "content": str} with, where they apply, "tool_calls",
"tool_call_id" and "name", "reasoning_content", and "weight" on an assistant turn: its factor in the loss of SFT, 0 where it is
not supervised; absent: 1.
"""

import difflib
import json
from collections.abc import Collection
from typing import Any

from lowalign.data.sources.row import RowError
from lowalign.data.sources.strict_json import half_surrogate, json_type

Message = dict[str, Any]
Prompt = str | list[Message]  # plain text, or messages; also an answer to one
Tools = list[dict[str, Any]] | None
ROLES = {
    **{name: name for name in ("system", "user", "assistant", "tool")},
    "developer": "system",
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "model", "chatgpt", "ai", "bot"), "assistant"),
    **dict.fromkeys(("observation", "function", "function_response", "tool_response"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "call"),
}
HIGHEST_WEIGHT = 10  # a percentage is a mistake
REASONING = ("reasoning_content", "reasoning", "thinking")


def expected(name: str, names: Collection[str]) -> str:
    """`expected "completion", found "completoin"; did you mean "completion"?`"""
    close = closest(name, names)
    if close:
        return f'expected "{name}", found "{close}"; did you mean "{name}"?'
    return f'expected "{name}", found ' + (", ".join(f'"{other}"' for other in names) or "nothing")


def closest(name: str, names: Collection[str]) -> str | None:
    """The one of `names` most like `name`, ignoring case; None if none is close."""
    by_lower = {other.lower(): other for other in names}
    close = difflib.get_close_matches(name.lower(), by_lower, 1, cutoff=0.75)
    return by_lower[close[0]] if close else None


def weight_of(message: Message) -> float:
    """The factor of the message's tokens in the loss: 0 where it is no assistant turn to learn from."""
    return message.get("weight", 1) if message["role"] == "assistant" else 0


def is_supervised(message: Message) -> bool:
    """Whether the message is an assistant turn to learn from."""
    return weight_of(message) != 0


def require_answer(messages: list[Message], column: str = "") -> list[Message]:
    """The messages. Raises RowError when no assistant turn among them is supervised."""
    if not any(map(is_supervised, messages)):
        raise RowError(f"{column}: no assistant turn to learn from".removeprefix(": "))
    return messages


def unsupervised(messages: list[Message]) -> list[Message]:
    """The messages with "weight": 0 on all assistant turns, as in a prompt."""
    return [m | {"weight": 0} if m["role"] == "assistant" else m for m in messages]


def only_last(messages: list[Message]) -> list[Message]:
    """The messages with "weight": 0 on all supervised turns but the last."""
    last = max(i for i, message in enumerate(messages) if is_supervised(message))
    return [*unsupervised(messages[:last]), *messages[last:]]


def as_messages(value: Any, role: str = "user") -> Any:
    """A text as one message of `role`; anything else as it is."""
    return [{"role": role, "content": value}] if isinstance(value, str) else value


def read_turns(value: Any, column: str) -> list[Message]:
    """The messages of a list of turns. Raises RowError, which names the turn as in `messages[2]`."""
    if not isinstance(value, list):
        raise RowError(f'"{column}" must be a list of turns, found {json_type(value)}')
    if not value:
        raise RowError(f'"{column}" is empty')
    role_key = "from" if column == "conversations" else "role"
    messages = [_message(turn, f"{column}[{i}]", role_key) for i, turn in enumerate(value)]
    _match_results(messages)
    return messages


def _message(turn: Any, at: str, role_key: str) -> Message:
    if not isinstance(turn, dict):
        raise RowError(f"{at} must be an object, found {json_type(turn)}")
    role_key = next((key for key in ("role", "from") if key in turn), role_key)
    content_key = "value" if role_key == "from" else "content"
    if role_key not in turn:
        raise RowError(f"{at}: {expected(role_key, turn)}")
    role = ROLES.get(turn[role_key]) if isinstance(turn[role_key], str) else None
    if role is None:
        close = closest(str(turn[role_key]), ROLES)
        hint = f'; did you mean "{close}"?' if close else f"; roles are {', '.join(ROLES)}"
        raise RowError(f"{at}: unknown {role_key} {json.dumps(turn[role_key], ensure_ascii=False)}{hint}")
    if role == "call":
        return {"role": "assistant", "content": "", "tool_calls": _calls(turn.get(content_key), f"{at}.{content_key}")}
    calls = turn.get("tool_calls") or ([turn["function_call"]] if turn.get("function_call") else None)
    if calls and role != "assistant":
        raise RowError(f"{at}: only a turn of the assistant can have calls, found them in one of the {role}")
    if turn.get(content_key) is None and not calls:
        if content_key in turn:
            raise RowError(f'{at}: "{content_key}" is null')
        raise RowError(f"{at}: {expected(content_key, [key for key in turn if key != role_key])}")
    message = {"role": role, "content": _content(turn.get(content_key), f"{at}.{content_key}")}
    if role == "assistant":
        if calls:
            message["tool_calls"] = _calls(calls, f"{at}.tool_calls")
        reasoning = next((turn[key] for key in REASONING if isinstance(turn.get(key), str)), "")
        if reasoning:
            message["reasoning_content"] = reasoning
        if not calls and not reasoning and not message["content"].strip():
            raise RowError(f"{at}: the assistant turn is empty")
        weight = turn.get("weight", turn.get("loss_weight"))
        if weight not in (None, 1):
            message["weight"] = _weight(weight, at)
    message |= {key: turn[key] for key in ("tool_call_id", "name") if role == "tool" and isinstance(turn.get(key), str)}
    return message


def _weight(value: Any, at: str) -> float:
    if not isinstance(value, int | float) or not 0 <= value <= HIGHEST_WEIGHT:
        raise RowError(f'{at}: "weight" must be a number from 0 to {HIGHEST_WEIGHT}, found {json.dumps(value)}')
    return value or 0  # false too


def _content(value: Any, at: str) -> str:
    """A string, or the text parts of a list joined, so that special tokens spread over two parts are found too."""
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, dict | bool | int | float):
        raise RowError(f"{at} must be a string or a list of text parts, found {json_type(value)}")
    texts = []
    for j, part in enumerate(value):
        if isinstance(part, dict) and part.get("type", "text") != "text":
            raise RowError(f"{at}[{j}]: only text is supported, found a part of type {json.dumps(part['type'])}")
        text = next((part[k] for k in ("text", "value") if k in part), None) if isinstance(part, dict) else part
        if not isinstance(text, str):
            raise RowError(f'{at}[{j}] must be {{"type": "text", "text": …}}')
        texts.append(text)
    return "".join(texts)


def _calls(value: Any, at: str) -> list[dict[str, Any]]:
    """[{"id": …?, "type": "function", "function": {"name": str, "arguments": dict}}]: templates need a dict there."""
    value = _from_json(value, at)
    calls = []
    for call in value if isinstance(value, list) else [value]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError(f'{at}: a call must be an object with "name" and "arguments"')
        arguments = function.get("arguments")
        arguments = {} if arguments in (None, "") else _from_json(arguments, f"{at}: the arguments")
        if not isinstance(arguments, dict):
            raise RowError(f"{at}: the arguments must be an object, found {json_type(arguments)}")
        call_id = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        calls.append(
            call_id
            | {"type": "function", "function": {"name": function["name"], "arguments": _without_nulls(arguments)}}
        )
    if not calls:
        raise RowError(f"{at}: no call in it")
    return calls


def _without_nulls(value: Any) -> Any:
    """The value without keys whose value is null: Parquet gives every call the arguments of all calls, most of them null."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _from_json(value: Any, at: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        data = json.loads(value, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise RowError(f"{at}: not JSON ({error})") from error
    if problem := half_surrogate(data, value):
        raise RowError(f"{at}: {problem}")
    return data


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} in it")


def _match_results(messages: list[Message]) -> None:
    """Give an id to each call that has none (nine letters and digits, as Mistral's templates demand), and to each result
    the id and name of its call."""
    count, open_calls = 0, []
    for message in messages:
        for call in message.get("tool_calls", ()):
            count += 1
            call.setdefault("id", f"call{count:05d}")
            open_calls.append(call)
        if message["role"] == "tool":
            call_id = message.get("tool_call_id")
            call = next((c for c in open_calls if call_id in (None, c["id"])), None)
            if call is not None:
                open_calls.remove(call)
                message.setdefault("tool_call_id", call["id"])
                message.setdefault("name", call["function"]["name"])


def read_tools(value: Any) -> Tools:
    """The functions of a list, each bare or in OpenAI's {"type": "function", …}, or of that list as a JSON string.

    None when there are none. Raises RowError.
    """
    value = _from_json(value, '"tools"') if value != "" else None
    if value in (None, []):
        return None
    if not isinstance(value, list):
        raise RowError(f'"tools" must be a list of functions, found {json_type(value)}')
    tools = []
    for i, tool in enumerate(value):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            problem = expected("name", function) if isinstance(function, dict) else f"found {json_type(tool)}"
            raise RowError(f"tools[{i}]: a tool must be an object with a name; {problem}")
        tools.append({"type": "function", "function": function})
    return tools
