"""Loading a base: 4 bit where it should be, frozen, named exactly, refused where it cannot be right."""

import hashlib
import json
import shutil
from functools import partial

import bitsandbytes as bnb
import psutil
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit

from lowalign import Base
from lowalign.errors import UserError
from lowalign.model.adapters.lora import linear_names
from lowalign.model.base import hub
from lowalign.model.base.base import NF4_BYTES
from tests.tiny import tiny_folder, tiny_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("qwen3"), "qwen3")


def changed(folder, tmp_path, **config):
    shutil.copytree(folder, tmp_path / "m")
    raw = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(raw | config))
    return tmp_path / "m"


def test_every_linear_but_the_head_is_nf4(folder, capsys):
    base = Base.load(folder, device="cpu")
    kinds = {name: type(m) for name, m in base.model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert kinds.pop("lm_head") is torch.nn.Linear
    assert len(kinds) == 14 and set(kinds.values()) == {bnb.nn.Linear4bit}
    for module in base.model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            state = module.weight.quant_state
            assert state.quant_type == "nf4" and state.nested and module.compute_dtype == torch.bfloat16
    assert base.model.lm_head.weight is base.model.model.embed_tokens.weight  # still tied
    assert not any(p.requires_grad for p in base.model.parameters())
    four_bit = 14 * 0 + sum(
        m.weight.quant_state.shape.numel() for m in base.model.modules() if isinstance(m, bnb.nn.Linear4bit)
    )
    total = four_bit + sum(p.numel() for p in base.model.parameters() if not isinstance(p, bnb.nn.Params4bit))
    assert base.unquantized == pytest.approx(1 - four_bit / total)
    assert f"{base.unquantized:.1%} of its weights are not in 4 bit" in capsys.readouterr().err


def test_nf4_bytes_a_weight():
    """0.516 bytes: what bitsandbytes really stores, scales of the scales included."""
    weight = bnb.nn.Params4bit(
        torch.randn(1024, 1024), requires_grad=False, compress_statistics=True, quant_type="nf4"
    ).to("cpu")
    weight = weight if weight.quant_state is not None else weight._quantize("cpu")
    s = weight.quant_state
    stored = weight.numel() + s.absmax.numel() + 4 * s.state2.absmax.numel()
    assert stored / 1024**2 == pytest.approx(NF4_BYTES, rel=1e-4)


def test_forwards_in_eval_mode_leave_the_bits_and_the_gradients(folder):
    """bitsandbytes repacks weights at the first CPU forward in eval mode where the CPU has AVX512-BF16; not here."""
    base = Base.load(folder, device="cpu", quiet=True)
    layer = base.model.model.layers[0].mlp.down_proj
    raw, dequantized = layer.weight.data.clone(), dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    checksum = base.checksum()
    with torch.no_grad():
        base.model.eval()(torch.tensor([[5, 6, 7]]))
    base.model.state_dict()
    assert torch.equal(layer.weight.data, raw)
    assert torch.equal(dequantize_4bit(layer.weight.data, layer.weight.quant_state), dequantized)
    assert base.checksum() == checksum
    x = torch.randn(2, layer.in_features, dtype=torch.bfloat16, requires_grad=True)
    layer(x).float().sum().backward()
    assert torch.allclose(x.grad.float(), dequantized.float().sum(0).expand(2, -1), atol=0.05, rtol=0.05)
    layer.weight.data.view(-1)[3] ^= 1
    assert base.checksum() != checksum


def test_the_checksum_does_not_depend_on_its_slices(folder, monkeypatch):
    base = Base.load(folder, device="cpu", quiet=True)
    checksum = base.checksum()
    monkeypatch.setattr("lowalign.model.base.identity.CHECKSUM_WORDS", 7)
    assert base.checksum() == checksum


def test_dropout_is_off_in_train_mode(tmp_path):
    base = Base.load(
        tiny_folder(tmp_path, "gpt2", resid_pdrop=0.3, attn_pdrop=0.3, embd_pdrop=0.3),
        quantization="none",
        device="cpu",
        quiet=True,
    )
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert torch.equal(base.model.train()(ids).logits, base.model.eval()(ids).logits)


def test_identity_tells_bases_apart(folder, tmp_path):
    a = Base.load(folder, device="cpu", quiet=True).identity
    shutil.copytree(folder, tmp_path / "copy")
    b = Base.load(tmp_path / "copy", device="cpu", quiet=True).identity
    assert not a.differences(vars(b)) and a.name != b.name and "/" not in b.name
    other = Base.load(tiny_folder(tmp_path / "other", "qwen3", seed=1), device="cpu", quiet=True).identity
    assert [d.split(":")[0] for d in other.differences(vars(a))] == ["weights"]


def test_a_hub_model_and_a_copy_of_it_are_one(folder, tmp_path):
    """In the Hub's cache a weight file is a link to a blob named by its sha256: the same identity, without reading it."""
    from lowalign.model.base.identity import identify

    snapshot = tmp_path / "snapshots" / "0123abcd"
    shutil.copytree(folder, snapshot)
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    (tmp_path / "blobs").mkdir()
    (snapshot / "model.safetensors").rename(tmp_path / "blobs" / digest)
    (snapshot / "model.safetensors").symlink_to(tmp_path / "blobs" / digest)
    hub = identify("org/model", snapshot, "0123abcd", tiny_tokenizer(), "nf4")
    local = identify(str(folder), folder, None, tiny_tokenizer(), "nf4")
    assert hub.revision == "0123abcd" and local.revision is None
    assert not hub.differences(vars(local)) and hub.weights == local.weights
    (tmp_path / "blobs" / digest).write_bytes(b"")  # not read
    assert identify("org/model", snapshot, "0123abcd", tiny_tokenizer(), "nf4").weights == local.weights


def test_loads_by_hub_id(folder, tmp_path, monkeypatch):
    """Through the Hub client and its cache, as it is without a network; the resolved commit is the identity's."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--org--tiny"
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(hub, "snapshot_download", partial(hub.snapshot_download, cache_dir=tmp_path))
    base = Base.load("org/tiny", device="cpu", quiet=True)
    assert (base.identity.name, base.identity.revision) == ("org/tiny", commit)
    with pytest.raises(UserError, match='"org/none" is neither a folder here nor reachable on the Hub'):
        Base.load("org/none", device="cpu", quiet=True)


def test_pad_is_not_eos(tmp_path):
    folder = tiny_folder(tmp_path, "llama")
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    base = Base.load(folder, device="cpu", quiet=True)
    assert base.tokenizer.pad_token_id not in base.eos_ids
    assert len(base.tokenizer) == len(tokenizer)


def test_all_eos_ids(tmp_path):
    folder = tiny_folder(tmp_path, "llama")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    assert set(Base.load(folder, device="cpu", quiet=True).eos_ids) == {2, 7}


def test_already_nf4_is_taken_as_it_is(folder, tmp_path):
    base = Base.load(folder, device="cpu", quiet=True)
    base.model.save_pretrained(tmp_path)
    base.tokenizer.save_pretrained(tmp_path)
    again = Base.load(tmp_path, device="cpu", quiet=True)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert torch.equal(base.model(ids).logits, again.model(ids).logits)


REFUSED = [
    ({"auto_map": {"AutoConfig": "evil.Config"}, "model_type": "evil"}, "needs code of its own"),
    ({"is_encoder_decoder": True}, "encoder-decoder"),
    ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"already quantized \(gptq\)"),
    ({"model_type": "no_such_model"}, "transformers does not know the model"),
]


@pytest.mark.parametrize("config,message", REFUSED, ids=[next(iter(c)) for c, _ in REFUSED])
def test_refused_with_a_reason(folder, tmp_path, config, message):
    with pytest.raises(UserError, match=message):
        Base.load(changed(folder, tmp_path, **config), device="cpu", quiet=True)


def test_refused_without_safetensors_or_memory(folder, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").rename(tmp_path / "m" / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"has no .*safetensors"):
        Base.load(tmp_path / "m", device="cpu", quiet=True)
    with pytest.raises(UserError, match="is not a folder"):
        Base.load(tmp_path / "nothing", device="cpu", quiet=True)
    with pytest.raises(UserError, match='quantization "int8" is not known'):
        Base.load(folder, quantization="int8", device="cpu", quiet=True)
    memory = psutil.virtual_memory()
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory._replace(available=1000))
    with pytest.raises(UserError, match=r"needs [\d.]+ GiB on cpu and 0.0 GiB are free"):
        Base.load(folder, device="cpu", quiet=True)


def test_mixture_of_experts_says_what_stays_in_16_bit(tmp_path):
    import transformers

    from tests.tiny import _SHAPE

    config = transformers.MixtralConfig(**_SHAPE | {"num_local_experts": 4, "sliding_window": None})
    torch.manual_seed(0)
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    base = Base.load(tmp_path, device="cpu", quiet=True)
    assert base.unquantized > 0.5  # the experts
    assert linear_names(base.model) == ["k_proj", "o_proj", "q_proj", "v_proj"]
