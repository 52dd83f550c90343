"""`merge` from an adapter folder to a model that plain transformers loads; whatever is wrong leaves nothing behind."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, BitsAndBytesConfig

from lowalign import Base, Example, Host
from lowalign.errors import UserError
from lowalign.export import agreement, lora_update
from lowalign.export.merge import merge
from tests.tiny import tiny_folder, tiny_model

TEMPLATE = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base in bf16, and adapters on it as runs leave them: `first`, and `second` trained on top of it."""
    folder = tmp_path_factory.mktemp("made")
    tiny_folder(folder / "base", "llama")
    tiny_model("llama").bfloat16().save_pretrained(folder / "base")
    host = Host(Base.load(folder / "base", device="cpu", quiet=True))
    torch.manual_seed(0)
    files = {"chat_template.jinja": TEMPLATE}
    for name in ("first", "second"):
        host.add(name, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
        for key, tensor in host.weights(name).items():
            if "lora_B" in key:
                tensor.data.normal_(0, 0.05)
    host.save("first", folder / "first", files=files, method="sft", step=3)
    host.save("second", folder / "second", parents=["first"], files=files, method="dpo", step=5)
    host.add("prefix", PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    host.save("prefix", folder / "prefix", files=files)
    host.add("prompt", PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    host.save("prompt", folder / "prompt", files=files)
    return folder


def test_a_stack_becomes_a_model_that_plain_transformers_loads(made, tmp_path):
    report = merge([str(made / "second")], tmp_path / "out", model=str(made / "base"))
    assert (report["onto"], report["verified"]) == ("dequantized", True)
    assert report["kl"] < 0.01 and report["top1"] > 0.8  # seen: 7e-4, 0.95 (random weights; trained ones: 5e-5)
    assert [a.get("method") for a in report["adapters"]] == [None, "dpo"]  # the first lies inside the second
    assert json.loads((tmp_path / "out" / "lowalign.json").read_text()) == {"merge": report}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and config["lowalign"] == {"merged_onto": "dequantized"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "[user]hi</s>"
    assert model.generation_config.eos_token_id == 2
    assert 'PARAMETER stop "</s>"' in (tmp_path / "out" / "Modelfile").read_text()
    host = Host(Base.load(made / "base", dtype="float32", device="cpu", quiet=True))
    host.load("first", made / "first")
    host.load("second", made / "second")
    ids = torch.randint(5, 300, (1, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), host.use("first", "second"):
        expected = host.base.model(ids).logits.log_softmax(-1).double()
        found = model.float()(ids).logits.log_softmax(-1).double()
    kl = (expected.exp() * (expected - found)).sum(-1).mean().item()
    assert kl < 0.01  # the same measure, by other code, in fp32; seen: 1.6e-4. One adapter left out: above 0.1


def test_onto_the_original_weights_is_further_away(made, tmp_path):
    trained = merge([str(made / "first")], tmp_path / "a", model=str(made / "base"))
    original = merge([str(made / "first")], tmp_path / "b", model=str(made / "base"), onto="original")
    assert original["onto"] == "original" and original["kl"] > 5 * trained["kl"]


def test_without_the_check_it_is_said(made, tmp_path):
    report = merge([str(made / "first")], tmp_path / "out", model=str(made / "base"), verify=False)
    assert (report["verified"], report["kl"], report["top1"]) == (False, None, None)


def test_another_model_is_not_kept(made, tmp_path, monkeypatch):
    scale = lora_update.LoraUpdate._scale
    monkeypatch.setattr(lora_update.LoraUpdate, "_scale", lambda self, module: 4 * scale(self, module))
    with pytest.raises(UserError, match="the merged model is not the trained one: KL"):
        merge([str(made / "first")], tmp_path / "out", model=str(made / "base"))
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_leaves_nothing(made, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lowalign.export.weight_files.write_tensors", full)
    with pytest.raises(UserError, match=r"could not be written to .*No space left on device.*nothing of it is left"):
        merge([str(made / "first")], tmp_path / "out", model=str(made / "base"), verify=False)
    assert not list(tmp_path.iterdir())


def moved_base(folder, made):
    shutil.copytree(made / "first", folder / "first")
    file = folder / "first" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(folder / "gone")}))
    return {"adapters": [str(folder / "first")], "model": None}


def other_base(folder, made):
    tiny_folder(folder / "other", "llama", seed=5)
    return {"model": str(folder / "other")}


def wider_base(folder, made):
    tiny_folder(folder / "other", "llama", intermediate_size=192)
    return {"model": str(folder / "other"), "allow_base_mismatch": True}


def one_rank_cut(folder, made):
    shutil.copytree(made / "first", folder / "cut")
    file = folder / "cut" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return {"adapters": [str(folder / "cut")]}


def no_rows(folder, made):
    (folder / "rows.jsonl").write_text('{"question": "?"}\n')
    return {"data": (str(folder / "rows.jsonl"),), "verify": True}


def quantized_base(folder, made):
    merge([str(made / "first")], folder / "nf4", model=str(made / "base"), verify=False, quantize="nf4")
    return {"model": str(folder / "nf4"), "onto": "original", "allow_base_mismatch": True}


def missing_shard(folder, made):
    shutil.copytree(made / "base", folder / "cut")
    tiny_model("llama").bfloat16().save_pretrained(folder / "cut", max_shard_size="100KB")
    (folder / "cut" / "model.safetensors").unlink()
    sorted((folder / "cut").glob("model-*"))[1].unlink()
    return {"model": str(folder / "cut"), "allow_base_mismatch": True}


def cut_off(folder, made):
    shutil.copytree(made / "base", folder / "cut")
    file = folder / "cut" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return {"model": str(folder / "cut"), "allow_base_mismatch": True}


def half_an_adapter(folder, made):
    shutil.copytree(made / "first", folder / "half")
    file = folder / "half" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors.pop(next(name for name in tensors if "lora_B" in name))
    save_file(tensors, file)
    (folder / "half" / "lowalign.json").unlink()
    return {"adapters": [str(folder / "half")]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f, m: {"adapters": [str(m / "prefix")]}, "is a prefix: .* cannot be merged. Ship the adapter folder"),
        (lambda f, m: {"adapters": [str(m / "first"), str(m / "prefix")]}, "is a prefix: .* cannot be merged"),
        (lambda f, m: {"adapters": [str(f / "none")]}, "none is not a folder"),
        (moved_base, "does not say where its base is .*give it with --model M"),
        (lambda f, m: {"out": f}, "exists and is not overwritten; name another folder with --out"),
        (lambda f, m: {"max_shard_size": "many"}, "--max-shard-size many: write a size such as 5GB"),
        (other_base, "was trained on another base"),
        (missing_shard, "is missing: the model in .* is not complete"),
        (cut_off, "is cut off: .* ends after the file; download it again"),
        (
            wider_base,
            "was trained on another base: its model.layers.0.mlp.* is .* and .* here; give the right one with --model M",
        ),
        (one_rank_cut, "cut/adapter_model.safetensors is damaged or incomplete "),
        (no_rows, r'rows.jsonl:1: expected "prompt"'),
        (lambda f, m: {"data": (str(f / "none.jsonl"),), "verify": True}, "none.jsonl"),
        (quantized_base, "is stored in 4 bit and has no original weights; merge with --onto dequantized"),
        (lambda f, m: {"out": m / "first" / "lowalign.json" / "x"}, "could not be written to .*Not a directory"),
        (half_an_adapter, r"half is not whole: .*lora_A\.weight without .*lora_B\.weight"),
    ],
)
def test_held_wrong(change, message, made, tmp_path):
    options = {"adapters": [str(made / "first")], "out": tmp_path / "out", "model": str(made / "base"), "verify": False}
    options |= change(tmp_path, made)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=message):
        merge(options.pop("adapters"), options.pop("out"), **options)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_a_reward_run_becomes_a_sequence_classifier(kind, tmp_path):
    """In fp32, on a base that was never quantized: stock transformers gives the host's scores, alone and padded."""
    tiny_folder(tmp_path / "base", kind)
    host = Host(Base.load(tmp_path / "base", quantization="none", dtype="float32", device="cpu", quiet=True))
    torch.manual_seed(0)
    host.add("reward", LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"))
    host.add_scalar_head("reward")
    host.save("reward", tmp_path / "reward", files={"chat_template.jinja": TEMPLATE}, method="reward")
    report = merge([str(tmp_path / "reward")], tmp_path / "out", model=str(tmp_path / "base"), dtype="float32")
    assert report["onto"] == "original" and report["verified"]
    assert report["error"] < 1e-4 < report["spread"] and report["kl"] is None
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert model.config.num_labels == 1 and model.config.pad_token_id not in (None, 2)
    examples = [Example(list(range(9, 20)), [[30, 31, 2]]), Example([7, 8], [[40, 41, 42, 43, 2]])]
    with torch.no_grad(), host.use("reward"):
        expected = torch.cat(host.scores(examples, "reward"))
    rows = [torch.tensor(e.prompt + e.completions[0]) for e in examples]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=model.config.pad_token_id)
    mask = torch.tensor([[1] * len(row) + [0] * (padded.shape[1] - len(row)) for row in rows])
    with torch.no_grad():
        found = model(padded, attention_mask=mask).logits[:, 0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)  # seen: 4e-7


def test_a_reward_run_with_other_scores_is_not_kept(tmp_path, monkeypatch):
    tiny_folder(tmp_path / "base", "llama")
    host = Host(Base.load(tmp_path / "base", device="cpu", quiet=True))
    host.add("reward", LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    host.add_scalar_head("reward")
    host.scalar_head("reward").data.normal_(0, 1)
    host.save("reward", tmp_path / "reward", files={"chat_template.jinja": TEMPLATE})
    apply = lora_update.LoraUpdate.apply
    broken = lambda self, name, *rest: apply(self, name, *rest) * (-1 if name == "score.weight" else 1)  # noqa: E731
    monkeypatch.setattr(lora_update.LoraUpdate, "apply", broken)
    with pytest.raises(UserError, match="does not give the trained one's scores"):
        merge([str(tmp_path / "reward")], tmp_path / "out", model=str(tmp_path / "base"))
    assert not (tmp_path / "out").exists()


def test_nf4_out_is_a_checkpoint_that_stock_transformers_loads(made, tmp_path):
    """Its weights are the merged ones after bitsandbytes' own quantization, bit for bit; the KL says what that costs."""
    options = {"model": str(made / "base"), "onto": "original"}
    plain = merge([str(made / "first")], tmp_path / "plain", **options)
    report = merge([str(made / "first")], tmp_path / "nf4", **options, quantize="nf4", max_shard_size="30KB")
    assert report["quantize"] == "nf4" and report["verified"] and report["kl"] > plain["kl"]
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=nf4)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "nf4")
    assert found.is_loaded_in_4bit and found.config.quantization_config.bnb_4bit_use_double_quant
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name].float(), tensor.float()), name
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        assert torch.equal(found(ids).logits, expected(ids).logits)
    host = Host(Base.load(tmp_path / "nf4", device="cpu", quiet=True))
    assert host.base.identity.quantization == "nf4"


def test_the_comparison_takes_prompts_of_a_file(made, tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text(
        '{"prompt": "The quick"}\n{"messages": [{"role": "user", "content": "a fox"}]}\n'
    )
    prompts = []
    run = agreement.sampled_examples
    monkeypatch.setattr(agreement, "sampled_examples", lambda h, s, rows: prompts.extend(rows) or run(h, s, rows))
    merge([str(made / "first")], tmp_path / "out", model=str(made / "base"), data=(str(tmp_path / "rows.jsonl"),))
    tokenizer = AutoTokenizer.from_pretrained(made / "base")
    assert [tokenizer.decode(ids) for ids in prompts] == [
        "The quick",  # a string is plain text
        "[user]a fox</s>[assistant]",
    ]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_base_that_was_quantized_from_another_dtype(dtype, tmp_path):
    """The base is stored in fp32. NF4 of its fp32 and of its bf16 weights differ; the run's recipe says which it was."""
    tiny_folder(tmp_path / "base", "llama")
    host = Host(Base.load(tmp_path / "base", dtype=dtype, device="cpu", quiet=True))
    host.add("lora", LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"))
    recipe = f"verb: sft\nbase:\n  dtype: {dtype}\n"
    host.save("lora", tmp_path / "lora", files={"chat_template.jinja": TEMPLATE}, recipe=recipe)
    report = merge([str(tmp_path / "lora")], tmp_path / "out", model=str(tmp_path / "base"), dtype="float32")
    assert report["kl"] < (1e-5 if dtype == "float32" else 1e-3)  # seen: 1e-9, 2e-6. From bf16 weights: 1e-2
