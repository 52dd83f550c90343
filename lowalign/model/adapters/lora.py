"""LoRA on the base: peft's layers, with "which are active" and "which are trained" kept apart.

peft couples the two: `set_adapter` also flips requires_grad, which silently drops the gradients of a forward already made.
So the two private attributes that peft's layers read in their forward are set here directly; a test guards them.
"""

import copy
import warnings

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lowalign.errors import UserError

_PARTS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")


def linear_names(model: nn.Module) -> list[str]:
    """Names (last part) of the layers that "all-linear" means: every linear layer but the head.

    In a mixture of experts only those of the attention: transformers fuses the experts into 3-D parameters, which stay
    in 16 bit and which peft would wrap twice.
    """
    head = model.get_output_embeddings()
    mixture = any(p.ndim == 3 for p in model.parameters())
    names = set()
    for name, module in model.named_modules():
        name = name.removesuffix(".base_layer")  # where an earlier host has put a LoRA
        linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
        if (
            linear
            and ".lora_" not in name
            and module is not head
            and not (mixture and "attn" not in name and "attention" not in name)
        ):
            names.add(name.rpartition(".")[2])
    return sorted(names)


def inject(model: nn.Module, name: str, config: LoraConfig, all_linear: list[str]) -> LoraConfig:
    """Put a new LoRA on the model, in fp32. Returns the config with its targets written out.

    Raises UserError for options that would train something other than low-rank updates, and for targets that are not there.
    """
    config = copy.deepcopy(config)
    if config.bias != "none" or config.modules_to_save or config.trainable_token_indices:
        raise UserError(f'adapter "{name}": bias, modules_to_save and trainable tokens would change the shared base; leave them out')  # fmt: skip
    targets = config.target_modules
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
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are the point
        inject_adapter_in_model(config, model, name)
    for layer in layers(model):
        for part in _PARTS:
            container = getattr(layer, part)
            if name in container:
                container[name] = container[name].float() if isinstance(container[name], nn.Module) else nn.Parameter(
                    container[name].detach().float()
                )  # fmt: skip
    return config


def layers(model: nn.Module) -> list[LoraLayer]:
    """The layers that carry a LoRA, in the model's order."""
    return [m for m in model.modules() if isinstance(m, LoraLayer)]


def weights(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """The adapter's weights under the names they have in a peft folder, without its "base_model.model." in front."""
    found = {}
    for path, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        for part in _PARTS:
            container = getattr(layer, part)
            if name not in container:
                continue
            entry = container[name]
            if isinstance(entry, nn.Parameter):
                found[f"{path}.{part}"] = entry
            elif part == "lora_magnitude_vector":
                found[f"{path}.{part}"] = entry.weight
            else:
                found |= {f"{path}.{part}.{key}": p for key, p in entry.named_parameters()}
    return found


def activate(carriers: list[LoraLayer], names: list[str]) -> None:
    """Make exactly these LoRAs act, added up, in this order; requires_grad is not touched."""
    for layer in carriers:
        layer._active_adapter = names
        layer._disable_adapters = not names


def remove(model: nn.Module, name: str) -> None:
    """Take the adapter's weights away; the layers stay, and without an adapter they are the base's, bit for bit."""
    for layer in layers(model):
        for part in layer.adapter_layer_names + layer.other_param_names:
            container = getattr(layer, part, None)
            if isinstance(container, dict | nn.ModuleDict | nn.ParameterDict) and name in container:
                del container[name]
    getattr(model, "peft_config", {}).pop(name, None)


def is_identity(named: dict[str, Tensor]) -> bool:
    """Whether a fresh LoRA changes nothing: all its B are zero (with DoRA the magnitude is the base's own norm)."""
    up = [t for key, t in named.items() if "lora_B" in key or "lora_embedding_B" in key]
    return all(not t.any() for t in up)
