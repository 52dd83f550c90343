"""Base + adapters → a model folder that plain transformers loads, compared with the trained model before it is kept.

onto "dequantized": the weights that the adapters were trained on, NF4 converted back to 16 bit. onto "original": the
base's own 16-bit weights, which the adapters never saw: the merged model is then about 20 times further from the trained
one (docs/export.md).

DIR/lowalign.json   {"merge": {"onto", "kl", "top1", "verified", "adapters", "base"}}
"""

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForSequenceClassification, PretrainedConfig

from lowalign.data.chat import Chat
from lowalign.durable import new_folder, write_json
from lowalign.errors import UserError
from lowalign.export.agreement import TrainedModel, check_predictions, check_scores, run_trained
from lowalign.export.lora_update import LoraUpdate
from lowalign.export.merged_weights import Plan, plan_merge
from lowalign.export.model_folder import write_model_files
from lowalign.export.weight_files import write_shards
from lowalign.log import log
from lowalign.model.adapters import files as adapter_files
from lowalign.model.adapters.lora import Lora
from lowalign.model.adapters.prefix_tuning import PrefixTuning
from lowalign.model.base.base import set_pad_token
from lowalign.model.base.hub import BASE_FILES, load_tokenizer, resolve
from lowalign.model.base.identity import identify


@dataclass(frozen=True)
class StackedAdapter:
    """One folder of the stack. meta: its lowalign.json."""

    folder: Path
    stored: adapter_files.StoredAdapter
    meta: dict[str, Any]


def merge(
    adapters: Sequence[str],
    out: str | Path,
    *,
    model: str | None = None,
    onto: str | None = None,
    dtype: str = "bfloat16",
    max_shard_size: str = "5GB",
    verify: bool = True,
    allow_base_mismatch: bool = False,
) -> dict[str, Any]:
    """Write base + adapters as plain weights to a new folder. Returns what its lowalign.json holds under "merge".

    adapters: runs, adapter folders or Hub ids, in the order they stack; each brings the adapters it was trained on top
    of. model: the base; default: the one the run names. onto: "dequantized" or "original"; default: dequantized for
    adapters that were trained on a 4-bit base. verify: compare with the trained model, and keep nothing if it differs.
    Raises UserError when the merge is not possible or not the trained model; then nothing is left of it.
    """
    out = Path(out).expanduser()
    if out.exists():
        raise UserError(f"{out} exists and is not overwritten; name another folder with --out")
    shard_bytes = _bytes(max_shard_size)
    stack = [adapter for source in adapters for adapter in _read_stack(source)]
    updates = [_update(adapter) for adapter in stack]
    base = resolve(model or _base_of(adapters[-1], stack[-1]), None, BASE_FILES)[0]
    quantization = stack[-1].meta.get("base", {}).get("quantization", "none")
    onto = onto or ("dequantized" if quantization == "nf4" else "original")
    tokenizer = load_tokenizer(str(base))
    if not allow_base_mismatch:
        identity = identify(str(base), base, None, tokenizer, quantization)
        for adapter in stack:
            adapter_files.check_base(adapter.folder, adapter.meta, identity)
    config = AutoConfig.from_pretrained(base, trust_remote_code=False)
    if getattr(config, "quantization_config", None) and onto == "original":
        raise UserError(f"{base} is stored in 4 bit and has no original weights; merge with --onto dequantized")
    plan = plan_merge(base, config, updates, onto == "dequantized", getattr(torch, dtype))
    _check_room(out, plan, verify)
    chat = Chat(tokenizer, adapter_files.adapter_template([adapter.folder for adapter in stack]))
    report = {"onto": onto, "kl": None, "top1": None, "verified": False}
    report |= {"adapters": [_description(adapter) for adapter in stack], "base": _base_name(base, stack[-1])}
    trained = None
    if verify:
        trained = run_trained(str(base), adapters, chat, quantization, dtype, plan.reward, bare=onto == "original")
    eos_ids = _eos_ids(base, chat)
    changes = {"dtype": dtype, "tie_word_embeddings": plan.tied, "lowalign": {"merged_onto": onto}}
    if plan.reward:
        changes |= _classifier_config(config, chat, eos_ids)
    try:
        with new_folder(out) as temp:
            write_model_files(base, temp, changes, chat.template, eos_ids)
            with tqdm(total=plan.nbytes, unit="B", unit_scale=True, desc="merge", disable=None) as bar:
                write_shards(temp, plan.tensors, shard_bytes, bar.update)
            if trained is not None:
                report |= _compare(temp, base, trained, onto) | {"verified": True}
            write_json(temp / "lowalign.json", {"merge": report})
    except (OSError, SafetensorError) as error:
        raise UserError(f"the merged model could not be written to {out}: {error}; nothing of it is left") from error
    log(f"the merged model is in {out}")
    return report


def _compare(folder: Path, base: Path, trained: TrainedModel, onto: str) -> dict[str, float]:
    """What the comparison of the merged and the trained model adds to the report. Raises UserError when they differ."""
    if trained.scores is not None:
        return vars(check_scores(folder, trained))
    result = check_predictions(folder, base, trained, onto)
    return {"kl": result.kl, "top1": result.top1}


def _read_stack(source: str) -> list[StackedAdapter]:
    """An adapter and, before it, those it was trained on top of."""
    folder = adapter_files.locate(source)
    top = StackedAdapter(folder, *adapter_files.read(folder))
    parents = [folder / "parents" / str(i) for i in range(top.meta.get("parents", 0))]
    return [*(StackedAdapter(parent, *adapter_files.read(parent)) for parent in parents), top]


def _update(adapter: StackedAdapter) -> LoraUpdate:
    """How the adapter changes the base's weights. Raises UserError for a kind that does not."""
    if adapter.stored.kind is Lora:
        return LoraUpdate(adapter.folder, adapter.stored)
    if adapter.stored.kind is PrefixTuning:
        raise UserError(
            f"{adapter.folder} is a prefix: keys and values of every layer, which no weight of the model holds, so it "
            "cannot be merged. Ship the adapter folder itself (peft and lowalign load it), or train a LoRA instead"
        )
    raise UserError(
        f"{adapter.folder} is a soft prompt: it changes the input, not the weights, so it cannot be merged. Ship the "
        "adapter folder itself (peft and lowalign load it), or train a LoRA instead"
    )


def _base_of(source: str, adapter: StackedAdapter) -> str:
    """The base that the run's recipe names, or the adapter_config.json."""
    recipe = Path(source).expanduser() / "recipe.yaml"
    name = yaml.safe_load(recipe.read_text()).get("model") if recipe.is_file() else None
    name = name or adapter.stored.config.base_model_name_or_path
    if not name or (not Path(name).expanduser().is_dir() and name.count("/") != 1):
        raise UserError(f"{source} does not say where its base is (it names {name!r}); give it with --model M")
    return name


def _check_room(out: Path, plan: Plan, verify: bool) -> None:
    """Raises UserError when disk or memory do not suffice."""
    parent = next(folder for folder in out.resolve().parents if folder.exists())
    size, free = plan.nbytes / 1e9, shutil.disk_usage(parent).free / 1e9
    if size > free:
        raise UserError(
            f"the merged model takes {size:.1f} GB and {free:.1f} GB are free in {parent}; choose another --out"
        )
    room = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else psutil.virtual_memory().available
    if verify and plan.nbytes > room:
        raise UserError(
            f"the check loads the merged model, which takes {size:.1f} GB of memory; {room / 1e9:.1f} GB are free. Free some "
            "memory, or skip the check with --no-verify (lowalign.json then says that it was skipped)"
        )


def _classifier_config(config: PretrainedConfig, chat: Chat, eos_ids: Sequence[int]) -> dict[str, Any]:
    """What makes config.json that of a sequence classifier with one score, read at the last token that is no padding.

    A pad token that ends answers would hide their end from the score, so it is another one.
    """
    if type(config) not in AutoModelForSequenceClassification._model_mapping:
        raise UserError(
            f"transformers has no sequence classifier for {config.model_type}; ship the adapter folder itself"
        )
    name = AutoModelForSequenceClassification._model_mapping[type(config)].__name__
    set_pad_token(chat.tokenizer, tuple(eos_ids))
    labels = {"id2label": {"0": "score"}, "label2id": {"score": 0}, "problem_type": "regression"}
    return {"architectures": [name], "pad_token_id": chat.tokenizer.pad_token_id, **labels}


def _eos_ids(base: Path, chat: Chat) -> list[int]:
    """The base's own end tokens, and the end of the template's turn."""
    ids: list[int] = []
    for name in ("generation_config.json", "config.json"):
        file = base / name
        eos = json.loads(file.read_text()).get("eos_token_id") if file.exists() else None
        ids += eos if isinstance(eos, list) else [] if eos is None else [eos]
    return list(dict.fromkeys([*ids, chat.end_of_turn]))


def _description(adapter: StackedAdapter) -> dict[str, Any]:
    """The adapter without its place on this machine."""
    known = {key: adapter.meta[key] for key in ("method", "step") if key in adapter.meta}
    return {"weights": adapter_files.weights_hash(adapter.folder), **known}


def _base_name(base: Path, adapter: StackedAdapter) -> dict[str, Any]:
    known = adapter.meta.get("base", {})
    return {key: known[key] for key in ("name", "revision", "weights") if key in known} or {"name": base.name}


def _bytes(size: str) -> int:
    """ "5GB" → 5,000,000,000."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)B", size.strip(), re.IGNORECASE)
    if not match or not float(match[1]):
        raise UserError(f"--max-shard-size {size}: write a size such as 5GB or 500MB")
    return int(float(match[1]) * 1000 ** " KMG".index(match[2].upper() or " "))
