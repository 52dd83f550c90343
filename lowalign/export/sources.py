"""What a merge starts from: adapters in the order they stack, and the base that they were trained on."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import PretrainedConfig

from lowalign.config.export import MergeConfig
from lowalign.data.chat import Chat
from lowalign.errors import UserError
from lowalign.export.bitdelta_update import BitDeltaUpdate
from lowalign.export.lora_update import LoraUpdate
from lowalign.model.adapters import files as adapter_files
from lowalign.model.adapters.adapter import SCALAR_HEAD
from lowalign.model.adapters.bitdelta import BitDelta
from lowalign.model.adapters.lora import Lora
from lowalign.model.adapters.prompt_tuning import PromptTuning
from lowalign.model.base.hub import BASE_FILES, load_config, load_tokenizer, resolve
from lowalign.model.base.identity import identify


@dataclass(frozen=True)
class StackedAdapter:
    """One folder of the stack. meta: its lowalign.json."""

    folder: Path
    stored: adapter_files.StoredAdapter
    meta: dict[str, Any]


@dataclass(frozen=True)
class Sources:
    """base: its folder. quantization: of the base in training, "nf4" or "none". trained_dtype: its dtype there; None for an
    adapter that does not say it. onto: which weights are merged into."""

    base: Path
    config: PretrainedConfig
    stack: list[StackedAdapter]
    chat: Chat
    quantization: str
    trained_dtype: torch.dtype | None
    onto: str

    @property
    def updates(self) -> list[LoraUpdate | BitDeltaUpdate]:
        """The changes of the base's weights."""
        update = {Lora: LoraUpdate, BitDelta: BitDeltaUpdate}
        return [update[a.stored.kind](a.folder, a.stored) for a in self.stack if not a.stored.kind.soft]

    @property
    def soft_prompt(self) -> Tensor | None:
        """(v, hidden): the virtual tokens of the prompt tuning in the stack. Raises UserError for more than one."""
        prompts = [a for a in self.stack if a.stored.kind is PromptTuning]
        if len(prompts) > 1:
            raise UserError(
                f"{prompts[0].folder} and {prompts[1].folder} are both soft prompts; at most one can be active"
            )
        return prompts[0].stored.tensors["prompt_embeddings"] if prompts else None

    @property
    def scalar_head(self) -> Tensor | None:
        """(1, hidden): of a reward run."""
        tensors = self.stack[-1].stored.tensors.items()
        return next((tensor for name, tensor in tensors if name.endswith(SCALAR_HEAD)), None)

    def eos_ids(self) -> list[int]:
        """The base's own end tokens, and the end of the template's turn."""
        ids: list[int] = []
        for name in ("generation_config.json", "config.json"):
            file = self.base / name
            eos = json.loads(file.read_text()).get("eos_token_id") if file.exists() else None
            ids += eos if isinstance(eos, list) else [] if eos is None else [eos]
        return list(dict.fromkeys([*ids, self.chat.end_of_turn]))

    def report(self) -> dict[str, Any]:
        """What is published of them: hashes and names, no place on this machine."""
        adapters = []
        for adapter in self.stack:
            known = {key: adapter.meta[key] for key in ("method", "step") if key in adapter.meta}
            adapters.append({"weights": adapter_files.weights_hash(adapter.folder), **known})
        base = self.stack[-1].meta.get("base", {})
        base = {key: base[key] for key in ("name", "revision", "weights") if key in base} or {"name": self.base.name}
        return {"onto": self.onto, "adapters": adapters, "base": base}


def read_sources(config: MergeConfig) -> Sources:
    """Raises UserError when they do not fit together, or cannot become plain weights."""
    stack = [adapter for source in config.adapters for adapter in _read_stack(source)]
    for adapter in stack:
        if adapter.stored.kind not in (Lora, BitDelta, PromptTuning):
            raise UserError(
                f"{adapter.folder} is a prefix: keys and values of every layer, which no weight of the model holds, so it "
                "cannot be merged. Ship the adapter folder itself (peft and lowalign load it), or train a LoRA instead"
            )
    known = stack[-1].meta.get("base", {})
    name = config.model or base_of(config.adapters[-1])
    base = resolve(name, None if config.model else known.get("revision"), BASE_FILES)[0]
    quantization = known.get("quantization", "none")
    onto = config.onto or ("dequantized" if quantization == "nf4" else "original")
    tokenizer = load_tokenizer(str(base))
    if not config.allow_base_mismatch:
        identity = identify(str(base), base, None, tokenizer, quantization)
        for adapter in stack:
            adapter_files.check_base(adapter.folder, adapter.meta, identity)
    model_config = load_config(base)
    if getattr(model_config, "quantization_config", None) and onto == "original":
        raise UserError(f"{base} is stored in 4 bit and has no original weights; merge with --onto dequantized")
    chat = Chat(tokenizer, adapter_files.adapter_template([adapter.folder for adapter in stack]))
    return Sources(base, model_config, stack, chat, quantization, _trained_dtype(stack[-1].meta), onto)


def heldout_files(config: MergeConfig) -> Sequence[str]:
    """The rows to compare on: --data, else the held-out files that the last run's recipe names and that are here."""
    return config.data or [f for f in _recipe(config.adapters[-1]).get("data", {}).get("eval", []) if Path(f).is_file()]


def _read_stack(source: str) -> list[StackedAdapter]:
    """An adapter and, before it, those it was trained on top of."""
    folder = adapter_files.locate(source)
    top = StackedAdapter(folder, *adapter_files.read(folder))
    parents = [folder / "parents" / str(i) for i in range(top.meta.get("parents", 0))]
    return [*(StackedAdapter(parent, *adapter_files.read(parent)) for parent in parents), top]


def _trained_dtype(meta: dict[str, Any]) -> torch.dtype | None:
    """By the recipe in the adapter's lowalign.json."""
    recipe = yaml.safe_load(meta.get("recipe") or "") or {}
    name = str(recipe.get("base", {}).get("dtype"))
    return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}.get(name)


def _recipe(source: str) -> dict[str, Any]:
    """Of a run."""
    file = Path(source).expanduser() / "recipe.yaml"
    return yaml.safe_load(file.read_text()) or {} if file.is_file() else {}


def base_of(source: str) -> str:
    """The base that a run's recipe names, or the adapter_config.json. Raises UserError when it is not here."""
    name = _recipe(source).get("model")
    if not name:
        name = adapter_files.read(adapter_files.locate(source))[0].config.base_model_name_or_path
    if not name or (not Path(name).expanduser().is_dir() and name.count("/") != 1):
        raise UserError(f"{source} does not say where its base is (it names {name!r}); give it with --model M")
    return name
