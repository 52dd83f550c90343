"""Values of rows whose cells are all texts, as in CSV: which columns hold numbers, truth values or lists."""

from typing import Any

from lowalign.data.sources.row import Row, RowError
from lowalign.data.sources.strict_json import StrictParser, half_surrogate

LISTS = {
    "messages",
    "conversations",
    "chosen_messages",
    "rejected_messages",
    "completions",
    "ranks",
    "history",
    "tools",
}
TURNS = {"prompt", "completion", "chosen", "rejected"}  # texts, a turn, or lists of turns
VALUES = {"score", "label", "margin", "weight", "scores"}
TRUTH = {"true": True, "false": False}


def typed(row: Row) -> dict[str, Any]:
    """The row's data, with values in the columns that are never texts: JSON in lists, numbers and true or false.

    A cell that is none stays text, and the format's own message says what it must be. An empty one is null. Raises RowError for
    half of a surrogate pair in JSON.
    """
    return {name: _value(name, cell) for name, cell in row.data.items()} if row.untyped else row.data


def _value(name: str, cell: Any) -> Any:
    if not isinstance(cell, str) or name not in LISTS | TURNS | VALUES:
        return cell
    text = cell.strip()
    if name in VALUES:
        return None if not text else TRUTH.get(text.lower(), _parsed(text, cell))
    if name in LISTS and not text:
        return None
    if name in TURNS and text.startswith("{") and text.endswith("}"):
        value = _parsed(text, cell)
        return value if isinstance(value, dict) and {"role", "from"} & value.keys() else cell
    turns = text.startswith("[{") and text.endswith("}]")
    return _parsed(text, cell) if turns or (name in LISTS and text.startswith("[")) else cell


def _parsed(text: str, cell: str) -> Any:
    value, end, problem = StrictParser().parse(text, 0)
    if problem or end is None or text[end:].strip():
        return cell
    if problem := half_surrogate(value, text):
        raise RowError(problem)
    return value
