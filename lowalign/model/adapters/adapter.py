"""One adapter on the base, and what every kind of adapter answers. A kind is a subclass in a file of its own."""

from typing import ClassVar

import torch
from peft import PeftConfig
from torch import Tensor, nn

from lowalign.config.sections import AdapterConfig
from lowalign.model.adapters.flat import FlatWeights
from lowalign.model.attention.soft_prompt import NO_SOFT_PROMPT, SoftPrompt
from lowalign.model.base.base import Base

SCALAR_HEAD = "score.weight"  # as stock peft names the head of a sequence classifier


class Adapter:
    """A fresh adapter, put on the base when it is made. New kinds are added to `kinds.KINDS`.

    A kind with weights inside the base's layers makes those layers subclasses of peft's BaseTunerLayer and names its
    weights in their adapter_layer_names; the checksum of the base leaves these out.

    option: its --adapter.kind. title: its name in messages. config_class, peft_type: its peft config, and how
    adapter_config.json names it.
    soft: a soft prompt; at most one is active at a time. identity_at_start: a fresh one does not change what the base
    computes. working_copy: on a 16-bit base it computes with a 16-bit copy of its fp32 weights.
    """

    option: ClassVar[str]
    title: ClassVar[str]
    config_class: ClassVar[type[PeftConfig]]
    peft_type: ClassVar[str]
    soft: ClassVar[bool] = False
    identity_at_start: ClassVar[bool] = False
    working_copy: ClassVar[bool] = False

    def __init__(self, base: Base, name: str, config: PeftConfig) -> None:
        self.base, self.name, self.config = base, name, config
        self.scalar_head: nn.Parameter | None = None
        self.flat: FlatWeights | None = None
        self.full_precision: dict[str, Tensor] = {}  # fp32 weights of a loaded adapter that computes with a 16-bit copy
        self.parked = False

    # -- what a kind answers: the first three always, the others where the default does not hold ----------------------

    @staticmethod
    def peft_config(options: AdapterConfig) -> PeftConfig:
        """The peft config for --adapter options."""
        raise NotImplementedError

    def own_weights(self) -> dict[str, nn.Parameter]:
        """Its weights by name, as the model uses them, without the scalar head."""
        raise NotImplementedError

    def file_name(self, key: str) -> str:
        """The name in an adapter folder of a weight, or of the scalar head."""
        raise NotImplementedError

    @staticmethod
    def prepare_loaded(config: PeftConfig) -> None:
        """Change the config of a stored adapter to what loading it needs."""

    @staticmethod
    def layers(model: nn.Module) -> list[nn.Module]:
        """The layers of the model that carry adapters of this kind."""
        return []

    @staticmethod
    def activate(layers: list[nn.Module], names: list[str]) -> None:
        """Make exactly these adapters of this kind act in `layers`; requires_grad does not change."""

    def replaces(self) -> frozenset[str]:
        """The base's own tensors that it puts others in place of; of each at most one active adapter may."""
        return frozenset()

    def init_from_text(self, text: str) -> None:
        """Start from a text under the active adapters, where the config alone cannot do it."""

    def is_identity(self, logps: Tensor, base_logps: Tensor) -> bool:
        """Whether it changes nothing, given log-probs (N,) of the same tokens with and without it, in evaluation mode."""
        return torch.equal(logps, base_logps)

    def soft_prompt(self) -> SoftPrompt:
        """What it puts before every prompt."""
        return NO_SOFT_PROMPT

    def file_config(self) -> PeftConfig:
        """The config to store."""
        return self.config

    def file_tensors(self) -> dict[str, Tensor]:
        """The tensors to store, by their names in the file."""
        return {self.file_name(key): tensor for key, tensor in self.weights().items()}

    def remove(self) -> None:
        """Take its weights off the base's layers."""

    # -- the same for all kinds ---------------------------------------------------------------------------------------

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """All its weights by name, as the model uses them, with the scalar head if there is one."""
        return self.own_weights() | ({} if self.scalar_head is None else {SCALAR_HEAD: self.scalar_head})

    def weights(self) -> dict[str, Tensor]:
        """All its weights by name, in the precision they are trained in."""
        return self.flat.tensors() if self.flat else {**self.named_parameters(), **self.full_precision}

    def file_parameters(self) -> dict[str, nn.Parameter]:
        """Where the tensors of a file go, by their names in the file."""
        return {self.file_name(key): parameter for key, parameter in self.named_parameters().items()}

    def compute_as_trained(self) -> None:
        """Compute with a copy in the base's dtype, as in training; the fp32 weights go to CPU memory."""
        if self.working_copy and self.base.dtype != torch.float32:
            for key, p in self.own_weights().items():
                self.full_precision[key] = p.data.to("cpu", copy=True)
                p.data = p.data.to(self.base.dtype)

    def compute_in_full_precision(self) -> None:
        """Compute with the fp32 weights again, and forget the flat buffer."""
        exact = self.flat.tensors() if self.flat else self.full_precision
        for key, p in self.named_parameters().items():
            if key in exact:
                p.data = exact[key].to(p.device)
        self.flat, self.full_precision = None, {}

    def move(self, device: torch.device) -> None:
        """Move its weights and their gradients."""
        if self.flat:
            self.flat.move(device)
        else:
            for p in self.named_parameters().values():
                p.data = p.data.to(device)
