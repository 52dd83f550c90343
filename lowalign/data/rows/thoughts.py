"""The thoughts of an assistant turn, in a field of their own or in tags at the beginning of its text."""

import re

from lowalign.data.rows.turns import Message

TAGGED = re.compile(r"\s*(?:<think>|\[THINK\])(?P<thoughts>.*?)(?:</think>|\[/THINK\])\s*", re.DOTALL)


def thoughts_of(message: Message) -> str:
    """The turn's thoughts, stripped; "" when it has none."""
    tagged = TAGGED.match(message["content"] or "")
    return (message.get("reasoning_content") or (tagged["thoughts"] if tagged else "")).strip()


def text_of(message: Message) -> str:
    """The turn's text without thoughts."""
    content = message["content"] or ""
    tagged = TAGGED.match(content) if message["role"] == "assistant" else None
    return content[tagged.end() :] if tagged else content


def without_thoughts(messages: list[Message]) -> list[Message]:
    """The messages, their assistant turns without thoughts."""
    return [
        {k: v for k, v in m.items() if k != "reasoning_content"} | {"content": text_of(m)}
        if m["role"] == "assistant"
        else m
        for m in messages
    ]


def close_tag(tag: str) -> str | None:
    """</think> for <think>, [/THINK] for [THINK]; None for tags that open no thoughts."""
    name = tag[1:-1]
    return f"{tag[0]}/{name}{tag[-1]}" if "think" in name.lower() and "|" not in name else None
