"""What is published says nothing about the machine: names instead of its paths."""

import json
import re
from pathlib import Path, PurePosixPath

from lowalign.hub.artefact import Artefact, read_object
from lowalign.report.local_paths import is_local_path, name_of, without_paths

_REWRITTEN = ("lowalign.json", "adapter_config.json", "config.json", "generation_config.json", "tokenizer_config.json")


def published_json(artefact: Artefact, file: str) -> bytes | None:
    """A JSON file of the folder as it is published; None: as it is in the folder."""
    if PurePosixPath(file).name not in _REWRITTEN:
        return None
    before = read_object(artefact.folder / file)
    after = without_paths(before)
    after.pop("hub", None)  # where the folder was downloaded from
    for key in ("base_model_name_or_path", "tokenizer_name_or_path"):
        if file.endswith("adapter_config.json") and after.get(key):
            after[key] = published_base(artefact)[0]
    return None if after == before else (json.dumps(after, indent=2) + "\n").encode()


def published_base(artefact: Artefact) -> tuple[str | None, str | None]:
    """-> the name of the base, and its Hub commit; None for the commit of a folder, whose own name it then is."""
    known = artefact.meta.get("base") or artefact.meta.get("merge", {}).get("base")
    if isinstance(known, dict) and known.get("name"):
        return without_paths(known["name"]), known.get("revision")
    name = artefact.config.get("base_model_name_or_path")
    if not name:
        return None, None
    local = Path(name).expanduser().is_dir() or is_local_path(name)
    return (name_of(name), None) if local else (name, artefact.config.get("revision"))


def is_hub_id(name: str | None) -> bool:
    """Whether it can be the id of a Hub repository: NAMESPACE/NAME."""
    return name is not None and re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None
