"""Prompt tuning (arXiv 2104.08691): learned embeddings before the prompt."""

import torch
from peft import PromptEmbedding, PromptTuningConfig
from torch import Tensor, nn

from lowalign.config.sections import AdapterConfig
from lowalign.model.adapters.soft import SoftPromptAdapter, text_ids
from lowalign.model.attention.soft_prompt import SoftPrompt


class PromptTuning(SoftPromptAdapter):
    """v embeddings; they start as those of a text, of random vocabulary entries, or as peft draws them."""

    option, title, config_class, peft_type = "prompt", "soft prompt", PromptTuningConfig, "PROMPT_TUNING"

    @staticmethod
    def peft_config(options: AdapterConfig) -> PromptTuningConfig:
        init = {"prompt_tuning_init": "SAMPLE_VOCAB"}
        if options.init_text:
            # peft requires a tokenizer's name beside the text; the base's own tokenizer is used.
            init = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": options.init_text}
            init["tokenizer_name_or_path"] = "base"
        return PromptTuningConfig(num_virtual_tokens=options.virtual_tokens, task_type="CAUSAL_LM", **init)

    @staticmethod
    def prepare_loaded(config: PromptTuningConfig) -> None:
        """The file holds the embeddings; no text is needed."""
        config.prompt_tuning_init = "RANDOM"

    def _make_encoder(self) -> PromptEmbedding:
        embeddings = self.base.model.get_input_embeddings()
        init = self.config.prompt_tuning_init
        self.config.prompt_tuning_init = "RANDOM"  # for TEXT peft would load a tokenizer from a path
        encoder = PromptEmbedding(self.config, embeddings)
        self.config.prompt_tuning_init = init
        start = self._start(embeddings)
        if start is not None:
            encoder.embedding.weight = nn.Parameter(start)
        return encoder

    def _start(self, embeddings: nn.Module) -> Tensor | None:
        """(v, hidden) initial embeddings; None: keep peft's."""
        init = getattr(self.config.prompt_tuning_init, "value", self.config.prompt_tuning_init)
        v, tokenizer = self.config.num_virtual_tokens, self.base.tokenizer
        if init == "TEXT":
            ids = torch.tensor(text_ids(self.name, self.config.prompt_tuning_init_text or "", v, tokenizer))
        elif init == "SAMPLE_VOCAB":
            ids = torch.randint(0, len(tokenizer), (v,))
        else:
            return None
        return embeddings(ids.to(embeddings.weight.device)).detach().float()

    def soft_prompt(self) -> SoftPrompt:
        """Embeddings (v, hidden)."""
        return SoftPrompt(self.states())
