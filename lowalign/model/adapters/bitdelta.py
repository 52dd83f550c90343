"""BitDelta (arXiv 2402.10193): a fine-tuned model as its base and one bit for each weight that changed.

y = W x + α S x for each linear layer: S the signs of the change, α a scale for the matrix or for each row. What is no
linear layer (embeddings, norms, biases, the LM head) is kept in 16 bit, and takes the place of the base's own while the
delta is active. Signs and kept tensors never change; the log-scales are what is trained.
"""

import copy
from dataclasses import dataclass, field

import torch
from peft import PeftConfig
from torch import Tensor, nn

from lowalign.config.sections import AdapterConfig
from lowalign.errors import UserError
from lowalign.log import log
from lowalign.model.adapters.adapter import SCALAR_HEAD, Adapter
from lowalign.model.adapters.signs import SignProduct
from lowalign.model.base.base import Base

SIGNS, LOG_SCALE = ".signs", ".log_scale"  # after the name of a linear layer, in the file


@dataclass
class BitDeltaConfig(PeftConfig):
    """Of a compressed model; peft does not know this kind, and refuses its folder.

    matrices: names of the linear layers with signs. kept: names of the tensors in 16 bit. per_row: a scale for each row of
    a matrix instead of one for all of it. onto: "dequantized" or "original": the base's weights that the change is
    counted from. dtype: of the kept tensors. tied: the names of embedding and LM head, if they are one kept tensor.
    """

    matrices: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    per_row: bool = False
    onto: str = "dequantized"
    dtype: str = "bfloat16"
    tied: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "BITDELTA"


@dataclass
class SignMatrix:
    """packed (rows, bytes) uint8: the signs. log_scale (1,) or (rows,), fp32."""

    packed: Tensor
    log_scale: nn.Parameter


class DeltaSlot:
    """What the deltas do to one module of the base, in a forward hook: the module can also be inside a peft layer."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.matrices: dict[str, SignMatrix] = {}  # by the adapter's name
        self.kept: dict[str, dict[str, nn.Parameter]] = {}  # by the adapter's name, then the parameter's
        self.own: dict[str, nn.Parameter] = {}  # the base's, of the parameters that some delta replaces
        self.active: list[SignMatrix] = []
        module.register_forward_hook(self.forward_hook)

    @classmethod
    def of(cls, module: nn.Module) -> "DeltaSlot":
        """The slot of a module; made when it has none."""
        if not hasattr(module, "delta_slot"):
            module.delta_slot = cls(module)
        return module.delta_slot

    def keep(self, adapter: str, name: str, parameter: nn.Parameter) -> None:
        """Let this parameter take the place of the module's own while the adapter is active."""
        self.own.setdefault(name, getattr(self.module, name))
        self.kept.setdefault(adapter, {})[name] = parameter

    def activate(self, adapters: list[str]) -> None:
        """Other Parameter objects, not other data in the base's: a backward still to come has the ones of its forward."""
        self.active = [self.matrices[name] for name in adapters if name in self.matrices]
        for name, parameter in self.own.items():
            replacing = [self.kept[a][name] for a in adapters if name in self.kept.get(a, {})]
            setattr(self.module, name, replacing[0] if replacing else parameter)

    def forward_hook(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """y += α x Sᵀ for each active delta."""
        for matrix in self.active:
            output = output + SignProduct.apply(inputs[0], matrix.packed, matrix.log_scale).to(output.dtype)
        return output


class BitDelta(Adapter):
    """Signs, scales and replaced tensors. Add it by loading a folder; a fresh one changes nothing and has no signs.

    Deltas add up, as LoRAs do; two that replace the same tensor cannot be active together.
    """

    option, title, config_class, peft_type = "bitdelta", "BitDelta", BitDeltaConfig, "BITDELTA"

    def __init__(self, base: Base, name: str, config: BitDeltaConfig) -> None:
        super().__init__(base, name, copy.deepcopy(config))
        modules = {n.replace(".base_layer", ""): module for n, module in base.model.named_modules()}
        places = {key: modules.get(key.rpartition(".")[0]) for key in config.kept}
        unknown = [n for n in config.matrices if n not in modules]
        unknown += [key for key, m in places.items() if getattr(m, key.rpartition(".")[2], None) is None]
        if unknown:
            raise UserError(f'adapter "{name}" does not fit this base, which has no {unknown[0]}')
        if config.onto == "dequantized" and base.identity.quantization == "none":
            log(
                f"{name} was counted from the base in NF4, whose rounding it corrects; on this 16-bit base it is less exact"
            )
        self.matrices = {n: _empty(modules[n], config.per_row, base.device) for n in config.matrices}
        self.kept = {key: _copied(m, key.rpartition(".")[2]) for key, m in places.items()}
        for n, matrix in self.matrices.items():
            DeltaSlot.of(modules[n]).matrices[name] = matrix
        for key, module in places.items():
            DeltaSlot.of(module).keep(name, key.rpartition(".")[2], self.kept[key])
        for embedding, head in [config.tied] if config.tied else []:
            DeltaSlot.of(modules[head.rpartition(".")[0]]).keep(name, "weight", self.kept[embedding])

    @staticmethod
    def peft_config(options: AdapterConfig) -> BitDeltaConfig:
        raise UserError("a BitDelta is not trained from the start; `lowalign bitdelta compress` makes one")

    @staticmethod
    def layers(model: nn.Module) -> list[nn.Module]:
        """The modules with a slot."""
        return [module for module in model.modules() if hasattr(module, "delta_slot")]

    @staticmethod
    def activate(layers: list[nn.Module], names: list[str]) -> None:
        for module in layers:
            module.delta_slot.activate(names)

    def replaces(self) -> frozenset[str]:
        return frozenset(self.kept)

    def own_weights(self) -> dict[str, nn.Parameter]:
        """The log-scales."""
        return {f"{n}{LOG_SCALE}": matrix.log_scale for n, matrix in self.matrices.items()}

    def file_name(self, key: str) -> str:
        """The same; the scalar head as peft writes it."""
        return f"base_model.model.{key}" if key == SCALAR_HEAD else key

    def file_parameters(self) -> dict[str, Tensor]:
        """With the signs and the kept tensors."""
        return super().file_parameters() | self._signs() | self.kept

    def file_tensors(self) -> dict[str, Tensor]:
        """With the signs and the kept tensors, those in the precision they came in."""
        dtype = getattr(torch, self.config.dtype)
        return super().file_tensors() | self._signs() | {key: p.detach().to(dtype) for key, p in self.kept.items()}

    def remove(self) -> None:
        """The slots stay; without a delta they do nothing."""
        for module in self.layers(self.base.model):
            module.delta_slot.matrices.pop(self.name, None)
            module.delta_slot.kept.pop(self.name, None)

    def move(self, device: torch.device) -> None:
        super().move(device)
        for matrix in self.matrices.values():
            matrix.packed = matrix.packed.to(device)
        for parameter in self.kept.values():
            parameter.data = parameter.data.to(device)

    def _signs(self) -> dict[str, Tensor]:
        return {f"{n}{SIGNS}": matrix.packed for n, matrix in self.matrices.items()}


def _empty(module: nn.Module, per_row: bool, device: torch.device) -> SignMatrix:
    """Scale 0 for a linear layer."""
    if hasattr(module, "nf"):  # a Conv1D
        rows, columns = module.nf, module.nx
    else:
        rows, columns = module.out_features, module.in_features
    packed = torch.zeros(rows, (columns + 7) // 8, dtype=torch.uint8, device=device)
    return SignMatrix(packed, nn.Parameter(torch.full((rows if per_row else 1,), -torch.inf, device=device)))


def _copied(module: nn.Module, name: str) -> nn.Parameter:
    return nn.Parameter(getattr(module, name).detach().clone(), requires_grad=False)
