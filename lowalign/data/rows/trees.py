"""Trees of messages, as OpenAssistant publishes them (arXiv 2304.07327), to conversations or rankings.

A row is a whole tree ({"prompt": {…, "replies": […]}}) or one message of one, with the id of its parent.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from lowalign.data.sources.row import BadRow, Row
from lowalign.errors import UserError

KEYS = {"id": "message_id", "parent": "parent_id", "text": "text", "role": "role", "rank": "rank", "give": "best"}
GIVES = ("best", "rankings")
ROLES = {"prompter": "user", "assistant": "assistant"}


@dataclass
class _Node:
    """A message, its place, and the replies to it."""

    row: Row
    text: str
    role: str
    rank: float | None
    replies: list["_Node"] = field(default_factory=list)

    @property
    def turn(self) -> dict[str, str]:
        return {"role": ROLES.get(self.role, self.role), "content": self.text}

    @property
    def by_rank(self) -> list["_Node"]:
        """The replies, the best first; those without a rank last."""
        return sorted(self.replies, key=lambda reply: float("inf") if reply.rank is None else reply.rank)


def tree_rows(rows: Iterable[Row | BadRow], names: Mapping[str, str]) -> Iterator[Row | BadRow]:
    """The rows that trees give, each at the place of its first message; bad rows first. names: those of KEYS that differ.

    give: best: one row of `messages` for each tree, which follows the best reply. rankings: one row of `prompt`, `completions`
    and `ranks` for each message with several ranked answers. Raises UserError for an unknown name. Trees are held in memory.
    """
    if unknown := set(names) - set(KEYS) or {names.get("give", "best")} - set(GIVES):
        raise UserError(
            f"trees: there is no {unknown.pop()}; names are {', '.join(KEYS)}, and give: {' or '.join(GIVES)}"
        )
    names = KEYS | dict(names)
    roots: list[_Node] = []
    messages: dict[Any, _Node] = {}
    parents: list[tuple[Any, _Node]] = []
    for row in rows:
        root = row.data.get("prompt") if isinstance(row, Row) else None
        if isinstance(row, BadRow):
            yield row
        elif isinstance(root, dict) or {names["id"], names["text"], names["role"]} <= row.data.keys():
            parent = None if isinstance(root, dict) else row.data.get(names["parent"])
            try:
                node = _node(row, root if isinstance(root, dict) else row.data, names)
                hash(parent)
                messages[row.data.get(names["id"], id(node))] = node
            except (KeyError, TypeError, ValueError, RecursionError) as error:
                yield BadRow(row.where, f"not a message of a tree: {error!r}", "")
                continue
            if parent in (None, ""):  # an empty cell of CSV
                roots.append(node)
            else:
                parents.append((parent, node))
        else:
            yield BadRow(
                row.where, f'neither a tree nor a message of one: no "{names["id"]}" with "{names["text"]}"', ""
            )
    for parent, node in parents:
        if parent in messages:
            messages[parent].replies.append(node)
        else:
            yield BadRow(node.row.where, f"its parent {parent} is not in the file", node.text)
    for root in roots:
        yield from (_best(root) if names["give"] == "best" else _rankings(root))


def _node(row: Row, message: Mapping[str, Any], names: Mapping[str, str]) -> _Node:
    text, role, rank = message[names["text"]], message[names["role"]], message.get(names["rank"])
    if not isinstance(text, str) or not isinstance(role, str):
        raise TypeError(f"{names['text']} and {names['role']} must be texts")
    replies = [_node(row, reply, names) for reply in message.get("replies") or []]
    return _Node(row, text, role, None if rank in (None, "") else float(rank), replies)


def _best(root: _Node) -> Iterator[Row]:
    turns, node = [], root
    while node is not None:
        turns.append(node.turn)
        node = next(iter(node.by_rank), None)
    while turns and turns[-1]["role"] == "user":  # a question without an answer
        turns.pop()
    if turns:
        yield Row({"messages": turns}, root.row.file, root.row.line)


def _rankings(root: _Node) -> Iterator[Row]:
    waiting = [(root, [])]
    while waiting:
        node, before = waiting.pop()
        path = [*before, node.turn]
        ranked = [reply for reply in node.by_rank if reply.rank is not None and reply.role == "assistant"]
        if len(ranked) > 1:
            data = {"prompt": path, "completions": [[r.turn] for r in ranked], "ranks": [r.rank for r in ranked]}
            yield Row(data, node.row.file, node.row.line)
        waiting += [(reply, path) for reply in reversed(node.replies)]
