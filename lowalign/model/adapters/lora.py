"""LoRA (arXiv 2106.09685), rsLoRA and DoRA by peft's layers, with what is active independent of what is trained.

peft couples the two: `set_adapter` also changes requires_grad, which silently drops the gradients of an earlier forward.
So the two private attributes that peft's layers read in their forward are set here directly; a test guards them.
"""

import copy
import warnings

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lowalign.config.sections import AdapterConfig
from lowalign.errors import UserError
from lowalign.model.adapters import lora_step
from lowalign.model.adapters.adapter import Adapter
from lowalign.model.base.base import Base

_PARTS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
# Of mean |log-prob difference| / mean |log-prob|, in eps of the base's dtype. The demo base shows 0.25 to 0.35 in bf16,
# 0.26 to 0.5 in fp16, 0 in fp32. Ten times the largest.
DORA_ROUNDING = 5


class Lora(Adapter):
    """Low-rank updates of linear layers; several add up. Raises UserError for targets or options that do not fit."""

    option, title, config_class, peft_type = "lora", "LoRA", LoraConfig, "LORA"
    identity_at_start = True
    working_copy = True

    def __init__(self, base: Base, name: str, config: LoraConfig) -> None:
        super().__init__(base, name, _inject(base.model, name, config))
        if not base.exact:
            for layer in self.layers(base.model):
                lora_step.fuse(layer)
        self._weights = _weights(base.model, name)
        base.model.train(base.model.training)  # new layers come in train mode, with their dropout on

    @staticmethod
    def peft_config(options: AdapterConfig) -> LoraConfig:
        return LoraConfig(
            r=options.r,
            lora_alpha=options.alpha,
            lora_dropout=options.dropout,
            target_modules=list(options.targets),
            use_rslora=options.rslora,
            use_dora=options.dora,
            task_type="CAUSAL_LM",
        )

    @staticmethod
    def prepare_loaded(config: LoraConfig) -> None:
        """No dropout: policy and reference would differ by its noise."""
        config.lora_dropout = 0.0

    def is_identity(self, logps: Tensor, base_logps: Tensor) -> bool:
        """Bit for bit; with DoRA, whose magnitudes are rounded norms: every B is zero, and log-probs are within rounding."""
        if not self.config.use_dora:
            return super().is_identity(logps, base_logps)
        if any(p.any() for key, p in self._weights.items() if "lora_B" in key or "lora_embedding_B" in key):
            return False
        difference, scale = (logps - base_logps).abs().mean(), base_logps.abs().mean().clamp(min=1)
        return bool(difference <= DORA_ROUNDING * torch.finfo(self.base.dtype).eps * scale)

    @staticmethod
    def layers(model: nn.Module) -> list[nn.Module]:
        """The layers that carry a LoRA, in the model's order."""
        return [m for m in model.modules() if isinstance(m, LoraLayer)]

    @staticmethod
    def activate(layers: list[nn.Module], names: list[str]) -> None:
        """Make exactly these LoRAs act, added up in this order."""
        for layer in layers:
            layer._active_adapter = names
            layer._disable_adapters = not names

    def own_weights(self) -> dict[str, nn.Parameter]:
        """By their names in a peft folder, without "base_model.model."."""
        return self._weights

    def file_name(self, key: str) -> str:
        """As peft writes it."""
        return f"base_model.model.{key}"

    def remove(self) -> None:
        """The layers stay; without an adapter they compute what the base computes, bit for bit."""
        for layer in self.layers(self.base.model):
            for part in layer.adapter_layer_names + layer.other_param_names:
                container = getattr(layer, part, None)
                if isinstance(container, dict | nn.ModuleDict | nn.ParameterDict) and self.name in container:
                    del container[self.name]
        getattr(self.base.model, "peft_config", {}).pop(self.name, None)


def linear_names(model: nn.Module) -> list[str]:
    """Names (last part) of the layers that "all-linear" means: every linear layer but the LM head.

    In a mixture of experts only those of the attention: transformers fuses the experts into 3-D parameters, which stay
    in 16 bit and which peft would wrap twice.
    """
    head = model.get_output_embeddings()
    head = getattr(head, "base_layer", head)  # inside a layer that carries a LoRA
    mixture = any(p.ndim == 3 for p in model.parameters())
    names = set()
    for name, module in model.named_modules():
        name = name.removesuffix(".base_layer")  # as above
        linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
        own = linear and ".lora_" not in name and module is not head
        if own and (not mixture or "attn" in name or "attention" in name):
            names.add(name.rpartition(".")[2])
    return sorted(names)


def _inject(model: nn.Module, name: str, config: LoraConfig) -> LoraConfig:
    """Put a new LoRA on the model, in fp32. Returns the config with its targets written out."""
    config = copy.deepcopy(config)
    if config.bias != "none" or config.modules_to_save or config.trainable_token_indices:
        raise UserError(f'adapter "{name}": bias, modules_to_save and trainable tokens would change the shared base; leave them out')  # fmt: skip
    targets, all_linear = config.target_modules, linear_names(model)
    if targets is None or targets == "all-linear" or set(targets) == {"all-linear"}:
        config.target_modules = set(all_linear)
    elif isinstance(targets, str) or not any(n.endswith(t) for t in targets for n, _ in model.named_modules()):
        there = ", ".join(all_linear)
        raise UserError(f'adapter "{name}": no layer is called {targets}; this model has {there} (or use "all-linear")')
    if any("expert" in t for t in config.target_modules):
        raise UserError(
            f'adapter "{name}": LoRA on experts is not supported; target the attention ({", ".join(all_linear)})'
        )
    config.inference_mode = False
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are intended
        inject_adapter_in_model(config, model, name)
    for layer in Lora.layers(model):
        for part in _PARTS:
            container = getattr(layer, part)
            if name in container:
                entry = container[name]
                container[name] = (
                    entry.float() if isinstance(entry, nn.Module) else nn.Parameter(entry.detach().float())
                )
    return config


def _weights(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    weights: dict[str, nn.Parameter] = {}
    for path, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        for part in _PARTS:
            container = getattr(layer, part)
            if name not in container:
                continue
            entry = container[name]
            if isinstance(entry, nn.Parameter):
                weights[f"{path}.{part}"] = entry
            elif part == "lora_magnitude_vector":
                weights[f"{path}.{part}"] = entry.weight
            else:
                weights |= {f"{path}.{part}.{key}": p for key, p in entry.named_parameters()}
    return weights
