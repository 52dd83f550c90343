"""Rewrite conversations for chat templates that lack tools, the system role, or free order of roles."""

import json

from lowalign.data.rows.turns import Message, Tools

TOOLS = 'You can call these functions. To call one, answer with {"name": …, "arguments": {…}} and nothing else.'


def tools_as_text(messages: list[Message], tools: Tools) -> list[Message]:
    """The conversation for a template without tools: functions described in the system message, calls as text of the
    assistant, results as user turns."""
    rewritten = []
    for message in messages:
        content = message["content"]
        if calls := message.get("tool_calls"):
            lines = [json.dumps(call["function"], ensure_ascii=False) for call in calls]
            content = "\n".join([content, *lines] if content else lines)
        if message["role"] == "tool":
            message, content = {"role": "user"}, f"Function result:\n{content}"
        rewritten.append({k: v for k, v in message.items() if k != "tool_calls"} | {"content": content})
    return tools_in_system(rewritten, tools)


def tools_in_system(messages: list[Message], tools: Tools) -> list[Message]:
    """The messages with the functions described in the system message."""
    if not tools:
        return messages
    described = "\n".join([TOOLS, *(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)])
    if messages[0]["role"] == "system":
        return [messages[0] | {"content": f"{messages[0]['content']}\n\n{described}"}, *messages[1:]]
    return [{"role": "system", "content": described}, *messages]


def system_as_user(messages: list[Message]) -> list[Message]:
    """The conversation for a template without a system role: system texts at the beginning of the first user turn."""
    texts = [m["content"] for m in messages if m["role"] == "system"]
    rest = [m for m in messages if m["role"] != "system"]
    first = next((i for i, m in enumerate(rest) if m["role"] == "user"), None)
    if not texts or first is None:
        return messages
    rest[first] = rest[first] | {"content": "\n\n".join([*texts, rest[first]["content"]])}
    return rest


def alternating(messages: list[Message]) -> list[Message]:
    """The conversation for a template that requires alternating roles: assistant turns before the first user turn are left
    out, consecutive turns of one role are joined."""
    first = next((i for i, m in enumerate(messages) if m["role"] == "user"), 0)
    kept = [m for i, m in enumerate(messages) if i >= first or m["role"] == "system"]
    joined: list[Message] = []
    for message in kept:
        last = joined[-1] if joined else None
        joinable = last is not None and {**last, "content": ""} == {**message, "content": ""}
        if joinable and "tool_calls" not in message and message["role"] != "tool":
            joined[-1] = last | {"content": f"{last['content']}\n\n{message['content']}"}
        else:
            joined.append(message)
    return joined


def with_call_form(messages: list[Message], text: bool, null: bool) -> list[Message]:
    """The messages for a template that takes the arguments of calls as JSON strings (`text`), and null as the content of a
    turn that only calls (`null`)."""
    if not (text or null):
        return messages
    return [_in_call_form(m, text, null) if "tool_calls" in m else m for m in messages]


def _in_call_form(message: Message, text: bool, null: bool) -> Message:
    calls = message["tool_calls"]
    if text:
        functions = [call["function"] for call in calls]
        written = [f | {"arguments": json.dumps(f["arguments"], ensure_ascii=False)} for f in functions]
        calls = [call | {"function": function} for call, function in zip(calls, written, strict=True)]
    return message | {"tool_calls": calls, "content": message["content"] or (None if null else "")}


def with_short_ids(messages: list[Message]) -> list[Message]:
    """The messages, the ids of calls and results rewritten to nine letters and digits, which Mistral's templates demand."""
    ids = {}
    for message in messages:
        for call in message.get("tool_calls", ()):
            ids.setdefault(call["id"], f"call{len(ids) + 1:05d}")
    rewritten = []
    for message in messages:
        if "tool_calls" in message:
            message = message | {"tool_calls": [call | {"id": ids[call["id"]]} for call in message["tool_calls"]]}
        if message.get("tool_call_id") in ids:
            message = message | {"tool_call_id": ids[message["tool_call_id"]]}
        rewritten.append(message)
    return rewritten


def opening_unsupervised(messages: list[Message]) -> list[Message]:
    """The messages with "weight": 0 on assistant turns before the first user turn, if there is one."""
    first = next((i for i, m in enumerate(messages) if m["role"] == "user"), 0)
    return [m | {"weight": 0} if i < first and m["role"] == "assistant" else m for i, m in enumerate(messages)]
