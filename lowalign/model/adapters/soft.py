"""What prompt tuning and prefix tuning share: a peft encoder beside the model makes v virtual tokens."""

import copy

import torch
from peft import PeftConfig
from peft.utils.other import _prepare_prompt_learning_config
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lowalign.errors import UserError
from lowalign.model.adapters.adapter import SCALAR_HEAD, Adapter
from lowalign.model.base.base import Base

_FILE_NAMES = {"embedding.weight": "prompt_embeddings", SCALAR_HEAD: f"base_model.{SCALAR_HEAD}"}


class SoftPromptAdapter(Adapter):
    """Virtual tokens in fp32. Subclasses build the encoder."""

    soft = True

    def __init__(self, base: Base, name: str, config: PeftConfig) -> None:
        if not config.num_virtual_tokens or config.num_virtual_tokens < 1:
            raise UserError(f'adapter "{name}": num_virtual_tokens must be at least 1')
        config = _prepare_prompt_learning_config(copy.deepcopy(config), base.model.config.get_text_config())
        config.num_transformer_submodules = 1
        config.inference_mode = False
        super().__init__(base, name, config)
        self.encoder = self._make_encoder().float().to(base.device)

    def _make_encoder(self) -> nn.Module:
        """The peft encoder for self.config."""
        raise NotImplementedError

    def states(self) -> Tensor:
        """What peft stores: (v, hidden), or (v, layers * 2 * kv_heads * head_dim) with any projection applied."""
        return self.encoder(torch.arange(self.config.num_virtual_tokens, device=self.encoder.embedding.weight.device))

    def own_weights(self) -> dict[str, nn.Parameter]:
        """The encoder's."""
        return dict(self.encoder.named_parameters())

    def file_name(self, key: str) -> str:
        """As peft writes it."""
        return _FILE_NAMES.get(key, key)

    @torch.no_grad()
    def file_tensors(self) -> dict[str, Tensor]:
        """The virtual tokens, without the projection that made them, and the scalar head."""
        head = {self.file_name(key): tensor for key, tensor in self.weights().items() if key == SCALAR_HEAD}
        return {"prompt_embeddings": self.states().detach()} | head


def text_ids(name: str, text: str, v: int, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The v tokens that soft prompt `name` starts from: the text's, repeated or cut. Raises UserError for an empty text."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise UserError(f'adapter "{name}": the text to start from is empty')
    return (ids * (v // len(ids) + 1))[:v]
