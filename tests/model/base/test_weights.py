"""A base whose files lack weights, or have others, is refused by name; what is complete in another form loads."""

import re
import shutil

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from lowalign import Base
from lowalign.errors import UserError
from tests.tiny import _SHAPE, tiny_folder, tiny_model, tiny_tokenizer

FILE = "model.safetensors"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base of each architecture, as stock save_pretrained writes it."""
    return {k: tiny_folder(tmp_path_factory.mktemp(k), k) for k in ("llama", "qwen3", "qwen3_moe", "gpt2")}


def load(folder, quantization="none") -> Base:
    return Base.load(folder, quantization=quantization, dtype="float32", device="cpu", quiet=True)


def edited(source, folder, edit):
    """A copy whose weights (a dict by name) went through `edit`."""
    shutil.copytree(source, folder)
    weights = load_file(folder / FILE)
    edit(weights)
    save_file(weights, folder / FILE, {"format": "pt"})
    return folder


def refused(folder, *says: str, quantization="none") -> None:
    with pytest.raises(UserError) as error:
        load(folder, quantization)
    for text in (*says, str(folder), "download it again"):
        assert text.lower() in str(error.value).lower()


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize(
    "name",
    ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight", "model.layers.1.self_attn.q_proj.weight"],
)
def test_missing_weights_train_on_noise(folders, tmp_path, name, quantization):
    refused(edited(folders["llama"], tmp_path / "m", lambda w: w.pop(name)), "lacks", name, quantization=quantization)


def test_unexpected_weights(folders, tmp_path):
    folder = edited(folders["llama"], tmp_path / "m", lambda w: w.update({"model.extra.weight": torch.ones(3)}))
    refused(folder, "no place for: model.extra.weight")
    # of a longer model than config.json says
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"num_hidden_layers": 2', '"num_hidden_layers": 1'))
    refused(folder, "no place for: model.extra.weight, model.layers.1.", "and 7 more")


def test_weights_of_another_shape(folders, tmp_path):
    folder = edited(folders["llama"], tmp_path / "m", lambda w: w.update({"model.norm.weight": torch.ones(3)}))
    refused(folder, "another shape: model.norm.weight (3, expected 64)")


def test_tied_heads_are_complete(folders, tmp_path):
    def with_head(weights):
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()

    tied = load(folders["qwen3"])
    for n, edit in enumerate((lambda w: None, with_head)):
        base = load(edited(folders["qwen3"], tmp_path / str(n), edit))
        assert base.model.lm_head.weight is base.model.model.embed_tokens.weight
        assert base.checksum() == tied.checksum()
    lost = edited(folders["qwen3"], tmp_path / "lost", lambda w: w.pop("model.embed_tokens.weight"))
    refused(lost, "lacks", "model.embed_tokens.weight")


def test_buffers_of_old_checkpoints_are_no_weights(folders, tmp_path):
    old = {
        "llama": {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(2)},
        "gpt2": {f"transformer.h.{i}.attn.{n}": torch.ones(4, 4) for i in range(2) for n in ("bias", "masked_bias")},
    }
    for kind, buffers in old.items():
        base = load(edited(folders[kind], tmp_path / kind, lambda w, b=buffers: w.update(b)))
        assert base.checksum() == load(folders[kind]).checksum()


def test_gpt2_without_the_prefix_of_its_names(folders, tmp_path):
    """As on the Hub: wte.weight, not transformer.wte.weight."""

    def strip(weights):
        for name in list(weights):
            weights[name.removeprefix("transformer.")] = weights.pop(name)

    assert load(edited(folders["gpt2"], tmp_path / "m", strip)).checksum() == load(folders["gpt2"]).checksum()


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_experts_are_fused_on_loading(folders, tmp_path, quantization):
    """transformers stores them one by one and computes with one tensor: names in the file are not the model's."""
    names = [n for n in load_file(folders["qwen3_moe"] / FILE) if "experts.1.up_proj" in n]
    assert len(names) == 2 and load(folders["qwen3_moe"], quantization).packed
    one = edited(folders["qwen3_moe"], tmp_path / "one", lambda w: w.pop(names[0]))
    refused(one, "model.layers.0.mlp.experts.gate_up_proj", quantization=quantization)
    every = edited(folders["qwen3_moe"], tmp_path / "all", lambda w: [w.pop(n) for n in list(w) if "experts" in n])
    refused(every, "lacks model.layers.0.mlp.experts.down_proj", quantization=quantization)


def test_shards(tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    tiny_tokenizer().save_pretrained(tmp_path)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    loaded = load(tmp_path).model.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())
    content = shards[1].read_bytes()
    shards[1].write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12345\n")
    refused(tmp_path, f"{shards[1]} is a Git LFS pointer, not the weights")
    shards[1].write_bytes(content[: len(content) // 2])
    refused(tmp_path, f"{shards[1]} is damaged")
    shards[1].unlink()
    refused(tmp_path, shards[1].name)


def test_a_4_bit_checkpoint(folders, tmp_path):
    quantization = hf.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, llm_int8_skip_modules=["lm_head"]
    )
    model = hf.AutoModelForCausalLM.from_pretrained(folders["llama"], quantization_config=quantization)
    model.save_pretrained(tmp_path / "whole")
    tiny_tokenizer().save_pretrained(tmp_path / "whole")
    assert load(tmp_path / "whole", "nf4").unquantized < 1
    layer = "model.layers.0.self_attn.q_proj.weight"
    for n, name in enumerate((layer, f"{layer}.absmax", f"{layer}.quant_map", "model.norm.weight")):
        refused(
            edited(tmp_path / "whole", tmp_path / str(n), lambda w, name=name: w.pop(name)),
            re.sub(r"weight\..*", "weight", name),
            quantization="nf4",
        )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.0.input_layernorm.weight"])
def test_weights_that_are_not_finite(folders, tmp_path, name, value):
    folder = edited(folders["llama"], tmp_path / "m", lambda w: w[name].view(-1)[3:4].fill_(value))
    refused(folder, f"{folder / FILE} has NaN or infinity in {name}", quantization="nf4")


def test_the_language_model_of_a_multimodal_checkpoint(tmp_path):
    """Llama 4's vision tower and projector are left out; any other weight without a place is not."""
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14, "vision_output_dim": 32, "projector_input_dim": 32}
    text = _SHAPE | {"num_local_experts": 2, "intermediate_size_mlp": 64, "head_dim": 16}
    config = hf.Llama4Config(vision_config=vision | {"projector_output_dim": 32}, text_config=text)
    hf.Llama4ForConditionalGeneration(config).save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    assert type(load(tmp_path / "m").model).__name__ == "Llama4ForCausalLM"
    folder = edited(tmp_path / "m", tmp_path / "other", lambda w: w.update({"language_model.extra": torch.ones(3)}))
    refused(folder, "no place for", "extra")
