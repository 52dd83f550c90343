"""--base.embedding cpu: the same numbers with the embedding in CPU memory; tied heads are refused."""

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig

from lowalign import Base, Example, Host
from lowalign.errors import UserError
from tests.tiny import tiny_folder

OPTIONS = {"quantization": "none", "dtype": "float32", "device": "cpu", "quiet": True}


@pytest.mark.parametrize("adapter", [LoraConfig, PromptTuningConfig])
def test_the_same_numbers(tmp_path, adapter, monkeypatch):
    """Ids of another device come to the embedding, and its rows go to that of the model: here both are the CPU."""
    folder, moved = tiny_folder(tmp_path / "model", "llama"), []
    examples = [Example([1, 5, 6], [[7, 8], [9]]), Example([], [[10, 11, 12]])]
    options = {"target_modules": ["q_proj", "embed_tokens"]} if adapter is LoraConfig else {"num_virtual_tokens": 3}
    found = []
    for embedding in ("device", "cpu"):
        host = Host(Base.load(folder, embedding=embedding, **OPTIONS))
        table = host.base.model.get_input_embeddings()
        table.register_forward_hook(lambda *_, kind=embedding: moved.append(kind))
        torch.manual_seed(0)
        host.add("policy", adapter(task_type="CAUSAL_LM", **options))
        with host.use("policy"):
            logps = host.logprobs(examples)
        found.append(torch.cat([part for row in logps for part in row]))
    assert torch.equal(*found) and set(moved) == {"device", "cpu"}


def test_a_tied_head_is_refused(tmp_path):
    with pytest.raises(UserError, match="the LM head of this model has the weights of the embedding"):
        Base.load(tiny_folder(tmp_path / "model", "qwen3"), embedding="cpu", **OPTIONS)
