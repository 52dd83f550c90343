"""The exact identity of a base, which is stored with every adapter that is trained on it."""

import contextlib
import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lowalign.data.cache import cache_folder
from lowalign.durable import file_hash, write_json

SETTLED = 2.0  # seconds; the hash of a file that was changed later is not kept
CHECKSUM_WORDS = 2**24  # 4-byte words that the checksum sums at a time


@dataclass(frozen=True)
class Identity:
    """The base that an adapter was trained on.

    revision: Hub commit; None for a folder. weights: hash of the weight files, the same for a Hub model and a copy of it.
    config, template: hashes. vocabulary: number of tokens.
    """

    name: str
    revision: str | None
    weights: str
    config: str
    vocabulary: int
    template: str
    quantization: str

    def differences(self, other: dict) -> list[str]:
        """A line for each field by which a stored identity is another base."""
        own = asdict(self)
        keys = [k for k in ("weights", "config", "vocabulary") if k in other and other[k] != own[k]]
        return [f"{k}: here {own[k]}, the adapter's {other[k]}" for k in keys]


def identify(
    name: str, folder: Path, commit: str | None, tokenizer: PreTrainedTokenizerBase, quantization: str
) -> Identity:
    """The identity of a model folder. commit: of the Hub; None for a folder of the user, which `pull` may have written."""
    config = json.loads((folder / "config.json").read_text())
    for key in ("transformers_version", "_name_or_path", "torch_dtype", "dtype"):  # no effect on results
        config.pop(key, None)
    origin = {"repo": name, "commit": commit} if commit else _pulled_from(folder)
    return Identity(
        name=origin.get("repo", folder.name),  # a path has no meaning on another machine
        revision=origin.get("commit"),
        weights=_short("".join(_weights_hash(file) for file in sorted(folder.glob("*.safetensors")))),
        config=_short(json.dumps(config, sort_keys=True)),
        vocabulary=len(tokenizer),
        template=_short(json.dumps(tokenizer.chat_template or "")),
        quantization=quantization,
    )


def _pulled_from(folder: Path) -> dict[str, str]:
    """repo and commit, as `lowalign pull` wrote them; {} for a folder of another origin."""
    try:
        origin = json.loads((folder / "lowalign.json").read_text())["hub"]
        return {"repo": str(origin["repo"]), "commit": str(origin["commit"])}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _weights_hash(file: Path) -> str:
    """sha256 of a file. In the Hub's cache it is the name of the blob that the file links to."""
    blob = file.resolve().name
    if file.is_symlink() and len(blob) == 64:
        return blob
    return _cached_hash(file.resolve())


def _cached_hash(file: Path) -> str:
    """sha256 of a file; hashing 16 GB takes 12 to 30 s. It is kept in the user's cache folder and holds as long as size and
    times of the file do. The change time cannot be set back, unlike the modification time."""
    stat = file.stat()
    state = [str(file), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    entry = cache_folder().parent / "weights" / f"{_short(str(file))}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        stored = json.loads(entry.read_text())
        if stored["file"] == state:
            return str(stored["sha256"])
    digest = file_hash(file)
    # A file that was changed just now may change again without a new time: file systems count in milliseconds.
    if time.time() - max(stat.st_mtime, stat.st_ctime) > SETTLED:
        with contextlib.suppress(OSError):
            entry.parent.mkdir(parents=True, exist_ok=True)
            write_json(entry, {"file": state, "sha256": digest})
    return digest


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def checksum(model: nn.Module) -> int:
    """A number that changes with any bit of the base's own weights, and not with adapters in its layers."""
    total = 0
    for i, tensor in enumerate(_own_tensors(model)):
        raw = tensor.detach().contiguous().view(-1).view(torch.uint8)
        words = raw[: raw.numel() // 4 * 4].view(torch.int32)
        # In slices: a sum in int64 makes a copy of what it sums, which for an embedding would be gigabytes.
        sums = [part.sum(dtype=torch.int64) for part in (*words.split(CHECKSUM_WORDS), raw[words.numel() * 4 :])]
        total += (i + 1) * int(torch.stack(sums).sum())
    return total


def _own_tensors(model: nn.Module) -> Iterator[Tensor]:
    """The base's own weights and buffers, with the scales of 4-bit weights, in a fixed order.

    Not those that adapters add to a layer: it is then a BaseTunerLayer, which names them in adapter_layer_names.
    """
    parts = [getattr(m, n) for m in model.modules() if isinstance(m, BaseTunerLayer) for n in m.adapter_layer_names]
    adapter = {id(t) for part in parts for t in (*part.parameters(), *part.buffers())}
    for p in model.parameters():
        if id(p) not in adapter:
            yield p.data
            state = getattr(p, "quant_state", None)
            if state is not None:
                yield state.absmax
                if state.nested:
                    yield state.state2.absmax
                    yield state.offset
    yield from (buffer for buffer in model.buffers() if id(buffer) not in adapter)
