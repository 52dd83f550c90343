"""A Base without data: the architecture of a config.json on the meta device, with 4-bit layers of the right sizes."""

from pathlib import Path

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from lowalign.config.sections import BaseConfig
from lowalign.errors import UserError
from lowalign.model.attention.interface import ATTN_IMPLEMENTATION
from lowalign.model.base import hub
from lowalign.model.base.base import Base, freeze, quiet_transformers
from lowalign.model.base.embedding import look_up_on_cpu, move_to_cpu
from lowalign.model.base.fuse import fuse
from lowalign.model.base.identity import Identity
from lowalign.model.base.probe import probe

NF4_BLOCK, SCALE_BLOCK = 64, 256  # weights that share a scale; scales that share one of the second quantization


def load_config(model: str, revision: str | None = None) -> PretrainedConfig:
    """The config of a folder or a Hub model; nothing else of it is read. Raises UserError."""
    folder, _ = hub.resolve(model, revision, ["config.json"])
    config = hub.load_config(folder)
    if config.is_encoder_decoder:
        raise UserError(f"{folder} is an encoder-decoder model; lowalign trains causal language models")
    return config


def meta_base(config: PretrainedConfig, options: BaseConfig, name: str = "base") -> Base:
    """A Base of this architecture whose tensors are on the meta device.

    Raises UserError when the config is not a causal language model's.
    """
    dtype = getattr(torch, options.dtype)
    with torch.device("meta"), quiet_transformers():
        try:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
        except ValueError as error:
            raise UserError(f"{name} is not a causal language model: {str(error).splitlines()[0]}") from error
    head = model.get_output_embeddings()
    if options.quantization == "nf4":
        for path, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and module is not head:
                parent, _, own = path.rpartition(".")
                setattr(model.get_submodule(parent), own, nf4_layer(module, dtype))
        model.is_loaded_in_4bit = True  # peft chooses its LoRA class by it
    if options.embedding == "cpu":
        _embed_on_cpu(model)
    freeze(model)
    if not options.exact:
        fuse(model, options.compile)
    packed, why_not = probe(config)
    if packed:
        model.set_attn_implementation(ATTN_IMPLEMENTATION)
    identity = Identity(name, None, "", "", config.get_text_config().vocab_size, "", options.quantization)
    tokenizer = range(identity.vocabulary)  # of which only the length is used
    return Base(model, tokenizer, identity, Path(), (), 0.0, packed, why_not, options.exact)


def _embed_on_cpu(model: nn.Module) -> None:
    """As `move_to_cpu`, with zeros that take no memory."""
    embedding = model.get_input_embeddings()
    if embedding.weight is model.get_output_embeddings().weight:
        move_to_cpu(model)  # which refuses it
    zero = torch.zeros((), dtype=embedding.weight.dtype, device="cpu")
    embedding.weight = nn.Parameter(zero.expand(embedding.weight.shape), requires_grad=False)
    look_up_on_cpu(model)


def nf4_layer(layer: nn.Linear, dtype: torch.dtype) -> bnb.nn.Linear4bit:
    """A 4-bit layer of this shape, as bitsandbytes stores it with double quantization (arXiv 2305.14314)."""
    shape = layer.out_features, layer.in_features
    blocks = -(-layer.weight.numel() // NF4_BLOCK)
    made = bnb.nn.Linear4bit(*reversed(shape), bias=False, compute_dtype=dtype, quant_type="nf4", device="meta")
    scales = QuantState(
        absmax=_empty(-(-blocks // SCALE_BLOCK)), code=_empty(256), blocksize=SCALE_BLOCK, dtype=torch.float32
    )
    made.quant_state = QuantState(
        absmax=_empty(blocks, dtype=torch.uint8), shape=torch.Size(shape), code=_empty(16), blocksize=NF4_BLOCK,
        quant_type="nf4", dtype=dtype, offset=_empty(), state2=scales,
    )  # fmt: skip
    made.weight = bnb.nn.Params4bit.__new__(
        bnb.nn.Params4bit, _empty(-(-layer.weight.numel() // 2), 1, dtype=torch.uint8), requires_grad=False,
        quant_state=made.quant_state, blocksize=NF4_BLOCK, compress_statistics=True, quant_type="nf4", bnb_quantized=True,
    )  # fmt: skip
    made.bias = layer.bias
    return made


def base_tensors(model: nn.Module) -> list[Tensor]:
    """Weights, buffers and the scales of 4-bit weights."""
    tensors = [*model.parameters(), *model.buffers()]
    for p in model.parameters():
        state = getattr(p, "quant_state", None)
        if state is not None:
            tensors += [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    return tensors


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
