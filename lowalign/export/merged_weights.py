"""Merge: base + adapters → plain weights, streamed a tensor at a time, then compared with what was trained.

onto "dequantized": the weights the adapters were trained on, NF4 taken back to 16 bit. onto "original": the base's own
16-bit weights, which the adapters have never seen. Measured with a LoRA on Llama 2 7B shapes, KL(trained ‖ merged) is 4e-5
onto dequantized and 9e-4 onto original.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.pytorch_utils import Conv1D

from lowalign.errors import UserError
from lowalign.export.bitdelta_update import BitDeltaUpdate
from lowalign.export.lora_update import LoraUpdate
from lowalign.export.nf4 import dequantized_checkpoint, quantized_tensors, round_trip
from lowalign.export.weight_files import PlannedTensor, stored_tensors
from lowalign.model.adapters.adapter import SCALAR_HEAD


@dataclass(frozen=True)
class Skeleton:
    """What a model's config says of its weights. linear: the modules that a 4-bit base holds in 4 bit, all linear ones but
    the head. parameters: names of all. embedding, head: names of the weights. tied: whether the head is the embedding.
    embedding_scale: what the embedding multiplies its rows by (gemma)."""

    linear: dict[str, nn.Module]
    parameters: frozenset[str]
    embedding: str
    head: str
    tied: bool
    embedding_scale: float

    @classmethod
    def of(cls, config: PretrainedConfig) -> "Skeleton":
        """Of a causal language model, made on the meta device."""
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
        names = {id(module): name for name, module in model.named_modules()}
        linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not outputs}
        tied = bool(getattr(config, "tie_word_embeddings", False))
        scale = getattr(inputs, "scalar_embed_scale", 1.0)
        parameters = frozenset(name for name, _ in model.named_parameters(remove_duplicate=False))
        embedding, head = (f"{names[id(module)]}.weight" for module in (inputs, outputs))
        return cls(linear, parameters, embedding, head, tied, scale)


@dataclass(frozen=True)
class Plan:
    """The tensors of a merged model in the order of the base's files. tied: its LM head is the embedding. reward: it has a
    scalar head instead of the LM head."""

    skeleton: Skeleton
    tensors: list[PlannedTensor]
    tied: bool
    reward: bool

    @property
    def nbytes(self) -> int:
        """Size of the weights."""
        return sum(tensor.nbytes for tensor in self.tensors)


def plan_merge(
    base: Path,
    config: PretrainedConfig,
    updates: Sequence[LoraUpdate | BitDeltaUpdate],
    dequantized: bool,
    dtype: torch.dtype,
    scalar_head: Tensor | None = None,
    trained_dtype: torch.dtype = torch.bfloat16,
) -> Plan:
    """What the base becomes under the updates, in the order they stack; nothing is computed yet.

    dequantized: onto NF4 converted back to 16 bit (always so for a base that is stored in NF4). scalar_head: (1, hidden), of
    a reward run. trained_dtype: that of the weights when they were quantized for training. Raises UserError for a tensor of
    an adapter that no weight of the base takes.
    """
    skeleton = Skeleton.of(config)
    dequantized = dequantized and not getattr(config, "quantization_config", None)
    tensors, tied = _base_tensors(base, config, skeleton, updates, scalar_head)
    planned = []
    for name, tensor in tensors.items():
        module = skeleton.linear.get(name.removesuffix(".weight"))
        changing = [update for update in updates if update.changes(name)]
        if not tensor.dtype.is_floating_point or name.endswith("rotary_emb.inv_freq"):
            planned.append(tensor)
            continue
        transposed = isinstance(module, Conv1D)
        for update in changing:
            update.check_shape(name, tensor.shape[::-1] if transposed else tensor.shape)
        quantized_from = trained_dtype if dequantized and module is not None else None
        make = _maker(tensor, changing, quantized_from, transposed, dtype)
        planned.append(PlannedTensor(name, dtype, tensor.shape, make))
    for update in updates:
        unplaced = update.unplaced(tensors)
        if unplaced:
            raise UserError(
                f"{update.folder} cannot be merged: {len(unplaced)} of its tensors change nothing that the base stores "
                f"(first: {unplaced[0]}). Adapters on experts, biases or other heads stay adapters: ship the folder as it is"
            )
    return Plan(skeleton, planned, tied, scalar_head is not None)


def _base_tensors(
    base: Path,
    config: PretrainedConfig,
    skeleton: Skeleton,
    updates: Sequence[LoraUpdate | BitDeltaUpdate],
    scalar_head: Tensor | None,
) -> tuple[dict[str, PlannedTensor], bool]:
    """-> the tensors of the merged model as the base has them, in 16 bit or wider; and whether its LM head is the embedding."""
    stored = stored_tensors(base)
    if getattr(config, "quantization_config", None):
        tensors = dequantized_checkpoint(stored)
    else:
        tensors = {name: PlannedTensor(name, t.dtype, t.shape, t.read) for name, t in stored.items()}
    if scalar_head is not None:
        tensors.pop(skeleton.head, None)
        head = scalar_head.float()
        tensors[SCALAR_HEAD] = PlannedTensor(SCALAR_HEAD, torch.float32, tuple(head.shape), lambda: head)
        return tensors, skeleton.tied
    tied = skeleton.tied and skeleton.head not in tensors
    if tied and any(update.changes(name) for update in updates for name in (skeleton.embedding, skeleton.head)):
        # Only one of the two was trained: the merged model has both. The head starts as the base's embedding.
        tensors[skeleton.head] = replace(tensors[skeleton.embedding], name=skeleton.head)
        tied = False
    return tensors, tied


def quantize(plan: Plan) -> Plan:
    """The plan with every linear layer but the head in NF4."""
    tensors: list[PlannedTensor] = []
    for tensor in plan.tensors:
        module = plan.skeleton.linear.get(tensor.name.removesuffix(".weight"))
        if module is None or not tensor.name.endswith(".weight"):
            tensors.append(tensor)
        else:
            tensors += quantized_tensors(tensor, isinstance(module, Conv1D))
    return replace(plan, tensors=tensors)


def _maker(
    tensor: PlannedTensor,
    updates: Sequence[LoraUpdate | BitDeltaUpdate],
    quantized_from: torch.dtype | None,
    transposed: bool,
    dtype: torch.dtype,
) -> Callable[[], Tensor]:
    """What computes the merged weight, on the GPU where there is one: faster, and the quantization of the training."""

    def make() -> Tensor:
        device = torch.device("cuda" if torch.cuda.is_available() and (updates or quantized_from) else "cpu")
        weight = tensor.make().to(device)
        if quantized_from:
            weight = round_trip(weight.to(quantized_from), transposed)
        if not updates:
            return weight.to(dtype).cpu()
        weight = weight.float()
        # A DoRA that stands on others needs the weight before them too.
        base = weight.clone() if any(update.is_dora(tensor.name) for update in updates[1:]) else weight
        for update in updates:
            weight = update.apply(tensor.name, weight, base, transposed)
        return weight.to(dtype).cpu()

    return make
