"""`lowalign bitdelta compress`: signs and scales against the paper's formula in fp64, what is stored, what is refused."""

import json
import shutil
import weakref

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lowalign import Base, Example, Host, merge
from lowalign.errors import UserError
from lowalign.export import bitdelta
from lowalign.export.bitdelta import compress
from lowalign.export.weight_files import StoredTensor
from lowalign.model.adapters.signs import unpack_signs
from tests.bitdelta_models import base_and_fine_tune, dense, row_logps
from tests.tiny import tiny_folder, tiny_model, tiny_tokenizer

PROMPT, COMPLETION = [5, 6, 7, 8], list(range(9, 30))


def host_on(base, quantization="none", dtype="float32") -> Host:
    return Host(Base.load(base, quantization=quantization, dtype=dtype, device="cpu", quiet=True))


def logps(host, *names):
    with host.use(*names), torch.no_grad():
        return host.logprobs([Example(PROMPT, [COMPLETION])])[0][0]


def stored(folder):
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("per_row", [False, True], ids=["matrix", "rows"])
@pytest.mark.parametrize("onto", ["original", "dequantized"])
def test_signs_and_scales_are_the_papers(onto, per_row, tmp_path):
    """Against fp64 on the weights of the fine-tune and those that transformers and bitsandbytes hold of the base."""
    base, fine = base_and_fine_tune(tmp_path)
    report = compress(str(base), str(fine), tmp_path / "delta", onto=onto, per_row=per_row)
    tensors, other = stored(tmp_path / "delta"), AutoModelForCausalLM.from_pretrained(fine).state_dict()
    options = {} if onto == "original" else {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, llm_int8_skip_modules=["lm_head"]
        )
    }  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, **options)
    matrices = [n for n in tensors if n.endswith(".signs")]
    assert len(matrices) == report["matrices"] == 14 and report["kept"] == 7
    for name in matrices:
        module = name.removesuffix(".signs")
        weight = model.get_submodule(module).weight
        state = getattr(weight, "quant_state", None)
        own = weight if state is None else dequantize_4bit(weight.data, state).bfloat16()
        change = other[f"{module}.weight"].double() - own.double()
        scale = tensors[f"{module}.log_scale"].double().exp()
        assert torch.equal(
            unpack_signs(tensors[name], change.shape[1], torch.float64), torch.where(change > 0, 1.0, -1.0)
        )
        wanted = change.abs().mean(1) if per_row else change.abs().mean()[None]
        torch.testing.assert_close(scale, wanted, rtol=1e-5, atol=0)  # a log in fp32
        # eq. 3: no other scale is closer
        error = lambda a: (change - a[:, None] * torch.where(change > 0, 1.0, -1.0)).square().sum()  # noqa: B023, E731
        assert error(scale) < min(error(scale * 1.01), error(scale * 0.99))


@pytest.mark.parametrize("per_row", [False, True], ids=["matrix", "rows"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "phi3", "gpt2"])
def test_hosted_merged_and_dense_are_one_model(kind, per_row, tmp_path):
    """In fp32, the dense model by fp64 formula in plain transformers; norms, biases and embeddings changed too."""
    base, fine = base_and_fine_tune(tmp_path, kind)
    if kind != "gpt2":
        wanted = row_logps(dense(base, fine, per_row), PROMPT, COMPLETION)
    report = compress(str(base), str(fine), tmp_path / "delta", onto="original", per_row=per_row)
    size = sum(t.nbytes for t in stored(tmp_path / "delta").values())
    assert report["bytes"] == size < report["bytes_16bit"]
    host = host_on(base)
    bare, checksum = logps(host), host.base.checksum()
    host.load("delta", tmp_path / "delta")
    found = logps(host, "delta")
    assert torch.equal(logps(host), bare) and host.base.checksum() == checksum
    assert (found - bare).abs().max() > 0.1
    merge([str(tmp_path / "delta")], tmp_path / "merged", model=str(base), dtype="float32", verify=False)
    merged = row_logps(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), PROMPT, COMPLETION)
    torch.testing.assert_close(found, merged, atol=2e-4, rtol=0)  # seen: 8e-6
    if kind != "gpt2":
        torch.testing.assert_close(found, wanted, atol=2e-4, rtol=0)


def test_merged_onto_the_base_that_it_was_made_for(tmp_path, capsys):
    base, fine = base_and_fine_tune(tmp_path)
    compress(str(base), str(fine), tmp_path / "delta")
    report = merge([str(tmp_path / "delta")], tmp_path / "merged", model=str(base))
    assert report["onto"] == "dequantized" and report["verified"] and report["kl"] < 0.01


def test_a_merged_model_is_a_fine_tune_too(tmp_path):
    """lowalign merge → compress: what did not change is not stored."""
    base = tiny_folder(tmp_path / "base", "llama")
    tiny_model().bfloat16().save_pretrained(base)
    host = host_on(base)
    torch.manual_seed(0)
    host.add("lora", LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    host.save("lora", tmp_path / "lora")
    merge([str(tmp_path / "lora")], tmp_path / "merged", model=str(base), onto="original", verify=False)
    compress(str(base), str(tmp_path / "merged"), tmp_path / "delta", onto="original")
    places = [f"model.layers.{i}.self_attn.q_proj{part}" for i in range(2) for part in (".log_scale", ".signs")]
    assert sorted(stored(tmp_path / "delta")) == places


# -- heads that are the embedding ---------------------------------------------------------------------------------------


def untied_fine_tune(tmp_path, name):
    """A tied base, and a fine-tune whose head is a weight of its own; `name` is what changed."""
    base = tiny_folder(tmp_path / "base", "qwen3")
    tied = tiny_model("qwen3").bfloat16()
    tied.save_pretrained(base)
    model = tiny_model("qwen3", tie_word_embeddings=False).bfloat16()
    model.load_state_dict(tied.state_dict())
    torch.manual_seed(1)
    with torch.no_grad():
        model.get_parameter(name).add_(0.3)
        model.get_parameter(name).mul_(torch.rand_like(model.get_parameter(name)))
    model.save_pretrained(tmp_path / "fine")
    tiny_tokenizer().save_pretrained(tmp_path / "fine")
    return base, tmp_path / "fine"


@pytest.mark.parametrize("name", ["lm_head.weight", "model.embed_tokens.weight"])
def test_one_side_of_a_tied_head_changed(name, tmp_path):
    base, fine = untied_fine_tune(tmp_path, name)
    compress(str(base), str(fine), tmp_path / "delta", onto="original")
    assert list(stored(tmp_path / "delta")) == [name]
    host = host_on(base)
    bare = logps(host)
    host.load("delta", tmp_path / "delta")
    wanted = row_logps(AutoModelForCausalLM.from_pretrained(fine, dtype=torch.float32), PROMPT, COMPLETION)
    torch.testing.assert_close(logps(host, "delta"), wanted, atol=2e-4, rtol=0)
    assert torch.equal(logps(host), bare)
    merge([str(tmp_path / "delta")], tmp_path / "merged", model=str(base), dtype="float32", verify=False)
    merged = row_logps(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), PROMPT, COMPLETION)
    torch.testing.assert_close(merged, wanted, atol=2e-4, rtol=0)


def test_a_fine_tune_that_tied_its_head(tmp_path):
    """The base's head is a weight of its own."""
    base = tiny_folder(tmp_path / "base", "qwen3", tie_word_embeddings=False)
    tiny_model("qwen3").bfloat16().save_pretrained(tmp_path / "fine")
    tiny_tokenizer().save_pretrained(tmp_path / "fine")
    compress(str(base), str(tmp_path / "fine"), tmp_path / "delta", onto="original")
    host = host_on(base)
    host.load("delta", tmp_path / "delta")
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path / "fine", dtype=torch.float32).lm_head.weight
    with host.use("delta"):
        assert torch.equal(host.base.model.lm_head.weight, wanted)
        assert torch.equal(host.base.model.get_input_embeddings().weight, wanted)


# -- memory and refusals ------------------------------------------------------------------------------------------------


def test_two_tensors_in_memory_at_a_time(tmp_path, monkeypatch):
    """Of those that are read from the two models, whatever the number of layers."""
    base, fine = base_and_fine_tune(tmp_path, num_hidden_layers=6)
    alive, most = weakref.WeakSet(), []
    read = StoredTensor.read

    class Counted(torch.Tensor):
        pass

    def counted(self):
        tensor = read(self).as_subclass(Counted)
        alive.add(tensor)
        most.append(len(alive))
        return tensor

    monkeypatch.setattr(StoredTensor, "read", counted)
    compress(str(base), str(fine), tmp_path / "delta", onto="original")
    assert len(most) > 200 and max(most) <= 2


def test_stock_peft_does_not_load_it(tmp_path):
    base, fine = base_and_fine_tune(tmp_path)
    compress(str(base), str(fine), tmp_path / "delta", onto="original")
    with pytest.raises(KeyError, match="BITDELTA"):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "delta")


def test_paths_of_this_machine_are_not_in_it(tmp_path):
    base, fine = base_and_fine_tune(tmp_path)
    compress(str(base), str(fine), tmp_path / "delta")
    files = {p.name: p.read_text() for p in (tmp_path / "delta").glob("*.json")}
    config = json.loads(files.pop("adapter_config.json"))
    assert config.pop("base_model_name_or_path") == str(base.resolve())  # where peft and merge look for it
    assert str(tmp_path) not in "".join([*files.values(), json.dumps(config)])
    assert json.loads((tmp_path / "delta" / "lowalign.json").read_text())["base"]["quantization"] == "nf4"


def other_architecture(t):
    shutil.rmtree(t / "fine")
    tiny_folder(t / "fine", "qwen2")


def wider(t):
    shutil.rmtree(t / "fine")
    tiny_folder(t / "fine", "llama", intermediate_size=192)


def deeper(t):
    shutil.rmtree(t / "fine")
    tiny_folder(t / "fine", "llama", num_hidden_layers=3)


def same(t):
    shutil.copy(t / "base" / "model.safetensors", t / "fine" / "model.safetensors")


def missing_shard(t):
    AutoModelForCausalLM.from_pretrained(t / "fine").save_pretrained(t / "fine", max_shard_size="100KB")
    (t / "fine" / "model.safetensors").unlink(missing_ok=True)
    next((t / "fine").glob("model-00002-of-*.safetensors")).unlink()


def cut_off(t):
    file = t / "fine" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def pickled(t):
    (t / "fine" / "model.safetensors").unlink()
    (t / "fine" / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def adapter(t):
    shutil.rmtree(t / "fine")
    host = host_on(t / "base")
    host.add("lora", LoraConfig(r=4, target_modules=["q_proj"]))
    host.save("lora", t / "fine" / "adapter")


def exists(t):
    (t / "delta").mkdir()


def no_model(t):
    (t / "fine" / "config.json").unlink()


def own_code(t):
    config = json.loads((t / "fine" / "config.json").read_text())
    (t / "fine" / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "x.py"}}))


def not_finite(t):
    tensors = load_file(t / "fine" / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, t / "fine" / "model.safetensors", {"format": "pt"})


def four_bit_fine_tune(t):
    config = json.loads((t / "fine" / "config.json").read_text())
    scheme = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (t / "fine" / "config.json").write_text(json.dumps(config | {"quantization_config": scheme}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_architecture, "is a qwen2 model and .*base is llama: it is no fine-tune"),
        (wider, "no fine-tune of this base: .* has the shape"),
        (deeper, r"9 tensors are in one of them alone \(first: model.layers.2.*, in the fine-tune\)"),
        (same, "has the weights of .*: there is no delta"),
        (missing_shard, "model-00002-of-.* is missing: the model in .* is not complete"),
        (cut_off, "is cut off"),
        (pickled, r"is missing: .*files that can hold code"),
        (adapter, "is an adapter, not a model; make it one first: lowalign merge"),
        (exists, "delta exists and is not overwritten"),
        (no_model, "is not a model folder: config.json"),
        (own_code, "code of its own"),
        (not_finite, "up_proj.weight has values that are not finite"),
        (four_bit_fine_tune, "is stored quantized; its 16-bit weights are needed"),
    ],
)
def test_refused(change, message, tmp_path):
    base, fine = base_and_fine_tune(tmp_path)
    change(tmp_path)
    with pytest.raises(UserError, match=message):
        compress(str(base), str(fine), tmp_path / "delta", onto="original")
    assert change is exists or not [p for p in tmp_path.iterdir() if "delta" in p.name]


def test_a_base_that_is_stored_in_4_bit(tmp_path):
    """Dequantized it serves; original weights it has none."""
    base, fine = base_and_fine_tune(tmp_path)
    scheme = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, llm_int8_skip_modules=["lm_head"]
    )
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, quantization_config=scheme).save_pretrained(
        tmp_path / "four"
    )
    tiny_tokenizer().save_pretrained(tmp_path / "four")
    with pytest.raises(UserError, match="is stored in 4 bit and has no original weights; use --onto dequantized"):
        compress(str(tmp_path / "four"), str(fine), tmp_path / "a", onto="original")
    compress(str(tmp_path / "four"), str(fine), tmp_path / "a")
    compress(str(base), str(fine), tmp_path / "b")
    one, other = stored(tmp_path / "a"), stored(tmp_path / "b")
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_experts_are_refused_by_name(tmp_path):
    base, fine = base_and_fine_tune(tmp_path, "qwen3_moe", only="expert")
    with pytest.raises(
        UserError, match=r"layers.*experts.* changed, which transformers loads as a part of another tensor"
    ):
        compress(str(base), str(fine), tmp_path / "delta", onto="original")
    base, fine = base_and_fine_tune(tmp_path, "qwen3_moe", only="self_attn")
    compress(str(base), str(fine), tmp_path / "delta", onto="original")
    host = host_on(base)
    host.load("delta", tmp_path / "delta")


def test_a_full_disk(tmp_path, monkeypatch):
    base, fine = base_and_fine_tune(tmp_path)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"the delta takes .* GB and 0.0 GB are free"):
        compress(str(base), str(fine), tmp_path / "delta")
    monkeypatch.undo()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bitdelta, "write_tensors", full)
    with pytest.raises(UserError, match=r"could not be written to .*No space left on device; nothing of it is left"):
        compress(str(base), str(fine), tmp_path / "delta")
    assert not [p for p in tmp_path.iterdir() if "delta" in p.name]
