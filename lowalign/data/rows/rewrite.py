"""What a chat template cannot say, said in a way that it can."""

import json
from typing import Any

from lowalign.data.rows.turns import Message

TOOLS = 'You can call these functions. To call one, answer with {"name": …, "arguments": {…}} and nothing else.'


def tools_as_text(messages: list[Message], tools: list[dict[str, Any]] | None) -> list[Message]:
    """The same conversation for a template without tools: functions described in the system message, calls as text of
    the assistant, results as user turns."""
    written = []
    for message in messages:
        content = message["content"]
        if calls := message.get("tool_calls"):
            lines = [json.dumps(call["function"], ensure_ascii=False) for call in calls]
            content = "\n".join([content, *lines] if content else lines)
        if message["role"] == "tool":
            message, content = {"role": "user"}, f"Function result:\n{content}"
        written.append({k: v for k, v in message.items() if k != "tool_calls"} | {"content": content})
    if tools:
        described = "\n".join([TOOLS, *(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)])
        if written[0]["role"] == "system":
            written[0] = written[0] | {"content": f"{written[0]['content']}\n\n{described}"}
        else:
            written.insert(0, {"role": "system", "content": described})
    return written


def system_as_user(messages: list[Message]) -> list[Message]:
    """The same conversation for a template without a system role: its text begins the first user turn."""
    texts = [m["content"] for m in messages if m["role"] == "system"]
    rest = [m for m in messages if m["role"] != "system"]
    first = next((i for i, m in enumerate(rest) if m["role"] == "user"), None)
    if not texts or first is None:
        return messages
    rest[first] = rest[first] | {"content": "\n\n".join([*texts, rest[first]["content"]])}
    return rest


def alternating(messages: list[Message]) -> list[Message]:
    """The same conversation for a template that wants user and assistant in turn: an assistant turn before the first
    user turn is left out, neighbouring turns of one role are joined."""
    first = next((i for i, m in enumerate(messages) if m["role"] == "user"), 0)
    kept = [m for i, m in enumerate(messages) if i >= first or m["role"] == "system"]
    joined: list[Message] = []
    for message in kept:
        last = joined[-1] if joined else None
        alike = last is not None and {**last, "content": ""} == {**message, "content": ""}
        if alike and "tool_calls" not in message and message["role"] != "tool":
            joined[-1] = last | {"content": f"{last['content']}\n\n{message['content']}"}
        else:
            joined.append(message)
    return joined
