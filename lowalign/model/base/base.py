"""The frozen base: loaded (in 4 bit), identified, and never changed."""

import sys
from dataclasses import dataclass
from pathlib import Path

import bitsandbytes as bnb
import psutil
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from lowalign import processes
from lowalign.config.cards import GIB
from lowalign.errors import UserError
from lowalign.log import log
from lowalign.model.attention.device import compute_device
from lowalign.model.attention.interface import ATTN_IMPLEMENTATION
from lowalign.model.attention.packed import check_attention
from lowalign.model.base import card_memory, weights
from lowalign.model.base.device import device_of
from lowalign.model.base.embedding import move_to_cpu
from lowalign.model.base.fuse import fuse
from lowalign.model.base.fused_ops import Compile
from lowalign.model.base.hub import BASE_FILES, load_config, load_tokenizer, resolve
from lowalign.model.base.identity import Identity, checksum, identify
from lowalign.model.base.probe import probe

NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # per weight: 4 bits, one byte a block of 64, and the blocks' own scales


@dataclass
class Base:
    """A frozen causal language model, its tokenizer and its identity. Make it with `Base.load`.

    packed: whether packed attention is exact for this architecture. If not, `why_not` is the reason, and every completion
    is computed as a row of its own. unquantized: share of the weights that are not in 4 bit. eos_ids: tokens that end a
    completion. exact: LoRAs on it are computed by peft's code.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    identity: Identity
    folder: Path
    eos_ids: tuple[int, ...]
    unquantized: float
    packed: bool
    why_not: str = ""
    exact: bool = False

    @classmethod
    def load(
        cls,
        path_or_hub_id: str | Path,
        quantization: str = "nf4",
        revision: str | None = None,
        dtype: torch.dtype | str = "bfloat16",
        device: str = "auto",
        embedding: str = "device",
        exact: bool = False,
        compile: Compile = "auto",
        leave_free: float = 0.7,
        quiet: bool = False,
    ) -> "Base":
        """Load a folder or a Hub model, frozen.

        quantization: "nf4" (every linear layer but the LM head, with double quantization, arXiv 2305.14314), or "none".
        dtype: of computations, embeddings, norms and LM head. embedding: "cpu" keeps it in CPU memory. exact: compute by
        the code of transformers and peft alone. compile: what is fused otherwise; "auto": on a GPU. leave_free: GiB of a
        card that are not used.

        Raises UserError for a model that cannot be a base (no safetensors, own code, encoder-decoder, quantized otherwise),
        for weights that are missing, too many or not finite, and when free memory is too small.
        """
        if quantization not in ("nf4", "none"):
            raise UserError(f'quantization "{quantization}" is not known; use "nf4" or "none"')
        dtype = getattr(torch, dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
        device = device_of(str(device))
        folder, commit = resolve(str(path_or_hub_id), revision, BASE_FILES)
        config = _checked_config(folder, quantization)
        if device.startswith("cuda"):
            card_memory.limit(device, leave_free)
        head = _check_memory(folder, config, quantization, dtype, device, leave_free)
        to_quantize = quantization == "nf4" and not getattr(config, "quantization_config", None)
        model = _load_model(folder, config, dtype, device, nf4_config(dtype, head) if to_quantize else None)
        tokenizer = load_tokenizer(str(folder))
        freeze(model)
        if not exact:
            fuse(model, compile)
        if embedding == "cpu":
            move_to_cpu(model)
        packed, why_not = _pack(model, config, dtype)
        eos_ids = _eos_ids(model, tokenizer)
        set_pad_token(tokenizer, eos_ids)
        identity = identify(str(path_or_hub_id), folder, commit, tokenizer, quantization)
        base = cls(model, tokenizer, identity, folder, eos_ids, _unquantized(model), packed, why_not, exact)
        if not quiet:
            log(base.summary())
        return base

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return compute_device(self.model)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of computations and of weights that are not in 4 bit."""
        return self.model.get_input_embeddings().weight.dtype

    def end_at(self, token: int) -> None:
        """End completions at this token too, such as the end of turn of a chat template."""
        self.eos_ids = tuple(dict.fromkeys((*self.eos_ids, token)))

    def checksum(self) -> int:
        """A number that changes with any bit of the base's weights, and not with adapters."""
        return checksum(self.model)

    def summary(self) -> str:
        """For the log: name, precision and device; whether and why packed attention is off."""
        lines = [
            f"base {self.identity.name}: {self.identity.quantization}, {str(self.dtype).removeprefix('torch.')} on "
            f"{self.device}; {self.unquantized:.1%} of its weights are not in 4 bit"
        ]
        if not self.packed:
            lines.append(f"packed attention is off ({self.why_not}): one row per completion, slower, same results")
        return "\n".join(lines)


def _pack(model: nn.Module, config: PretrainedConfig, dtype: torch.dtype) -> tuple[bool, str]:
    """Let the model compute packed rows where that is exact -> whether it is, and why not."""
    packed, why_not = probe(config)
    device = compute_device(model)
    if packed and (wrong := check_attention(config.get_text_config(), device, dtype)):
        packed, why_not = False, f"its attention was tested on {device}, and {wrong}"
    if packed:
        model.set_attn_implementation(ATTN_IMPLEMENTATION)
    return packed, why_not


def freeze(model: nn.Module) -> None:
    """Turn off gradients, dropout, and the repacking of 4-bit weights by bitsandbytes."""
    model.eval()
    for p in model.parameters():
        p.requires_grad_(False)
    for module in model.modules():
        # Checkpointing needs train mode, which would turn dropout on (gpt2: logits differ by 0.31).
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout", "attn_dropout", "activation_dropout", "layerdrop"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
        # On CPUs with AVX512-BF16 bitsandbytes rewrites the weights in place at the first forward in eval mode: the bits
        # of the base change, and later gradients are lost without an error.
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def nf4_config(dtype: torch.dtype, skipped: str) -> BitsAndBytesConfig:
    """NF4 with double quantization of every linear layer but one. dtype: of its computations. skipped: the head."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=[skipped],
    )


def _load_model(
    folder: Path, config: PretrainedConfig, dtype: torch.dtype, device: str, quantization: BitsAndBytesConfig | None
) -> nn.Module:
    """The model with all its weights. Raises UserError when some are missing, too many, damaged or not finite."""
    options = {} if quantization is None else {"quantization_config": quantization}
    with quiet_transformers(bars=sys.stderr.isatty() and processes.is_main()), weights.explained(folder):
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            device_map={"": device},
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, by name
            **options,
        )
    weights.refuse_incomplete(folder, config, loading)
    weights.refuse_not_finite(folder, model)
    return model


def _checked_config(folder: Path, quantization: str) -> PretrainedConfig:
    config = load_config(folder)
    if config.is_encoder_decoder:
        raise UserError(f"{folder} is an encoder-decoder model; lowalign trains causal language models")
    scheme = getattr(config, "quantization_config", None) or {}
    ours = scheme.get("quant_method") == "bitsandbytes" and scheme.get("bnb_4bit_quant_type") == "nf4"
    if scheme and not (ours and quantization == "nf4"):
        method = scheme.get("quant_method", "an unknown scheme")
        raise UserError(f"{folder} is already quantized ({method}); load the original 16-bit weights instead")
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{folder} has no *.safetensors file; other formats can hold code and are not read. Convert it first (transformers: model.save_pretrained)")  # fmt: skip
    return config


def _check_memory(folder: Path, config, quantization: str, dtype: torch.dtype, device: str, leave_free: float) -> str:
    """-> the name of the LM head, which is not quantized. Raises UserError when the model does not fit in free memory."""
    with torch.device("meta"), quiet_transformers():
        try:
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        except ValueError as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"transformers itself has no causal language model for {folder}: {reason}") from error
    output = model.get_output_embeddings()
    head = next(name for name, module in model.named_modules() if module is output)
    linear = {id(m.weight): m for m in model.modules() if isinstance(m, nn.Linear) and m is not output}
    four_bit = sum(m.weight.numel() for m in linear.values()) if quantization == "nf4" else 0
    rest = sum(p.numel() for p in model.parameters()) - four_bit
    need = int(four_bit * NF4_BYTES + rest * dtype.itemsize)
    # During loading, the largest tensor is in memory a second time, as stored.
    need += weights.largest_tensor(folder)
    on_card = device.startswith("cuda")
    free = card_memory.free(device, leave_free) if on_card else psutil.virtual_memory().available
    if need > free:
        advice = "" if quantization == "nf4" else ' or load it with quantization "nf4"'
        raise UserError(f"the base needs {need / GIB:.1f} GiB on {device} and {free / GIB:.1f} GiB are free; free some memory{advice}")  # fmt: skip
    return head


def _eos_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The eos ids of the generation config, the model's config and the tokenizer."""
    ids: list[int] = []
    for config in (getattr(model, "generation_config", None), model.config, tokenizer):
        eos = getattr(config, "eos_token_id", None)
        ids += eos if isinstance(eos, list | tuple) else [] if eos is None else [eos]
    return tuple(dict.fromkeys(ids))


def set_pad_token(tokenizer: PreTrainedTokenizerBase, eos_ids: tuple[int, ...]) -> None:
    """Set a pad token of the vocabulary that is no eos. Packs need none; other code that uses the tokenizer does."""
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id not in eos_ids:
        return
    special = [t for t in tokenizer.all_special_tokens if tokenizer.convert_tokens_to_ids(t) not in eos_ids]
    added = [t.content for i, t in tokenizer.added_tokens_decoder.items() if t.special and i not in eos_ids]
    named = [t for t in added + special if "pad" in t.lower()]
    spare = [t for t in added if "reserved" in t.lower() or "unused" in t.lower()]
    choices = named + spare + [t for t in (tokenizer.unk_token, tokenizer.bos_token) if t] + added + special
    choices = [t for t in choices if tokenizer.convert_tokens_to_ids(t) not in eos_ids]
    if choices:
        tokenizer.pad_token = choices[0]


def _unquantized(model: nn.Module) -> float:
    """The share of the weights that are not in 4 bit, by number of weights, not bytes."""
    four_bit = other = 0
    for p in model.parameters():
        if isinstance(p, bnb.nn.Params4bit):
            four_bit += p.quant_state.shape.numel()
        else:
            other += p.numel()
    return other / (four_bit + other)


class quiet_transformers:
    """Context manager: no advice from transformers while loading, and no progress bars unless `bars`."""

    def __init__(self, bars: bool = False) -> None:
        self.shown = bars

    def __enter__(self) -> None:
        self.verbosity = transformers_logging.get_verbosity()
        self.bars = transformers_logging.is_progress_bar_enabled()
        transformers_logging.set_verbosity_error()
        if not self.shown:
            transformers_logging.disable_progress_bar()

    def __exit__(self, *error) -> None:
        transformers_logging.set_verbosity(self.verbosity)
        if self.bars:
            transformers_logging.enable_progress_bar()
