"""Base + adapters → a model folder that plain transformers loads, compared with what was trained before it is kept.

onto "dequantized": the weights that the adapters were trained on, NF4 taken back to 16 bit. onto "original": the base's own
16-bit weights, which the adapters never saw. KL(trained ‖ merged) of a LoRA trained on a 4-bit Llama: 4e-5 onto
dequantized, 9e-4 onto original (docs/export.md).

DIR/lowalign.json   {"merge": {"onto", "kl", "top1", "verified", "adapters", "base"}}
"""

import gc
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
from peft import LoraConfig, PrefixTuningConfig
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import AutoConfig

from lowalign.data.chat import Chat
from lowalign.data.pack import Example
from lowalign.durable import new_folder, write_json
from lowalign.errors import UserError
from lowalign.export.agreement import Agreement, agreement, merged_logps, sampled_examples, trained_logps
from lowalign.export.lora_update import LoraUpdate
from lowalign.export.merged_weights import Plan, plan_merge
from lowalign.export.model_folder import write_model_files
from lowalign.export.weight_files import write_shards
from lowalign.log import log
from lowalign.model.adapters import files as adapter_files
from lowalign.model.base.base import Base
from lowalign.model.base.hub import TOKENIZER_FILES, load_tokenizer, resolve
from lowalign.model.base.identity import identify
from lowalign.model.host import Host
from lowalign.model.policy import load_policy

MAX_KL = 0.01  # nats a token. What was measured lies 10 to 200 times below; with an adapter left out it is above 0.1
BASE_FILES = ["*.safetensors", "*.safetensors.index.json", "generation_config.json", *TOKENIZER_FILES]


def merge(
    adapters: Sequence[str],
    out: str | Path,
    *,
    model: str | None = None,
    onto: str | None = None,
    dtype: str = "bfloat16",
    max_shard_size: str = "5GB",
    verify: bool = True,
    examples: Sequence[Example] | None = None,
    allow_base_mismatch: bool = False,
) -> dict[str, Any]:
    """Write base + adapters as plain weights to a new folder; returns what its lowalign.json says under "merge".

    adapters: runs, adapter folders or Hub ids, in the order they stack; each brings what it was trained on top of.
    model: the base; the one of the run when left out. onto: "dequantized", "original", or what the adapters were trained
    on when left out. examples: what to compare on; questions and the trained model's own answers when left out.
    Raises UserError for whatever stands in the way, and when the merged model is not the trained one; nothing is then
    left of it.
    """
    out = Path(out).expanduser()
    if out.exists():
        raise UserError(f"{out} exists and is not overwritten; name another folder with --out")
    folders = [folder for source in adapters for folder in _stack_folders(source)]
    base = resolve(model or _base_of(adapters), None, BASE_FILES)[0]
    updates = [_update(folder) for folder in folders]
    onto = onto or _trained_onto(folders)
    _check_base(folders, base, allow_base_mismatch)
    config = AutoConfig.from_pretrained(base, trust_remote_code=False)
    if getattr(config, "quantization_config", None) and onto == "original":
        raise UserError(f"{base} is stored in 4 bit; its original weights are not there. Merge with --onto dequantized")
    plan = plan_merge(base, config, updates, onto == "dequantized", getattr(torch, dtype))
    _check_room(out, plan, verify)
    chat = Chat(load_tokenizer(str(base)), adapter_files.adapter_template(folders))
    report = {"onto": onto, "kl": None, "top1": None, "verified": False}
    report |= {"adapters": [_described(folder) for folder in folders], "base": _name(base, folders)}
    try:
        with new_folder(out) as temp:
            changes = {"dtype": dtype, "tie_word_embeddings": plan.tied, "lowalign": {"merged_onto": onto}}
            trained = _run_trained(str(base), adapters, folders, chat, examples) if verify else None
            write_model_files(base, temp, changes, chat.template, _eos_ids(base, chat))
            with tqdm(total=plan.nbytes, unit="B", unit_scale=True, desc="merge", disable=None) as bar:
                write_shards(temp, plan.tensors, _bytes(max_shard_size), bar.update)
            if trained is not None:
                result = _verified(temp, base, trained, onto)
                report |= {"kl": result.kl, "top1": result.top1, "verified": True}
            write_json(temp / "lowalign.json", {"merge": report})
    except (OSError, SafetensorError) as error:
        raise UserError(f"the merged model could not be written to {out}: {error}; nothing of it is left") from error
    log(f"the merged model is in {out}")
    return report


def _stack_folders(source: str) -> list[Path]:
    """The folders of an adapter and of those it was trained on top of, in the order they stack."""
    folder = adapter_files.locate(source)
    _, meta = adapter_files.read(folder)
    return [*(folder / "parents" / str(i) for i in range(meta.get("parents", 0))), folder]


def _update(folder: Path) -> LoraUpdate:
    adapter, _ = adapter_files.read(folder)
    if isinstance(adapter.config, LoraConfig):
        return LoraUpdate(folder, adapter)
    if isinstance(adapter.config, PrefixTuningConfig):
        raise UserError(
            f"{folder} is a prefix: it acts on the keys and values of every layer, which no weight of the model holds, so "
            "it cannot be merged. Ship the adapter folder itself (peft and lowalign load it), or train a LoRA instead"
        )
    raise UserError(f"{folder} is a soft prompt: it changes the input, not the weights; ship the adapter folder itself")


def _base_of(adapters: Sequence[str]) -> str:
    """The base that the last adapter's run names, or its adapter_config.json."""
    source = adapters[-1]
    recipe = Path(source) / "recipe.yaml"
    named = yaml.safe_load(recipe.read_text()).get("model") if recipe.is_file() else None
    named = named or adapter_files.read(adapter_files.locate(source))[0].config.base_model_name_or_path
    if not named or (not Path(named).expanduser().is_dir() and named.count("/") != 1):
        raise UserError(f"{source} does not tell where its base lies (it says {named!r}); give it with --model M")
    return named


def _quantization(folders: Sequence[Path]) -> str:
    """What the adapters were trained on: "nf4" or "none"; "none" where a folder of stock peft does not tell."""
    return adapter_files.read(folders[-1])[1].get("base", {}).get("quantization", "none")


def _trained_onto(folders: Sequence[Path]) -> str:
    return "dequantized" if _quantization(folders) == "nf4" else "original"


def _check_base(folders: Sequence[Path], base: Path, allow_base_mismatch: bool) -> None:
    if not allow_base_mismatch:
        identity = identify(str(base), base, None, load_tokenizer(str(base)), _quantization(folders))
        for folder in folders:
            adapter_files.check_base(folder, adapter_files.read(folder)[1], identity)


def _check_room(out: Path, plan: Plan, verify: bool) -> None:
    """Refuse before the work what cannot end well."""
    parent = next(p for p in out.resolve().parents if p.exists())
    free = shutil.disk_usage(parent).free
    if plan.nbytes > free:
        raise UserError(
            f"the merged model takes {plan.nbytes / 1e9:.1f} GB and {free / 1e9:.1f} GB are free in {parent}"
        )
    room = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else psutil.virtual_memory().available
    if verify and plan.nbytes > room:
        raise UserError(
            f"to verify it the merged model is loaded, which takes {plan.nbytes / 1e9:.1f} GB; {room / 1e9:.1f} GB are free. "
            "Free some memory, or leave the check out with --no-verify (which lowalign.json then says)"
        )


@dataclass(frozen=True)
class TrainedModel:
    """What the trained model says: log-probs over the vocabulary of the examples' completions, with the adapters and, as
    `bare`, without."""

    examples: list[Example]
    logps: list[torch.Tensor]
    bare: list[torch.Tensor]


def _run_trained(
    base: str, adapters: Sequence[str], folders: Sequence[Path], chat: Chat, examples: Sequence[Example] | None
) -> TrainedModel:
    """Run base + adapters as they were trained. The base is let go of before it returns."""
    host = Host(Base.load(base, quantization=_quantization(folders), quiet=True))
    stack = load_policy(host, adapters, allow_base_mismatch=True)  # checked before
    host.base.end_at(chat.end_of_turn)
    examples = list(examples or sampled_examples(host, stack, chat))
    rows, bare = trained_logps(host, stack, examples), trained_logps(host, (), examples)
    for name in tuple(host.configs):
        host.delete(name)
    del host
    gc.collect()
    return TrainedModel(examples[: len(rows)], rows, bare)


def _verified(folder: Path, base: Path, trained: TrainedModel, onto: str) -> Agreement:
    """Compare, report, and raise UserError when it is another model."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result = agreement(trained.logps, merged_logps(folder, trained.examples, device))
    log(f"merged and trained on {result.tokens} tokens: KL {result.kl:.1e} nats, same top token {result.top1:.1%}")
    limit = MAX_KL
    if result.kl > limit and onto == "original":
        # The 4-bit base itself may be that far from the original weights, as in a model that quantizes badly.
        limit = 2 * agreement(trained.bare, merged_logps(base, trained.examples, device)).kl
    if not result.kl <= limit:
        raise UserError(
            f"the merged model is not the trained one: KL {result.kl:.2g} nats a token, at most {limit:.2g} is allowed; it "
            f"was not kept. Try {'--onto dequantized' if onto == 'original' else '--dtype float32'}"
        )
    return result


def _eos_ids(base: Path, chat: Chat) -> list[int]:
    """The base's own end tokens, and the end of the template's turn."""
    ids: list[int] = []
    for name in ("generation_config.json", "config.json"):
        file = base / name
        eos = json.loads(file.read_text()).get("eos_token_id") if file.exists() else None
        ids += eos if isinstance(eos, list) else [] if eos is None else [eos]
    return list(dict.fromkeys([*ids, chat.end_of_turn]))


def _described(folder: Path) -> dict[str, Any]:
    """An adapter without the place it lies at."""
    _, meta = adapter_files.read(folder)
    return {"weights": adapter_files.weights_hash(folder), **{k: meta[k] for k in ("method", "step") if k in meta}}


def _name(base: Path, folders: Sequence[Path]) -> dict[str, Any]:
    known = adapter_files.read(folders[-1])[1].get("base", {})
    return {k: known[k] for k in ("name", "revision", "weights") if k in known} or {"name": base.name}


def _bytes(size: str) -> int:
    """ "5GB" → 5,000,000,000."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)B", size.strip(), re.IGNORECASE)
    if not match or not float(match[1]):
        raise UserError(f"--max-shard-size {size}: write a size such as 5GB or 500MB")
    return int(float(match[1]) * 1000 ** " KMG".index(match[2].upper() or " "))
