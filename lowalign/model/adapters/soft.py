"""Soft prompts: prompt tuning (arXiv 2104.08691) and prefix tuning (arXiv 2101.00190), by peft's encoders."""

import copy

import torch
from peft import PrefixEncoder, PrefixTuningConfig, PromptEmbedding, PromptTuningConfig
from peft.utils.other import _prepare_prompt_learning_config
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from lowalign.errors import UserError

SoftConfig = PromptTuningConfig | PrefixTuningConfig


def encoder(
    name: str, config: SoftConfig, model: nn.Module, tokenizer: PreTrainedTokenizerBase
) -> tuple[nn.Module, SoftConfig]:
    """A new encoder in fp32 on the model's device, and the config with the model's shape filled in."""
    config = copy.deepcopy(config)
    text = model.config.get_text_config()
    if not config.num_virtual_tokens or config.num_virtual_tokens < 1:
        raise UserError(f'adapter "{name}": num_virtual_tokens must be at least 1')
    if isinstance(config, PrefixTuningConfig) and not _uniform(text):
        raise UserError(f'adapter "{name}": prefix tuning needs layers of one shape, which {text.model_type} has not; use lora or prompt')  # fmt: skip
    config = _prepare_prompt_learning_config(config, text)
    config.num_transformer_submodules = 1
    config.inference_mode = False
    embeddings = model.get_input_embeddings()
    if isinstance(config, PrefixTuningConfig):
        module = PrefixEncoder(config)
    else:
        words, config.prompt_tuning_init = (
            config.prompt_tuning_init,
            "RANDOM",
        )  # peft's own TEXT reads a tokenizer from a path
        module, config.prompt_tuning_init = PromptEmbedding(config, embeddings), words
        start = _start(name, config, embeddings, tokenizer)
        if start is not None:
            module.embedding.weight = nn.Parameter(start)
    return module.float().to(embeddings.weight.device), config


def _uniform(text: PretrainedConfig) -> bool:
    """Whether all layers have keys of one shape (gemma4's have not)."""
    layers = getattr(text, "per_layer_config", None)
    if layers is None:
        return True
    shape = lambda c: (getattr(c, "num_key_value_heads", None), getattr(c, "head_dim", None))  # noqa: E731
    return len({shape(layers[i]) for i in range(text.num_hidden_layers)}) == 1


def _start(
    name: str, config: PromptTuningConfig, embeddings: nn.Module, tokenizer: PreTrainedTokenizerBase
) -> Tensor | None:
    """(v, hidden) initial embeddings: of a text, repeated or cut to v tokens, or of random vocabulary entries."""
    kind = getattr(config.prompt_tuning_init, "value", config.prompt_tuning_init)
    v = config.num_virtual_tokens
    if kind == "TEXT":
        chosen = torch.tensor(text_ids(name, config.prompt_tuning_init_text or "", v, tokenizer))
    elif kind == "SAMPLE_VOCAB":
        chosen = torch.randint(0, len(tokenizer), (v,))
    else:
        return None
    return embeddings(chosen.to(embeddings.weight.device)).detach().float()


def text_ids(name: str, text: str, v: int, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The v tokens that a soft prompt starts from: the text's, repeated or cut."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise UserError(f'adapter "{name}": the text to start from is empty')
    return (ids * (v // len(ids) + 1))[:v]


@torch.no_grad()
def set_prefix(module: nn.Module, states: list[tuple[Tensor, Tensor]]) -> None:
    """Let the prefix be these keys and values, (1, kv_heads, v, head_dim) each for each layer."""
    layers = torch.stack(
        [torch.stack([key[0], value[0]]) for key, value in states]
    )  # (layers, 2, kv_heads, v, head_dim)
    module.embedding.weight.copy_(layers.permute(3, 0, 1, 2, 4).flatten(1))


def virtual_embeddings(module: nn.Module, config: SoftConfig) -> Tensor:
    """(v, hidden) embeddings that stand before the prompt."""
    return module(_indices(module, config))


def prefix_states(module: nn.Module, config: SoftConfig) -> list[tuple[Tensor, Tensor]]:
    """For each layer the learned keys and values, each (1, kv_heads, v, head_dim)."""
    heads = config.num_attention_heads  # peft's name for the number of key-value heads here
    v, layers, size = config.num_virtual_tokens, config.num_layers, config.token_dim // heads
    states = module(_indices(module, config)).view(v, layers, 2, heads, size).permute(1, 2, 3, 0, 4)
    return [(layer[0][None], layer[1][None]) for layer in states]


def flattened(module: nn.Module, config: SoftConfig) -> Tensor:
    """What a peft folder holds: (v, hidden), or (v, layers * 2 * kv_heads * head_dim) with any projection computed away."""
    with torch.no_grad():
        return module(_indices(module, config)).detach()


def _indices(module: nn.Module, config: SoftConfig) -> Tensor:
    return torch.arange(config.num_virtual_tokens, device=module.embedding.weight.device)
