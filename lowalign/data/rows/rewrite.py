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
    if tools:
        described = "\n".join([TOOLS, *(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)])
        if rewritten[0]["role"] == "system":
            rewritten[0] = rewritten[0] | {"content": f"{rewritten[0]['content']}\n\n{described}"}
        else:
            rewritten.insert(0, {"role": "system", "content": described})
    return rewritten


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
