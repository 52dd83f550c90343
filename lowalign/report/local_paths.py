"""Names instead of the paths of this machine, in what others read."""

import re
from pathlib import PurePosixPath
from typing import Any

_TEXTS = ("added_tokens_decoder", "chat_template")  # of the tokenizer; what looks like a path in them is none
_PATH = re.compile(r"(?:~|[A-Za-z]:)[\\/][^\n]*|/[^/\s]+/[^\n]*|\.\.?/[^\n]*")
_PATH_IN_TEXT = re.compile(r"(?<![\w/.:<])(?:~/|[A-Za-z]:\\|\.\.?/|/(?=[\w.-]+/))[^\s'\",\]#]+")
_FILE = re.compile(r"\.(?:jsonl?|parquet|csv|txt|ya?ml|jinja|py)(?::\S+)?")


def without_paths(value: Any, key: str = "") -> Any:
    """A JSON value with names instead of paths, also inside a recipe. key: the one it has in the object around it."""
    if isinstance(value, dict):
        return {name: item if name in _TEXTS else without_paths(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [without_paths(item) for item in value]
    if isinstance(value, str) and key == "recipe":
        return _PATH_IN_TEXT.sub(lambda match: name_of(match[0]), value)
    return name_of(value) if isinstance(value, str) and is_local_path(value) else value


def option_without_paths(value: Any) -> Any:
    """An option of a recipe with names instead of paths, as in the recipe that is saved with an adapter.

    Relative paths of files count too (data/rows.jsonl); a reward keeps its weight: 0.5*/a/b.py:score is 0.5*b.py:score.
    """
    if isinstance(value, list):
        return [option_without_paths(item) for item in value]
    if not isinstance(value, str):
        return value
    weight, star, path = value.rpartition("*")
    is_file = "/" in path and _FILE.fullmatch("".join(PurePosixPath(path).suffixes[-1:])) is not None
    if is_local_path(path) or is_file:
        return weight + star + name_of(path)
    return _PATH_IN_TEXT.sub(lambda match: name_of(match[0]), value)


def is_local_path(text: str) -> bool:
    """Whether a text is a path of this machine."""
    return _PATH.fullmatch(text) is not None


def name_of(path: str) -> str:
    """The last part of a path."""
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1]
