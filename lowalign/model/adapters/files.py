"""Adapter folders: stock peft can load what is written; what is read is checked, and no code in it is run.

adapter_config.json, adapter_model.safetensors   as peft writes them
lowalign.json                                    the base's identity, a hash of the weights, and the run's metadata
parents/0, parents/1, …                          the frozen adapters it was trained on top of, if any
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from peft import PeftConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowalign.durable import file_hash, new_folder
from lowalign.errors import UserError
from lowalign.model.adapters.adapter import SCALAR_HEAD, Adapter
from lowalign.model.adapters.kinds import BY_PEFT_TYPE
from lowalign.model.base.base import Base
from lowalign.model.base.hub import resolve
from lowalign.model.base.identity import Identity
from lowalign.model.base.weights import damaged

WEIGHTS = "adapter_model.safetensors"
HEAD_MODULES = ["classifier", "score"]
_FILES = ["adapter_config.json", WEIGHTS, "lowalign.json", "chat_template.jinja", "parents/*"]


@dataclass(frozen=True)
class StoredAdapter:
    """What a folder holds: the kind, peft's config, and the weights by their names in the file."""

    kind: type[Adapter]
    config: PeftConfig
    tensors: dict[str, Tensor]


def write(
    folder: Path,
    adapter: StoredAdapter,
    base: Base,
    parents: Sequence[StoredAdapter],
    files: dict[str, str],
    meta: dict,
) -> None:
    """Write an adapter folder atomically; an older one of that name is replaced.

    parents: frozen adapters it was trained on top of, in the order they stack; written to parents/0, parents/1, …
    files: name -> text of more files (a chat template). meta: more entries of lowalign.json. Raises UserError when
    weights are not finite or cannot be written.
    """
    try:
        with new_folder(folder) as temp:
            _write_one(temp, adapter, base, meta | {"parents": len(parents)})
            for i, parent in enumerate(parents):
                _write_one(temp / "parents" / str(i), parent, base, {"parents": 0})
            for name, text in files.items():
                (temp / name).write_text(text)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(f"the adapter could not be written to {folder}: {error}") from error


def _write_one(folder: Path, adapter: StoredAdapter, base: Base, meta: dict) -> None:
    not_finite = [name for name, t in adapter.tensors.items() if not torch.isfinite(t).all()]
    if not_finite:
        raise UserError(f"the adapter is not saved: {not_finite[0]} has values that are not finite")
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: adapter.tensors[name].detach().cpu().contiguous() for name in sorted(adapter.tensors)}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    write_description(folder, adapter, base.identity, base.folder, meta)


def write_description(folder: Path, adapter: StoredAdapter, identity: Identity, base: Path, meta: dict) -> None:
    """Write adapter_config.json and lowalign.json beside weights that are there. base: its folder. Raises OSError."""
    _write_json(folder / "adapter_config.json", _plain(adapter, identity, base))
    _write_json(folder / "lowalign.json", meta | {"base": asdict(identity), "weights": weights_hash(folder)})


def locate(folder_or_hub_id: str | Path) -> Path:
    """The local folder of an adapter, downloaded for a Hub id. A run's folder means its `adapter` folder."""
    run = Path(folder_or_hub_id) / "adapter"
    if not run.is_dir() and (run.parent / "checkpoints").is_dir():
        raise UserError(
            f"{folder_or_hub_id} is a run that has not finished, and has no adapter yet. Go on with it (its own command and "
            f"--resume), or make an adapter of its newest checkpoint: lowalign checkpoint {folder_or_hub_id} --out DIR"
        )
    return resolve(str(run if run.is_dir() else folder_or_hub_id), None, _FILES)[0]


def read(folder: Path) -> tuple[StoredAdapter, dict]:
    """-> the adapter and its lowalign.json ({} in a folder that stock peft wrote).

    Raises UserError for a kind that is not in KINDS, weights that are not safetensors, and damaged files.
    """
    file = folder / WEIGHTS
    try:
        raw = json.loads((folder / "adapter_config.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is not an adapter folder: adapter_config.json: {error}") from error
    kind = BY_PEFT_TYPE.get(raw.get("peft_type"))
    if kind is None:
        raise UserError(f"{folder} holds a {raw.get('peft_type')} adapter; lowalign knows {', '.join(BY_PEFT_TYPE)}")
    if raw.get("auto_mapping"):
        raise UserError(f"{folder} names classes to import (auto_mapping); lowalign does not run code of an adapter")
    if not file.exists():
        raise UserError(f"{folder} has no adapter_model.safetensors; files that can hold code (.bin, .pt) are not read")
    if set(raw.get("modules_to_save") or ()) <= set(HEAD_MODULES):
        raw["modules_to_save"] = None  # the weights show whether there is a head
    fields = kind.config_class.__dataclass_fields__.keys() - {"peft_type", "auto_mapping"}
    config = kind.config_class(**{k: v for k, v in raw.items() if k in fields})
    try:
        tensors = load_file(file)
    except (OSError, ValueError, SafetensorError) as error:
        raise damaged(file, error) from error
    try:
        meta = read_meta(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / 'lowalign.json'} is damaged ({error}); save or download it again") from error
    if meta.get("weights") not in (None, weights_hash(folder)):
        raise UserError(
            f"{file} is not the file that was written with lowalign.json (its hash differs); save or download it again"
        )
    broken = [name for name, t in tensors.items() if t.is_floating_point() and not torch.isfinite(t).all()]
    if broken:
        raise UserError(f"{file} has NaN or infinity in {broken[0]}; download it again")
    return StoredAdapter(kind, config, tensors), meta


def refuse_reward_runs(adapters: Sequence[str]) -> None:
    """Raise UserError for an adapter with a scalar head: it scores answers, and writes none."""
    for adapter in adapters:
        stored, _ = read(locate(adapter))
        if any(key.endswith(SCALAR_HEAD) for key in stored.tensors):
            raise UserError(
                f"{adapter} is a reward model: it scores answers and cannot write them. It belongs to --reward {adapter} of "
                f"ppo, best-of-n and judge, and to `lowalign score --adapter {adapter}`"
            )


def read_meta(folder: Path) -> dict:
    """An adapter folder's lowalign.json; {} when it has none. Raises OSError and ValueError."""
    file = folder / "lowalign.json"
    return json.loads(file.read_text()) if file.exists() else {}


def adapter_template(adapters: Sequence[str]) -> str | None:
    """The chat template that was written with the last adapter that has one."""
    for adapter in reversed(adapters):
        file = locate(adapter) / "chat_template.jinja"
        if file.exists():
            return file.read_text(encoding="utf-8")
    return None


def trained_format(adapter: str | Path) -> str | None:
    """The format of the prompts it was trained on, as in lowalign.data.prompt_format; None where it is not known."""
    return read_meta(locate(adapter)).get("prompt_format")


def common_format(adapters: Sequence[str]) -> str | None:
    """The format of prompts that all of them were trained on; None where it is not known, or they differ."""
    formats = {trained_format(adapter) for adapter in adapters} - {None}
    return formats.pop() if len(formats) == 1 else None


def check_base(folder: Path, meta: dict, identity: Identity) -> None:
    """Raises UserError for an adapter that was trained on another base. A stock peft folder names none and passes."""
    differences = identity.differences(meta.get("base", {}))
    if differences:
        raise UserError(
            f"{folder} was trained on another base ({meta['base']['name']}; here: {identity.name}): {'; '.join(differences)}. "
            "Load the right base, or allow it with allow_base_mismatch=True (--allow-base-mismatch)"
        )


def check_keys(folder: Path, expected: dict[str, tuple[int, ...]], stored: dict[str, tuple[int, ...]]) -> None:
    """Raises UserError unless names and shapes are the same. (Stock peft only warns.)"""
    missing, extra = sorted(expected.keys() - stored.keys()), sorted(stored.keys() - expected.keys())
    differing = [k for k in expected if stored.get(k, expected[k]) != expected[k]]
    shapes = [f"{k}: {stored[k]} in the file, {expected[k]} here" for k in differing]
    if missing or extra or shapes:
        parts = [f"{len(missing)} weights are missing (first: {missing[0]})"] if missing else []
        parts += [f"{len(extra)} weights have no place here (first: {extra[0]})"] if extra else []
        parts += [f"{len(shapes)} weights have another shape (first: {shapes[0]})"] if shapes else []
        advice = "; download it again" if missing and not extra and not shapes else ""
        raise UserError(f"{folder} does not fit this base: {'; '.join(parts)}{advice}")


def weights_hash(folder: Path) -> str:
    """sha256 of the file of weights, which identifies an adapter."""
    return file_hash(folder / WEIGHTS)


def _plain(adapter: StoredAdapter, identity: Identity, base: Path) -> dict[str, object]:
    """The content of adapter_config.json. It names a local base by its path, for peft's Auto classes and `merge`; in
    lowalign.json there is no path."""
    name = identity.name if identity.revision else str(base.resolve())
    raw = {k: sorted(v) if isinstance(v, set) else v for k, v in adapter.config.to_dict().items()}
    head = any(key.endswith(SCALAR_HEAD) for key in adapter.tensors)
    raw |= {"task_type": "SEQ_CLS", "modules_to_save": HEAD_MODULES} if head else {"task_type": "CAUSAL_LM"}
    raw |= {"inference_mode": True, "base_model_name_or_path": name}
    if raw.get("tokenizer_name_or_path"):
        raw["tokenizer_name_or_path"] = name
    if identity.revision:
        raw["revision"] = identity.revision
    return raw


def _write_json(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True, default=str) + "\n")
