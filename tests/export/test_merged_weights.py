"""Merged weights against peft's own merge in fp32, bit for bit, on every architecture and kind of LoRA."""

import shutil

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from lowalign import Base, Example, Host
from lowalign.errors import UserError
from lowalign.export import lora_update
from lowalign.export.lora_update import LoraUpdate
from lowalign.export.merged_weights import plan_merge
from lowalign.export.weight_files import write_shards
from lowalign.model.adapters import files as adapter_files
from tests.tiny import tiny_folder, tiny_model

KINDS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"q_proj": 2, "qkv_proj": 2}, "alpha_pattern": {"layers.1.self_attn.o_proj": 3}},
}
ARCHITECTURES = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "phi3")


def trained_lora(model, folder, **options):
    """A stock peft LoRA with every weight random, saved; the PeftModel."""
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | options
    config = LoraConfig(task_type="CAUSAL_LM", **options)
    peft = get_peft_model(model, config)
    torch.manual_seed(7)
    for key, p in peft.named_parameters():
        if "lora_" in key:
            p.data.normal_(0, 0.3) if p.ndim > 1 else p.data.mul_(1 + 0.3 * torch.rand_like(p))
    peft.save_pretrained(folder)
    return peft


def merged_tensors(base, folders, tmp_path, dequantized=False, dtype=torch.bfloat16, max_bytes=2**40):
    updates = [LoraUpdate(folder, adapter_files.read(folder)[0]) for folder in folders]
    plan = plan_merge(base, AutoConfig.from_pretrained(base), updates, dequantized, dtype)
    out = tmp_path / "merged"
    out.mkdir()
    write_shards(out, plan.tensors, max_bytes, lambda _: None)
    return {k: t for file in sorted(out.glob("*.safetensors")) for k, t in load_file(file).items()}


def stored_in_bf16(tmp_path, kind):
    folder = tiny_folder(tmp_path / "base", kind)
    tiny_model(kind).bfloat16().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_equal_to_pefts_merge_in_fp32(kind, options, tmp_path):
    base = stored_in_bf16(tmp_path, kind)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    peft = trained_lora(model, tmp_path / "adapter", **options)
    found = merged_tensors(base, [tmp_path / "adapter"], tmp_path)
    expected = peft.merge_and_unload().bfloat16().state_dict()
    if model.config.tie_word_embeddings:
        expected.pop("lm_head.weight")  # tied: not stored
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


def test_a_stack_of_two(tmp_path):
    base = stored_in_bf16(tmp_path, "llama")
    folders = [tmp_path / "first", tmp_path / "second"]
    for i, folder in enumerate(folders):
        trained_lora(tiny_model(), folder, r=4 + 2 * i)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    peft = PeftModel.from_pretrained(model, folders[0], adapter_name="first")
    peft.load_adapter(folders[1], "second")
    found = merged_tensors(base, folders, tmp_path)
    expected = peft.merge_and_unload(adapter_names=["first", "second"]).bfloat16().state_dict()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


def test_dora_on_a_lora_is_what_the_host_computed(tmp_path):
    """peft's layers scale all that acts, by a norm of the base's weight and the DoRA's own update; its merge, one by one,
    gives another model."""
    base = tiny_folder(tmp_path / "base", "llama")
    folders = [tmp_path / "lora", tmp_path / "dora"]
    for folder, dora in zip(folders, (False, True), strict=True):
        trained_lora(tiny_model(), folder, use_dora=dora)
    host = Host(Base.load(base, quantization="none", dtype="float32", device="cpu", quiet=True))
    for folder in folders:
        host.load(folder.name, folder)
    example = Example(list(range(5, 12)), [list(range(12, 30))])
    with host.use("lora", "dora"):
        (expected,) = host.logprobs([example])[0]
    found = merged_tensors(base, folders, tmp_path, dtype=torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    merged.load_state_dict(found)
    ids = torch.tensor([example.prompt + example.completions[0]])
    logps = merged(ids).logits.log_softmax(-1)[0, 6:-1].gather(1, ids[0, 7:, None])[:, 0]
    # Seen: 4e-6 in fp32. The other order of norms is off by 0.5.
    torch.testing.assert_close(logps, expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ],
    ids=["lora on the embedding", "head saved", "embedding saved"],
)
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_embeddings_and_saved_modules_tied_or_not(kind, options, tmp_path):
    """The merged model computes what the unmerged one does: a head that was tied to an embedding is a weight of its own."""
    base = tiny_folder(tmp_path / "base", kind)
    peft = get_peft_model(tiny_model(kind), LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False, **options))
    torch.manual_seed(3)
    for name, p in peft.named_parameters():
        if "modules_to_save" in name:
            p.data.add_(torch.randn_like(p) * 0.2)
    peft.save_pretrained(tmp_path / "adapter")
    ids = torch.randint(5, 300, (1, 20))
    expected = peft.eval()(ids).logits
    found = merged_tensors(base, [tmp_path / "adapter"], tmp_path, dtype=torch.float32)
    assert "lm_head.weight" in found
    merged = tiny_model(kind, tie_word_embeddings=False).eval()
    merged.load_state_dict(found)
    torch.testing.assert_close(merged(ids).logits, expected, atol=1e-3, rtol=0)  # seen: 6e-6; a tied head is off by 5


def test_attention_of_a_mixture_of_experts(tmp_path):
    base = stored_in_bf16(tmp_path, "qwen3_moe")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    peft = trained_lora(model, tmp_path / "adapter", target_modules=["q_proj", "o_proj"])
    found = merged_tensors(base, [tmp_path / "adapter"], tmp_path)
    peft.merge_and_unload().bfloat16().save_pretrained(tmp_path / "expected")
    expected = load_file(tmp_path / "expected" / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


def test_what_has_no_place_is_refused_by_name(tmp_path):
    base = stored_in_bf16(tmp_path, "llama")
    trained_lora(tiny_model(), tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    for part in ("lora_A", "lora_B"):
        tensors[f"base_model.model.model.layers.0.mlp.experts.0.up_proj.{part}.weight"] = torch.zeros(4, 4)
    save_file(tensors, file)
    with pytest.raises(UserError, match=r"first: model\.layers\.0\.mlp\.experts\.0\.up_proj\.lora_A\.weight"):
        merged_tensors(base, [tmp_path / "adapter"], tmp_path)


def test_dequantized_is_the_very_base_that_was_trained_on(tmp_path):
    """With an adapter that changes nothing: bit for bit what `Base.load` computes with."""
    base = stored_in_bf16(tmp_path, "llama")
    peft = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    peft.save_pretrained(tmp_path / "adapter")
    found = merged_tensors(base, [tmp_path / "adapter"], tmp_path, dequantized=True)
    loaded = Base.load(base, device="cpu", quiet=True).model
    for name, p in loaded.named_parameters():
        expected = dequantize_4bit(p.data, p.quant_state) if hasattr(p, "quant_state") else p.data
        assert torch.equal(found[name], expected), name


def test_shards_and_their_index(tmp_path):
    base = stored_in_bf16(tmp_path, "llama")
    trained_lora(tiny_model(), tmp_path / "adapter")
    found = merged_tensors(base, [tmp_path / "adapter"], tmp_path, max_bytes=60_000)
    files = sorted((tmp_path / "merged").glob("*.safetensors"))
    assert len(files) > 3 and all(file.stat().st_size < 64_000 for file in files)
    (tmp_path / "merged" / "config.json").write_text((base / "config.json").read_text())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in found.items())


def test_large_matrices_in_stretches(tmp_path, monkeypatch):
    base = stored_in_bf16(tmp_path, "llama")
    trained_lora(tiny_model(), tmp_path / "adapter", use_dora=True)
    whole = merged_tensors(base, [tmp_path / "adapter"], tmp_path, dtype=torch.float32)
    shutil.rmtree(tmp_path / "merged")
    monkeypatch.setattr(lora_update, "WEIGHTS_AT_A_TIME", 1000)
    parts = merged_tensors(base, [tmp_path / "adapter"], tmp_path, dtype=torch.float32)
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, atol=1e-5, rtol=0)  # fp32 sums of four products of size 1
