"""What can be published: an adapter folder, a run's adapter or a model folder, whole, and those of its files that are known."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from peft import PeftType

from lowalign.errors import UserError
from lowalign.export.weight_files import stored_tensors
from lowalign.model.adapters import files as adapter_files
from lowalign.model.adapters.adapter import SCALAR_HEAD
from lowalign.model.base.hub import UNSAFE_SUFFIXES

CARD = "README.md"
KNOWN_FILES = (
    *("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "adapter_config.json"),
    *(
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "*.tiktoken",
        "*.model",
    ),
    *(
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "chat_template.jinja",
        "lowalign.json",
        "metrics.svg",
        "Modelfile",
        CARD,
    ),
    *(f"{name}{suffix}" for name in ("LICENSE", "NOTICE", "USE_POLICY") for suffix in ("", ".md", ".txt")),
)
# They decide which weights are loaded, so those of an earlier push must go.
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "config.json", "adapter_config.json")


def known(name: str) -> bool:
    """Whether a file is one that lowalign publishes and downloads, by its path in the folder or repository."""
    *folders, last = PurePosixPath(name).parts
    inside = folders in ([], ["additional_chat_templates"]) or (
        len(folders) == 2 and folders[0] == "parents" and folders[1].isdecimal()
    )
    patterns = ("*.jinja",) if "additional_chat_templates" in folders else KNOWN_FILES
    return inside and not last.startswith(".") and any(fnmatchcase(last, pattern) for pattern in patterns)


def decides_weights(name: str) -> bool:
    """Whether a file of a repository says which weights are loaded, or is one."""
    return known(name) and any(fnmatchcase(PurePosixPath(name).name, pattern) for pattern in WEIGHTS)


@dataclass(frozen=True)
class Artefact:
    """A folder that can be published.

    files: known files by their path in it. config: adapter_config.json or config.json. meta: lowalign.json, {} without
    one. run: the run that the adapter belongs to. reward: whether it gives scores instead of text.
    """

    folder: Path
    files: tuple[str, ...]
    config: dict[str, Any]
    meta: dict[str, Any]
    run: Path | None
    reward: bool

    @property
    def is_adapter(self) -> bool:
        """Or a model with all its weights."""
        return "adapter_config.json" in self.files

    @property
    def loads_in_peft(self) -> bool:
        """Whether it is an adapter of a kind that stock peft knows; some are lowalign's own."""
        return self.config.get("peft_type") in {kind.value for kind in PeftType}


def open_artefact(path: str | Path) -> Artefact:
    """Find what a run, adapter or model folder holds, and check it. Raises UserError when it is nothing to publish, not
    complete, or damaged."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise UserError(f"{path} is not a folder")
    if folder.name.startswith((".saving-", ".old-")):
        raise UserError(f"{path} is what an interrupted command left; run that command again and publish its result")
    run = folder if (folder / "adapter").is_dir() else None
    if run is not None:
        folder = run / "adapter"
    elif folder.name == "adapter" and (folder.parent / "metrics.jsonl").exists():
        run = folder.parent
    elif (folder / "recipe.yaml").exists():
        raise UserError(
            f"the run in {path} has not saved an adapter in {folder / 'adapter'}; finish it with --resume. (A best-of-n run has "
            "one run per round: round-1/sft, …)"
        )
    return check_folder(folder, run)


def check_folder(folder: Path, run: Path | None = None) -> Artefact:
    """What a folder holds. Raises UserError as `open_artefact`."""
    files = tuple(_known_files(folder))
    meta = read_object(folder / "lowalign.json") if "lowalign.json" in files else {}
    config_file = next((name for name in ("adapter_config.json", "config.json") if name in files), None)
    config = read_object(folder / config_file) if config_file else {}
    return Artefact(folder, files, config, meta, run, _check(folder, files, config, meta))


def _known_files(folder: Path) -> Iterator[str]:
    """Raises UserError for a link that leads out of the folder."""
    below = [folder, folder / "additional_chat_templates", *sorted(folder.glob("parents/*"))]
    for path in sorted(file for part in below if part.is_dir() for file in part.iterdir()):
        name = path.relative_to(folder).as_posix()
        if not known(name) or not path.is_file():
            continue
        if not path.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{path} is a link to a file outside {folder}; put a copy of the file in its place")
        yield name


def _check(folder: Path, files: tuple[str, ...], config: dict[str, Any], meta: dict[str, Any]) -> bool:
    """-> whether it is a reward model. Raises UserError when it is not complete, or damaged."""
    if "adapter_config.json" in files:
        parents = [folder / "parents" / str(i) for i in range(meta.get("parents", 0))]
        stored = [adapter_files.read(part)[0] for part in (*parents, folder)]
        return any(key.endswith(SCALAR_HEAD) for key in stored[-1].tensors)
    if "config.json" in files:
        stored_tensors(folder)
        return any(name.endswith("ForSequenceClassification") for name in config.get("architectures") or ())
    unsafe = next((p.name for p in sorted(folder.iterdir()) if p.suffix in UNSAFE_SUFFIXES), None)
    raise UserError(
        f"{folder} holds neither an adapter (adapter_config.json, adapter_model.safetensors) nor a model (config.json, "
        f"*.safetensors)" + (f"; {unsafe} is of a format that can hold code and is not published" if unsafe else "")
    )


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises UserError when it is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} is damaged: it holds no object")
    return content
