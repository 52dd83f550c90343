"""Prefix tuning (arXiv 2101.00190): learned keys and values in every layer."""

import copy

import torch
from peft import PrefixEncoder, PrefixTuningConfig
from transformers import PretrainedConfig

from lowalign.config.sections import AdapterConfig
from lowalign.errors import UserError
from lowalign.model.adapters.soft import SoftPromptAdapter, text_ids
from lowalign.model.attention.soft_prompt import SoftPrompt
from lowalign.model.base.base import Base
from lowalign.model.forward.unpacked import keys_values


class PrefixTuning(SoftPromptAdapter):
    """Keys and values of v positions in every layer, through an MLP while training if prefix_projection is on."""

    option, title, config_class, peft_type = "prefix", "prefix", PrefixTuningConfig, "PREFIX_TUNING"

    def __init__(self, base: Base, name: str, config: PrefixTuningConfig) -> None:
        text = base.model.config.get_text_config()
        if not _layers_have_one_shape(text):
            raise UserError(f'adapter "{name}": prefix tuning needs layers of one shape, which {text.model_type} does not have; use lora or prompt')  # fmt: skip
        super().__init__(base, name, config)

    @staticmethod
    def peft_config(options: AdapterConfig) -> PrefixTuningConfig:
        return PrefixTuningConfig(
            num_virtual_tokens=options.virtual_tokens,
            prefix_projection=options.projection,
            encoder_hidden_size=options.projection_size,
            task_type="CAUSAL_LM",
        )

    @staticmethod
    def prepare_loaded(config: PrefixTuningConfig) -> None:
        """The file holds the prefix itself."""
        config.prefix_projection = False

    def _make_encoder(self) -> PrefixEncoder:
        return PrefixEncoder(self.config)

    def file_config(self) -> PrefixTuningConfig:
        """A plain prefix: the projection is applied in what is stored, so stock peft can load and train it."""
        config = copy.deepcopy(self.config)
        config.prefix_projection = False
        return config

    def soft_prompt(self) -> SoftPrompt:
        """Keys and values of each layer, (1, kv_heads, v, head_dim) each."""
        heads = self.config.num_attention_heads  # peft's name for the number of key-value heads here
        v, layers, size = self.config.num_virtual_tokens, self.config.num_layers, self.config.token_dim // heads
        states = self.states().view(v, layers, 2, heads, size).permute(1, 2, 3, 0, 4)
        return SoftPrompt(keys_values=[(layer[0][None], layer[1][None]) for layer in states])

    @torch.no_grad()
    def init_from_text(self, text: str) -> None:
        """Start at the keys and values of a text under the active adapters, repeated or cut to v tokens.

        The prefix then acts as that text in front of the prompt would (arXiv 2101.00190, section 7.4). Raises UserError
        when the prefix has a projection, or the text is empty.
        """
        if self.config.prefix_projection:
            raise UserError(
                f'adapter "{self.name}": only a prefix without a projection can start from the keys and values of a text'
            )
        ids = text_ids(self.name, text, self.config.num_virtual_tokens, self.base.tokenizer)
        layers = torch.stack([torch.stack([key[0], value[0]]) for key, value in keys_values(self.base.model, ids)])
        # (layers, 2, kv_heads, v, head_dim) -> (v, layers * 2 * kv_heads * head_dim)
        self.encoder.embedding.weight.copy_(layers.permute(3, 0, 1, 2, 4).flatten(1))


def _layers_have_one_shape(text: PretrainedConfig) -> bool:
    """Whether all layers have keys of one shape (those of gemma4 do not)."""
    layers = getattr(text, "per_layer_config", None)
    if layers is None:
        return True
    shape = lambda c: (getattr(c, "num_key_value_heads", None), getattr(c, "head_dim", None))  # noqa: E731
    return len({shape(layers[i]) for i in range(text.num_hidden_layers)}) == 1
