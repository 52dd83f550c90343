"""The weights of a base as they are in its files: readable, complete, and nothing that the model has no place for.

transformers invents the weights that a checkpoint lacks, and only warns.
"""

import contextlib
import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PretrainedConfig

from lowalign.errors import UserError

# Buffers that old checkpoints store; the models compute them.
BUFFERS = re.compile(r"(^|\.)(rotary_emb\.inv_freq|(attn|attention)\.(masked_)?bias|position_ids)$")
# Of a multimodal checkpoint, from which only the language model is loaded.
TOWERS = r"(^|[._])(vision|visual|audio|multi_modal_projector)[._]"
LFS_POINTER = b"version https://git-lfs"
NAMED = 3  # weights that a message names


def largest_tensor(folder: Path) -> int:
    """Bytes of the largest tensor in a folder's files of 16-bit weights. Raises UserError for a damaged file."""
    largest = 0
    for file in folder.glob("*.safetensors"):
        try:
            with safe_open(file, "pt") as f:
                sizes = (2 * math.prod(f.get_slice(k).get_shape()) for k in f.keys())  # noqa: SIM118
                largest = max(largest, *sizes, 0)
        except (SafetensorError, OSError) as error:
            raise damaged(file, error) from error
    return largest


def damaged(file: Path, error: Exception) -> UserError:
    """For a file of weights that cannot be read."""
    with contextlib.suppress(OSError), file.open("rb") as opened:
        if opened.read(len(LFS_POINTER)) == LFS_POINTER:
            return UserError(f"{file} is a Git LFS pointer, not the weights; download it again (`git lfs pull`)")
    return UserError(f"{file} is damaged or incomplete ({error}); download it again")


@contextlib.contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Turn transformers' errors about a folder's weights into UserErrors that name them."""
    reports: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: reports.append(record.getMessage())
    logger = logging.getLogger("transformers.modeling_utils")
    level, logger.propagate = logger.level, False  # only there the weights are named
    logger.setLevel(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"{folder} is incomplete: {error}; download it again") from error
    except RuntimeError as error:
        names = re.findall(r"^(\S+) *\| *(?:\x1b\[\d+m)?CONVERSION", "\n".join(reports), re.MULTILINE)
        if not names:
            raise
        raise UserError(
            f"{folder} lacks parts of {_some(names)}, or has them in another shape; download it again"
        ) from error
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = True


def refuse_incomplete(folder: Path, config: PretrainedConfig, loading: Mapping[str, Iterable]) -> None:
    """Raise UserError unless a folder has exactly the model's weights. loading: transformers' loading info."""
    multimodal = {"vision_config", "audio_config"} & config.sub_configs.keys()
    left_out = BUFFERS if not multimodal else re.compile(f"{BUFFERS.pattern}|{TOWERS}")
    shapes = [f"{key} ({_shape(here)}, expected {_shape(model)})" for key, here, model in loading["mismatched_keys"]]
    problems = {
        "lacks": loading["missing_keys"],
        "has weights of another shape:": shapes,
        "has weights that the model has no place for:": [
            k for k in loading["unexpected_keys"] if not left_out.search(k)
        ],
    }
    found = [f"{problem} {_some(keys)}" for problem, keys in problems.items() if keys]
    if found:
        raise UserError(
            f"{folder} is not complete, or config.json is of another model: it {'; it '.join(found)}. "
            "Missing weights would be random. Download it again"
        )


@torch.no_grad()
def refuse_not_finite(folder: Path, model: nn.Module) -> None:
    """Raise UserError when weights that are not in 4 bit, or the scales of those that are, hold NaN or infinity."""
    tensors = {}
    for name, p in model.named_parameters():
        state = getattr(p, "quant_state", None)
        tensors[name] = p if state is None else state.state2.absmax if state.nested else state.absmax
    # A sum takes 1/100 of the time of isfinite. In fp16 it may overflow; then each value is looked at.
    sums = torch.stack([tensor.sum().float() for tensor in tensors.values() if tensor.is_floating_point()])
    if torch.isfinite(sums).all():
        return
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise UserError(f"{_files_of(folder, broken)} has NaN or infinity in {_some(broken)}; download it again")


def _files_of(folder: Path, names: Iterable[str]) -> str:
    """The files of a folder that hold weights of these names in the model, or the folder where their names differ."""
    files = []
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as f:
            if any(name == key or name.endswith(f".{key}") for name in names for key in f.keys()):  # noqa: SIM118
                files.append(str(file))
    return ", ".join(files) or str(folder)


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _shape(size: Iterable[int]) -> str:
    return " × ".join(map(str, size))
