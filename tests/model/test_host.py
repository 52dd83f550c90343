"""Many adapters on one 4-bit base: what is active, what is trained, and what must never change."""

import json

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from lowalign import Base, Example, Host
from lowalign.errors import UserError
from lowalign.model.adapters.adapter import Adapter
from tests.tiny import tiny_folder

LORA = {"target_modules": "all-linear", "init_lora_weights": False}
STACKS = [
    ("policy",),
    ("reward",),
    ("prompt",),
    ("prefix",),
    ("policy", "reward"),
    ("policy", "prompt"),
    ("reward", "prefix"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("llama"), "llama", num_hidden_layers=3)


def four_adapters(folder, quantization="nf4", dtype="bfloat16") -> Host:
    host = Host(Base.load(folder, quantization=quantization, dtype=dtype, device="cpu", quiet=True))
    torch.manual_seed(0)
    host.add("policy", LoraConfig(r=8, lora_dropout=0.1, **LORA))
    host.add("reward", LoraConfig(r=4, **LORA | {"target_modules": ["q_proj", "v_proj"]}))
    host.add("prompt", PromptTuningConfig(num_virtual_tokens=4))
    host.add("prefix", PrefixTuningConfig(num_virtual_tokens=4))
    return host


def batch(seed=0):
    g = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randint(4, 300, (n,), generator=g).tolist()  # noqa: E731
    return [Example(draw(9), [draw(7), draw(5)]), Example(draw(4), [draw(6)])]


def flatten(nested):
    return torch.cat([t for row in nested for t in row])


def gradients(host, names, between=None, checkpointing="on"):
    """Gradients of a fixed loss under `names`; `between` runs after the forward, before the backward."""
    host.train_only(*names)
    host.training(checkpointing)
    for name in names:
        for p in host.parameters(name):
            p.grad = None
    torch.manual_seed(5)  # for the LoRA dropout
    with host.use(*names):
        loss = flatten(host.logprobs(batch())).sum()
    torch.manual_seed(6)
    if between is None:
        loss.backward()
    else:
        between(host, loss)
    host.training(None)
    return [p.grad.clone() for name in names for p in host.parameters(name)]


def test_bare_base_bit_for_bit(folder):
    """use() alone equals the base as transformers loads it, in train and in eval mode."""
    clean = Base.load(folder, device="cpu", quiet=True)
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])
    want, packed = clean.model(ids).logits, flatten(Host(clean).logprobs(batch()))
    host = four_adapters(folder)
    for mode in (None, "off", "on"):
        host.training(mode)
        with host.use(), torch.no_grad():
            assert torch.equal(host.base.model(ids).logits, want)
            assert torch.equal(flatten(host.logprobs(batch())), packed)


def test_every_stack_is_its_own(folder):
    host = four_adapters(folder)
    results = []
    for stack in [(), *STACKS]:
        with host.use(*stack), torch.no_grad():
            results.append(flatten(host.logprobs(batch())))
    for i, a in enumerate(results):
        assert all(not torch.equal(a, b) for b in results[:i])


@pytest.mark.parametrize("stack", STACKS, ids="+".join)
def test_checkpointing_and_a_backward_elsewhere_change_no_bit(folder, stack):
    """Gradients with checkpointing, also when other adapters are active at the backward, equal those without."""

    def under_another(host, loss):
        other = ("reward",) if "policy" in stack else ("policy",)
        with host.use(*other):
            loss.backward()

    def after_another_forward(host, loss):
        with host.use("policy", "prefix"), torch.no_grad():
            host.logprobs(batch(1))
        host.train_only("reward")
        host.train_only(*stack)
        loss.backward()

    host = four_adapters(folder)
    before = host.base.checksum()
    plain = gradients(host, stack, checkpointing="off")
    assert all(g.any() for g in plain)
    for checkpointing in ("on", "offload"):
        for between in (None, under_another, after_another_forward):
            for a, b in zip(plain, gradients(host, stack, between, checkpointing), strict=True):
                assert torch.equal(a, b)
    assert host.base.checksum() == before


def test_delete_leaves_the_others(folder):
    host = four_adapters(folder)
    kept = [("policy",), ("prefix",), ("policy", "prefix"), ()]

    def values():
        out = []
        for stack in kept:
            with host.use(*stack), torch.no_grad():
                out.append(flatten(host.logprobs(batch())))
        return out

    before, checksum = values(), host.base.checksum()
    host.delete("reward")
    host.delete("prompt")
    assert all(torch.equal(a, b) for a, b in zip(before, values(), strict=True))
    assert host.base.checksum() == checksum
    with pytest.raises(UserError, match='no adapter "reward"; there are: policy, prefix'), host.use("reward"):
        pass


def test_only_trained_adapters_get_gradients(folder):
    """Two roles in one backward: policy and value, as PPO needs it; a third stays untouched."""
    host = four_adapters(folder)
    host.train_only("policy", "prefix")
    host.training("on")
    with host.use("policy"):
        a = flatten(host.logprobs(batch())).sum()
    with host.use("prefix"):
        b = flatten(host.logprobs(batch())).sum()
    (a + b).backward()
    assert all(p.grad is not None for name in ("policy", "prefix") for p in host.parameters(name))
    assert all(p.grad is None for name in ("reward", "prompt") for p in host.parameters(name))
    assert all(
        not p.requires_grad and p.grad is None
        for p in host.base.model.parameters()
        if p.ndim == 2 and p.dtype == torch.uint8
    )


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["lora", "rslora", "dora"])
def test_a_fresh_lora_is_the_identity(folder, options):
    """Bit for bit in 4 bit; DoRA recomputes the norms, so it is within rounding in fp32."""
    host = four_adapters(folder, *(("none", "float32") if options.get("use_dora") else ()))
    host.add("fresh", LoraConfig(r=4, target_modules="all-linear", **options))
    with torch.no_grad():
        with host.use("policy"):
            want = flatten(host.logprobs(batch()))
        with host.use("policy", "fresh"):
            got = flatten(host.logprobs(batch()))
    if options.get("use_dora"):
        assert (want - got).abs().max() <= 1e-5
    else:
        assert torch.equal(want, got)


@pytest.mark.parametrize("name", ["policy", "reward", "prompt", "prefix"])
def test_save_and_load(folder, tmp_path, name):
    host = four_adapters(folder)
    host.flat(name)  # as in training: a LoRA computes in the base's dtype
    with host.use(name), torch.no_grad():
        want = flatten(host.logprobs(batch()))
    host.save(name, tmp_path / "a", method="sft")
    meta = host.load("again", tmp_path / "a")
    assert meta["method"] == "sft" and meta["base"]["weights"] == host.base.identity.weights
    with host.use("again"), torch.no_grad():
        assert torch.equal(flatten(host.logprobs(batch())), want)


def test_private_peft_attributes():
    """`use` sets these two, which peft's layers read in their forward. If peft renames them, this fails, not training."""
    assert isinstance(LoraLayer.__mro__[1]._disable_adapters, bool)
    assert isinstance(LoraLayer.__mro__[1]._active_adapter, str)
    layer = LoraLayer(torch.nn.Linear(2, 2))
    layer._active_adapter, layer._disable_adapters = ["a"], True
    assert layer.active_adapters == ["a"] and layer.disable_adapters


def test_wrong_use_is_told(folder):
    host = four_adapters(folder)
    with pytest.raises(UserError, match="prompt and prefix are both soft prompts"), host.use("prompt", "prefix"):
        pass
    with pytest.raises(UserError, match="already"):
        host.add("policy", LoraConfig())
    with pytest.raises(UserError, match=r"no layer is called .*wq"):
        host.add("new", LoraConfig(target_modules=["wq"]))
    with pytest.raises(UserError, match="bias, modules_to_save"):
        host.add("new", LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    with host.use("policy"), pytest.raises(UserError, match="is active"):
        host.delete("policy")
    assert host.active == ()
    host.add("new", LoraConfig(target_modules=["q_proj"]))  # nothing was left behind


def test_an_adapter_that_does_not_fit_is_refused(folder, tmp_path):
    host = four_adapters(folder)
    host.save("reward", tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"

    def rewritten(change, message):
        tensors = load_file(file)
        change(tensors)
        (tmp_path / "b").mkdir(exist_ok=True)
        (tmp_path / "b" / "adapter_config.json").write_bytes((tmp_path / "a" / "adapter_config.json").read_bytes())
        save_file(tensors, tmp_path / "b" / "adapter_model.safetensors")
        with pytest.raises(UserError, match=message):
            host.load("b", tmp_path / "b")
        assert "b" not in host.adapters

    first = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    rewritten(lambda t: t.pop(first), "1 weights are missing")
    rewritten(lambda t: t.update({"x": torch.ones(1)}), "1 weights have no place here")
    rewritten(lambda t: t.update({first: torch.ones(4, 32)}), "another shape")
    meta = json.loads((tmp_path / "a" / "lowalign.json").read_text())
    meta["base"]["weights"] = "0123456"
    (tmp_path / "a" / "lowalign.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match=r"trained on another base .*weights: here .*0123456"):
        host.load("b", tmp_path / "a")
    host.load("b", tmp_path / "a", allow_base_mismatch=True)
    file.unlink()
    (tmp_path / "a" / "adapter_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(UserError, match="can hold code"):
        host.load("c", tmp_path / "a")


def test_flat_weights_train_what_the_model_uses(folder):
    """A LoRA on a bf16 base computes with a bf16 copy of fp32 masters; both save and gradients go through the masters."""
    host = four_adapters(folder)
    flat = host.flat("reward")
    host.train_only("reward")
    host.training("off")
    flat.zero_grad()
    with host.use("reward"):
        flatten(host.logprobs(batch())).sum().backward()
    flat.accumulate()
    with torch.no_grad():
        flat.master.add_(flat.master.grad, alpha=1e-3)
    flat.sync_working_copy()
    for key, p in host.adapters["reward"].named_parameters().items():
        assert p.dtype == torch.bfloat16
        assert torch.equal(p, host.weights("reward")[key].bfloat16())
        assert host.weights("reward")[key].dtype == torch.float32


def test_parked_and_brought_back(folder, monkeypatch):
    """Parking goes to the CPU, `use` brings back to the base's device, and neither changes a bit."""
    host = four_adapters(folder)
    host.flat("policy")
    moves = []
    move = Adapter.move
    monkeypatch.setattr(
        Adapter, "move", lambda self, device: moves.append((self.name, device.type)) or move(self, device)
    )
    for name in ("policy", "prefix"):
        with host.use(name), torch.no_grad():
            want = flatten(host.logprobs(batch()))
            with pytest.raises(UserError, match="is active"):
                host.park(name)
        host.park(name)
        with host.use(), torch.no_grad():
            host.logprobs(batch())  # others go on meanwhile
        with host.use(name), torch.no_grad():
            assert torch.equal(flatten(host.logprobs(batch())), want)
        with host.use(name):
            pass  # is there already
    assert moves == [("policy", "cpu")] * 2 + [("prefix", "cpu")] * 2


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["policy", "prefix"])
def test_parking_frees_the_card(folder, name):
    host = Host(Base.load(folder, device="cuda", quiet=True))
    torch.manual_seed(0)
    host.add(name, LoraConfig(r=8, **LORA) if name == "policy" else PrefixTuningConfig(num_virtual_tokens=4))
    host.flat(name)
    with host.use(name), torch.no_grad():
        want = flatten(host.logprobs(batch()))
    host.park(name)
    assert all(p.device.type == "cpu" for p in host.parameters(name)) and host.flat(name).master.device.type == "cpu"
    with host.use(name), torch.no_grad():
        assert torch.equal(flatten(host.logprobs(batch())), want)


def test_a_loaded_lora_makes_no_noise_in_train_mode(folder, tmp_path):
    """Its dropout belongs to the training that is over: a policy on it must be able to equal its reference."""
    config = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.5, init_lora_weights=False)
    host = Host(Base.load(folder, quantization="none", dtype="float32", device="cpu", quiet=True))
    host.add("noisy", config)
    host.save("noisy", tmp_path / "noisy")
    host.load("quiet", tmp_path / "noisy")
    host.training("off")
    twice = lambda: [host.logprobs([Example([5, 6], [[7, 8, 9]])])[0][0] for _ in range(2)]  # noqa: E731
    with torch.no_grad(), host.use("noisy"):
        assert not torch.equal(*twice())
    with torch.no_grad(), host.use("quiet"):
        assert torch.equal(*twice())
    host.training(None)


def test_a_head_can_be_left_out_of_the_folder(folder, tmp_path):
    host = Host(Base.load(folder, quantization="none", dtype="float32", device="cpu", quiet=True))
    host.add("policy", LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    host.add_scalar_head("policy")
    for head, task in ((True, "SEQ_CLS"), (False, "CAUSAL_LM")):
        host.save("policy", tmp_path / task, scalar_head=head)
        assert json.loads((tmp_path / task / "adapter_config.json").read_text())["task_type"] == task
        host.load(task, tmp_path / task)
        assert host.has_scalar_head(task) is head
