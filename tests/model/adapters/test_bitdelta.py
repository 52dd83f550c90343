"""A delta on the host beside the other kinds: what is active, what is trained, and what must never change."""

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig
from safetensors.torch import load_file

from lowalign import Base, Example, Host, Sampling, merge
from lowalign.errors import UserError
from lowalign.export.bitdelta import compress
from lowalign.model.adapters.adapter import Adapter
from lowalign.model.policy import load_stack
from tests.bitdelta_models import base_and_fine_tune, dense

LORA = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}
BATCH = [Example([5, 6, 7, 8], [[9, 10, 11], [12, 13]]), Example([14, 15], [[16, 17, 18, 19]])]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """root/base, root/fine, root/delta; root/blocks: a delta of the blocks' matrices alone."""
    root = tmp_path_factory.mktemp("bitdelta")
    base, fine = base_and_fine_tune(root)
    compress(str(base), str(fine), root / "delta", onto="original")
    (root / "two").mkdir()
    base_and_fine_tune(root / "two", only="proj")
    compress(str(base), str(root / "two" / "fine"), root / "blocks", onto="original", per_row=True)
    return root


def make_host(root, quantization="none", dtype="float32") -> Host:
    return Host(Base.load(root / "base", quantization=quantization, dtype=dtype, device="cpu", quiet=True))


def logps(host, *names):
    with host.use(*names):
        return torch.cat([t for row in host.logprobs(BATCH) for t in row])


def gradients(host, stack, trained, between=None, checkpointing="on"):
    host.train_only(*trained)
    host.training(checkpointing)
    for name in trained:
        for p in host.parameters(name):
            p.grad = None
    loss = logps(host, *stack).sum()
    (between or (lambda host, loss: loss.backward()))(host, loss)
    host.training(None)
    return [p.grad.clone() for name in trained for p in host.parameters(name)]


@pytest.mark.parametrize(("quantization", "dtype"), [("none", "float32"), ("nf4", "bfloat16")])
def test_several_on_one_base_with_other_kinds(root, quantization, dtype):
    host = make_host(root, quantization, dtype)
    with torch.no_grad():
        bare, checksum = logps(host), host.base.checksum()
        torch.manual_seed(0)
        host.add("before", LoraConfig(**LORA))
        host.load("delta", root / "delta")
        host.load("blocks", root / "blocks")
        host.load("third", root / "delta")
        host.add("after", LoraConfig(**LORA))
        host.add("prompt", PromptTuningConfig(num_virtual_tokens=3))
        stacks = [("delta",), ("blocks",), ("delta", "blocks"), ("before",), ("before", "delta"), ("delta", "after")]
        stacks += [("before", "blocks", "after"), ("delta", "prompt")]
        results = [logps(host, *stack) for stack in stacks]
        for i, one in enumerate([bare, *results]):
            assert all(not torch.equal(one, other) for other in results[i:])
        assert torch.equal(logps(host, "third"), results[0])
        assert torch.equal(logps(host), bare) and host.base.checksum() == checksum
        with host.use("delta"), host.use():  # off inside of on
            assert torch.equal(torch.cat([t for row in host.logprobs(BATCH) for t in row]), bare)
        with pytest.raises(UserError, match=r"delta and third cannot be active together: both replace lm_head.weight"):
            logps(host, "delta", "third")
        assert torch.equal(logps(host), bare)
        for name in ("third", "before", "blocks"):
            host.delete(name)
        assert torch.equal(logps(host, "delta"), results[0]) and torch.equal(logps(host, "delta", "after"), results[5])
        host.delete("delta")
        assert torch.equal(logps(host), bare) and host.base.checksum() == checksum


def test_a_lora_before_or_after_is_the_same(root):
    """Inside peft's layer or put on it later, the delta adds the same."""
    results = []
    for first in ("lora", "delta"):
        host = make_host(root)
        for name in (first, "delta" if first == "lora" else "lora"):
            torch.manual_seed(0)
            host.load("delta", root / "delta") if name == "delta" else host.add("lora", LoraConfig(**LORA))
        with torch.no_grad():
            results.append(logps(host, "delta", "lora"))
    assert torch.equal(*results)


def test_saved_and_loaded_again(root, tmp_path):
    """In a base of other precision the kept tensors keep the bits they came in."""
    host = make_host(root)
    host.load("delta", root / "delta")
    with torch.no_grad():
        wanted = logps(host, "delta")
        host.save("delta", tmp_path / "again", method="sft")
        one, other = (
            load_file(folder / "adapter_model.safetensors") for folder in (root / "delta", tmp_path / "again")
        )
        assert one.keys() == other.keys()
        assert all(one[k].dtype == other[k].dtype and torch.equal(one[k], other[k]) for k in one)
        host.delete("delta")
        assert host.load("again", tmp_path / "again")["method"] == "sft"
        assert torch.equal(logps(host, "again"), wanted)


def test_a_lora_trained_on_top_brings_the_delta(root, tmp_path):
    host = make_host(root)
    host.load("delta", root / "delta")
    torch.manual_seed(0)
    host.add("lora", LoraConfig(**LORA))
    host.save("lora", tmp_path / "both", parents=("delta",))
    with torch.no_grad():
        wanted = logps(host, "delta", "lora")
        stack = load_stack(other := make_host(root), "p", str(tmp_path / "both"))
        assert torch.equal(logps(other, *stack), wanted)
    merge([str(tmp_path / "both")], tmp_path / "merged", model=str(root / "base"), dtype="float32", verify=False)
    merged = Host(Base.load(tmp_path / "merged", quantization="none", dtype="float32", device="cpu", quiet=True))
    with torch.no_grad():
        torch.testing.assert_close(logps(merged), wanted, atol=2e-4, rtol=0)


@pytest.mark.parametrize("stack", [("delta",), ("blocks",), ("delta", "lora")], ids="+".join)
def test_checkpointing_and_a_backward_elsewhere_change_no_bit(root, stack):
    """The kept norms act in the backward too: also in one that runs with the delta off, or under another delta."""

    def outside(host, loss):
        with host.use("other"), torch.no_grad():
            host.logprobs(BATCH)
        loss.backward()

    def under_another(host, loss):
        with host.use("other"):
            loss.backward()

    host = make_host(root, "nf4", "bfloat16")
    torch.manual_seed(0)
    for name in ("delta", "blocks", "other"):
        host.load(name, root / ("delta" if name == "other" else name))
    for matrix in host.adapters["other"].matrices.values():
        matrix.log_scale.data += 1
    for parameter in host.adapters["other"].kept.values():
        parameter.data *= 2
    host.add("lora", LoraConfig(**LORA))
    checksum = host.base.checksum()
    plain = gradients(host, stack, stack, checkpointing="off")
    assert all(g.any() for g in plain)
    for checkpointing in ("off", "on", "offload"):
        for between in (None, outside, under_another):
            for a, b in zip(plain, gradients(host, stack, stack, between, checkpointing), strict=True):
                assert torch.equal(a, b)
    assert host.base.checksum() == checksum


def test_gradients_equal_those_of_the_dense_model(root):
    """To the log-scales, by autograd on W + exp(s) S in a plain transformers model; fp32."""
    host = make_host(root)
    host.load("delta", root / "delta")
    found = dict(zip(host.adapters["delta"].own_weights(), gradients(host, ("delta",), ("delta",)), strict=True))
    model = dense(root / "base", root / "fine").requires_grad_(True)
    loss = 0
    for example in BATCH:
        for completion in example.completions:
            ids = torch.tensor([example.prompt + completion])
            logp = model(input_ids=ids).logits[0, len(example.prompt) - 1 : -1].log_softmax(-1)
            loss = loss + logp.gather(1, torch.tensor(completion)[:, None]).sum()
    loss.backward()
    bare = Base.load(root / "base", quantization="none", dtype="float32", device="cpu", quiet=True).model
    for name, gradient in found.items():
        module = name.removesuffix(".log_scale")
        change = model.get_submodule(module).weight - bare.get_submodule(module).weight  # α S
        wanted = (model.get_submodule(module).weight.grad * change).sum()[None]
        torch.testing.assert_close(gradient, wanted, rtol=2e-3, atol=2e-3)  # seen: 2e-5


def test_sampled_answers_are_those_of_the_merged_model(root, tmp_path):
    merge([str(root / "delta")], tmp_path / "merged", model=str(root / "base"), dtype="float32", verify=False)
    sampling, prompts = Sampling(max_new_tokens=12, temperature=0), [[5, 6, 7, 8], [14, 15]]
    merged = Host(Base.load(tmp_path / "merged", quantization="none", dtype="float32", device="cpu", quiet=True))
    host = make_host(root)
    host.load("delta", root / "delta")
    bare = host.generate(prompts, 1, sampling)
    with host.use("delta"):
        found = host.generate(prompts, 1, sampling)
    ids = lambda rows: [row[0].ids for row in rows]  # noqa: E731
    assert ids(found) == ids(merged.generate(prompts, 1, sampling)) != ids(bare)


def test_parked_and_brought_back(root, monkeypatch):
    host = make_host(root)
    host.load("delta", root / "delta")
    with torch.no_grad():
        wanted = logps(host, "delta")
        moves, move = [], Adapter.move
        monkeypatch.setattr(Adapter, "move", lambda self, device: moves.append(device.type) or move(self, device))
        host.park("delta")
        host.flat("delta")
        assert torch.equal(logps(host, "delta"), wanted) and moves == ["cpu", "cpu"]
        host.park("delta")
        assert torch.equal(logps(host, "delta"), wanted)


def test_another_host_on_the_same_base(root):
    """It starts with nothing active, whatever the first one loaded."""
    host = make_host(root)
    with torch.no_grad():
        bare = logps(host)
        host.load("delta", root / "delta")
        with host.use("delta"):
            other = Host(host.base)
        assert torch.equal(logps(other), bare)


def test_a_base_in_other_precision_is_said(root, tmp_path, capsys):
    compress(str(root / "base"), str(root / "fine"), tmp_path / "delta")
    make_host(root, "nf4").load("delta", tmp_path / "delta")
    assert "less exact" not in capsys.readouterr().err
    make_host(root).load("delta", tmp_path / "delta")
    assert "delta was counted from the base in NF4" in capsys.readouterr().err


def test_refused(root, tmp_path):
    host = make_host(root)
    with pytest.raises(UserError, match=r"does not fit this base, which has no model.layers.2"):
        (tmp_path / "deep").mkdir()
        base, fine = base_and_fine_tune(tmp_path / "deep", num_hidden_layers=3)
        compress(str(base), str(fine), tmp_path / "delta", onto="original")
        host.load("delta", tmp_path / "delta", allow_base_mismatch=True)
    with pytest.raises(UserError, match="was trained on another base"):
        host.load("delta", tmp_path / "delta")
    (tmp_path / "wide").mkdir()
    base, fine = base_and_fine_tune(tmp_path / "wide", intermediate_size=192)
    compress(str(base), str(fine), tmp_path / "delta2", onto="original")
    with pytest.raises(UserError, match="weights have another shape"):
        host.load("delta", tmp_path / "delta2", allow_base_mismatch=True)
    assert "delta" not in host.adapters
    host.load("delta", root / "delta")  # nothing was left behind


@pytest.mark.gpu
def test_on_the_card(root):
    """In bf16 on NF4: forward and gradients near those in fp32 on the CPU, and parking frees the card."""
    host = Host(Base.load(root / "base", device="cuda", quiet=True))
    bare, checksum = logps(host), host.base.checksum()
    host.load("delta", root / "delta")
    found = logps(host, "delta")
    assert torch.equal(logps(host), bare) and host.base.checksum() == checksum
    other = make_host(root, "nf4")
    other.load("delta", root / "delta")
    wanted = logps(other, "delta")
    assert (found.cpu() - wanted).abs().max() < 0.5  # bf16 on random weights
    assert all(g.isfinite().all() and g.any() for g in gradients(host, ("delta",), ("delta",)))
    host.park("delta")
    assert all(m.packed.device.type == "cpu" for m in host.adapters["delta"].matrices.values())
    assert torch.equal(logps(host, "delta"), found)
