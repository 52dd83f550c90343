"""What is published says nothing about the machine: names instead of its paths."""

import json
import re
from pathlib import Path, PurePosixPath
from typing import Any

from lowalign.export.artefact import Artefact, read_object

_REWRITTEN = ("lowalign.json", "adapter_config.json", "config.json", "generation_config.json", "tokenizer_config.json")
_TEXTS = ("added_tokens_decoder", "chat_template")  # of the tokenizer; what looks like a path in them is none
_PATH = re.compile(r"(?:~|[A-Za-z]:)[\\/][^\n]*|/[^/\s]+/[^\n]*|\.\.?/[^\n]*")
_PATH_IN_RECIPE = re.compile(r"(?<![\w/.:<])(?:~/|[A-Za-z]:\\|\.\.?/|/(?=[\w.-]+/))[^\s'\",\]#]+")


def without_paths(value: Any, key: str = "") -> Any:
    """A JSON value with names instead of paths, also inside a recipe. key: the one it has in the object around it."""
    if isinstance(value, dict):
        return {name: item if name in _TEXTS else without_paths(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [without_paths(item) for item in value]
    if isinstance(value, str) and key == "recipe":
        return _PATH_IN_RECIPE.sub(lambda match: _name(match[0]), value)
    return _name(value) if isinstance(value, str) and is_local_path(value) else value


def is_local_path(text: str) -> bool:
    """Whether a text is a path of this machine."""
    return _PATH.fullmatch(text) is not None


def published_json(artefact: Artefact, file: str) -> bytes | None:
    """A JSON file of the folder as it is published; None: as it is in the folder."""
    if PurePosixPath(file).name not in _REWRITTEN:
        return None
    before = read_object(artefact.folder / file)
    after = without_paths(before)
    after.pop("hub", None)  # where the folder was downloaded from
    for key in ("base_model_name_or_path", "tokenizer_name_or_path"):
        if file.endswith("adapter_config.json") and after.get(key):
            after[key] = base_of(artefact)[0]
    return None if after == before else (json.dumps(after, indent=2) + "\n").encode()


def base_of(artefact: Artefact) -> tuple[str | None, str | None]:
    """-> the name of the base, and its Hub commit; None for the commit of a folder, whose own name it then is."""
    known = artefact.meta.get("base") or artefact.meta.get("merge", {}).get("base")
    if isinstance(known, dict) and known.get("name"):
        return without_paths(known["name"]), known.get("revision")
    name = artefact.config.get("base_model_name_or_path")
    if not name:
        return None, None
    local = Path(name).expanduser().is_dir() or is_local_path(name)
    return (_name(name), None) if local else (name, artefact.config.get("revision"))


def is_hub_id(name: str | None) -> bool:
    """Whether it can be the id of a Hub repository: NAMESPACE/NAME."""
    return name is not None and re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None


def _name(path: str) -> str:
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1]
