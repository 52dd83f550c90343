"""Packed log-probs against stock transformers and stock peft, a row at a time, in fp32."""

import inspect
from dataclasses import replace
from functools import partial

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model

from lowalign import Base, Example, Host
from lowalign.model.attention import interface
from lowalign.model.base import probe
from tests.tiny import CONFIGS, tiny_folder

# Largest seen with three sets of CPU kernels: 3.9e-6 in log-probs, 1.9e-6 of a gradient's norm. A wrong mask, window or
# position shows from 1e-2.
ROUNDING = 1e-4
ARCHITECTURES = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "phi3"]
ADAPTERS = {
    "none": None,
    "lora": lambda: LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"),
    "prompt": lambda: PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "prefix": lambda: PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}


def examples(seed: int = 0) -> list[Example]:
    """Examples with three, one and two completions, longer than the window of 8."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randint(4, 380, (n,), generator=g).tolist()  # noqa: E731
    return [
        Example(draw(14), [draw(11), draw(9), draw(1)]),
        Example(draw(5), [draw(12)]),
        Example(draw(6), [draw(4), draw(13)]),
    ]


def stock_logprobs(model, rows):
    """One row at a time through the model's own attention, full logits, log_softmax."""
    out = []
    for e in rows:
        out.append([])
        for c in e.completions:
            ids = torch.tensor([e.prompt + c])
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -len(c) - 1 : -1]
            out[-1].append(logits.log_softmax(-1).gather(1, torch.tensor(c)[:, None])[:, 0])
    return out


def flatten(nested):
    return torch.cat([t for row in nested for t in row])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: tiny_folder(tmp_path_factory.mktemp(kind), kind) for kind in ARCHITECTURES}


def load(folder):
    return Base.load(folder, quantization="none", dtype="float32", device="cpu", quiet=True)


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_equals_stock_row_by_row(kind, adapter, folders, tmp_path):
    base = load(folders[kind])
    assert base.packed, base.why_not
    stock = load(folders[kind]).model
    stock.set_attn_implementation("eager")
    host = Host(base)
    names = ()
    if ADAPTERS[adapter]:
        torch.manual_seed(1)
        stock = get_peft_model(stock, ADAPTERS[adapter]())
        stock.save_pretrained(tmp_path)
        host.load("a", tmp_path)
        names = ("a",)
    parameters = [p for n, p in stock.named_parameters() if p.requires_grad]
    want = stock_logprobs(stock, examples())
    host.train_only(*names)
    host.training("on")
    with host.use(*names):
        got = host.logprobs(examples())
    assert (flatten(want) - flatten(got)).abs().max() <= ROUNDING
    if not names:
        return
    weight = torch.randn(len(flatten(got)), generator=torch.Generator().manual_seed(2))
    (flatten(want) @ weight).backward()
    (flatten(got) @ weight).backward()
    a = torch.cat([p.grad.flatten() for p in parameters])
    b = torch.cat([p.grad.flatten() for p in host.parameters("a")])
    # The libraries order LoRA's A and B differently: compare the norm, which does not depend on it, then each by name.
    assert torch.allclose(a.norm(), b.norm(), rtol=ROUNDING)
    if adapter == "lora":
        theirs = {
            n.replace("base_model.model.", "").replace(".default", ""): p.grad
            for n, p in stock.named_parameters()
            if p.requires_grad
        }
        for key, p in host.adapters["a"].named_parameters().items():
            assert (theirs[key] - p.grad).norm() <= ROUNDING * theirs[key].norm() + 1e-7
    else:
        assert (a - b).norm() <= ROUNDING * a.norm()


def test_prefix_with_projection_equals_stock(folders):
    """A prefix with its projection; weights are copied by name."""
    config = partial(
        PrefixTuningConfig, num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=24, task_type="CAUSAL_LM"
    )
    base, model = load(folders["qwen3"]), load(folders["qwen3"]).model
    model.set_attn_implementation("eager")
    stock = get_peft_model(model, config())
    host = Host(base)
    host.add("a", config())
    theirs = dict(stock.prompt_encoder["default"].named_parameters())
    for key, p in host.adapters["a"].named_parameters().items():
        p.data.copy_(theirs[key])
    host.train_only("a")
    host.training("on")
    want = flatten(stock_logprobs(stock, examples()))
    with host.use("a"):
        got = flatten(host.logprobs(examples()))
    assert (want - got).abs().max() <= ROUNDING
    want.sum().backward()
    got.sum().backward()
    for key, p in host.adapters["a"].named_parameters().items():
        assert (theirs[key].grad - p.grad).norm() <= ROUNDING * theirs[key].grad.norm()


def test_first_token_without_a_prompt_is_zero(folders):
    host = Host(load(folders["llama"]))
    (logp,), (other,) = host.logprobs([Example([], [[5, 6, 7]]), Example([5], [[6, 7]])])
    assert logp[0] == 0.0
    assert (logp[1:] - other).abs().max() <= ROUNDING


def test_supervised_only_zeroes_the_rest(folders):
    host = Host(load(folders["llama"]))
    mask = [[True, False, True, True, False]]
    whole = host.logprobs([Example([5, 6], [[7, 8, 9, 10, 11]], masks=mask)])[0][0]
    part = host.logprobs([Example([5, 6], [[7, 8, 9, 10, 11]], masks=mask)], supervised_only=True)[0][0]
    # Not bit for bit: a product of fewer rows may be summed in another order.
    assert (part == 0).tolist() == [not m for m in mask[0]] and (part - whole)[mask[0]].abs().max() <= ROUNDING


@pytest.mark.parametrize(
    "kind,broken", [("mistral", "sliding_window"), ("gemma2", "softcap"), ("gemma2", "sliding_window")]
)
def test_the_probe_sees_a_keyword_that_is_ignored(kind, broken, monkeypatch):
    """A kernel that ignores the window or the soft cap must not pass."""
    assert probe.probe(CONFIGS[kind]()) == (True, "")
    honest = interface.packed_attention

    def forgetful(query, key, value, layout, layer):
        ignored = {"window": None} if broken == "sliding_window" else {"softcap": None}
        return honest(query, key, value, layout, replace(layer, **ignored))

    monkeypatch.setattr(interface, "packed_attention", forgetful)
    packed, why = probe.probe(CONFIGS[kind]())
    assert not packed and "differ" in why


def test_the_probe_sees_a_head_that_is_misread(monkeypatch):
    monkeypatch.setattr(probe.LMHead, "of", classmethod(lambda cls, model: cls(model.get_output_embeddings())))
    assert not probe.probe(CONFIGS["gemma2"]())[0]


@pytest.mark.parametrize("adapter", ["lora", "prompt", "prefix"])
def test_rows_fall_back_gives_the_same(adapter, folders, tmp_path):
    """The same adapter through the packed kernel and through one row per completion, values and gradients."""
    results = []
    for packed in (True, False):
        base = load(folders["mistral"])
        base.packed = packed
        host = Host(base)
        torch.manual_seed(3)
        host.add("a", ADAPTERS[adapter]())
        host.train_only("a")
        host.training("on")
        with host.use("a"):
            logp = flatten(host.logprobs([*examples(), Example([], [[9, 8, 7]])]))
        logp.sum().backward()
        results.append((logp.detach(), torch.cat([p.grad.flatten() for p in host.parameters("a")])))
    (a, ga), (b, gb) = results
    assert (a - b).abs().max() <= ROUNDING
    assert (ga - gb).norm() <= ROUNDING * ga.norm()


def test_a_model_without_the_attention_interface_takes_rows(tmp_path):
    base = load(tiny_folder(tmp_path, "bloom"))
    assert not base.packed and base.why_not
    got = Host(base).logprobs(examples())
    assert (flatten(got) - flatten(stock_logprobs(base.model, examples()))).abs().max() <= ROUNDING


def test_longrope_keeps_short_and_long_apart(tmp_path):
    """A short Example beside one past the original length keeps the short factors (else its log-probs change by 0.02)."""
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0 + i for i in range(8)]}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 32, **factors}
    base = load(tiny_folder(tmp_path, "phi3", rope_parameters=rope, original_max_position_embeddings=32))
    host = Host(base)
    short, long = Example([5] * 4, [[6, 7, 8]]), Example(list(range(4, 44)), [[9, 10]])
    together, alone = host.logprobs([short, long]), [host.logprobs([e])[0] for e in (short, long)]
    assert (flatten(together) - flatten(alone)).abs().max() <= ROUNDING
    stock = base.model
    stock.set_attn_implementation("eager")
    assert (flatten(alone) - flatten(stock_logprobs(stock, [short, long]))).abs().max() <= ROUNDING


def reference_varlen(query, key, value, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa=False):
    """What torch.nn.attention.varlen.varlen_attn computes, by hand: bottom-right aligned causal windows per segment."""
    left, right = window_size
    assert right == 0 and enable_gqa == (query.shape[1] != key.shape[1])
    out = []
    groups = query.shape[1] // key.shape[1]
    for i in range(len(cu_q) - 1):
        q = query[cu_q[i] : cu_q[i + 1]].transpose(0, 1)
        k, v = (x[cu_k[i] : cu_k[i + 1]].repeat_interleave(groups, 1).transpose(0, 1) for x in (key, value))
        n, m = q.shape[1], k.shape[1]
        behind = (torch.arange(n)[:, None] + m - n) - torch.arange(m)
        seen = (behind >= 0) & (behind <= left if left >= 0 else True)
        out.append(((q @ k.mT * scale).masked_fill(~seen, -torch.inf).softmax(-1) @ v).transpose(0, 1))
        assert n <= max_q and m <= max_k
    return torch.cat(out)


@pytest.mark.parametrize("adapter", ["none", "prefix"])
@pytest.mark.parametrize("kind", ["llama", "mistral"])
@pytest.mark.parametrize("torch_211", [False, True])
def test_varlen_layout(kind, adapter, torch_211, folders, monkeypatch):
    """The gathered keys of the CUDA path, with the flash kernel replaced by its definition."""
    host = Host(load(folders[kind]))
    names = ()
    if adapter == "prefix":
        host.add("a", ADAPTERS["prefix"]())
        names = ("a",)
    with host.use(*names), torch.no_grad():
        want = flatten(host.logprobs(examples()))
        monkeypatch.setattr("lowalign.model.attention.packed._varlen_works", lambda *a: True)
        kernel = partial(reference_varlen) if torch_211 else reference_varlen
        if torch_211:  # no enable_gqa there
            kernel.__signature__ = inspect.signature(lambda query, key, value: None)
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
        got = flatten(host.logprobs(examples()))
    assert (want - got).abs().max() <= ROUNDING


def test_peft_folder_written_here_loads_in_stock(folders, tmp_path):
    for adapter in ("lora", "prompt", "prefix"):
        host = Host(load(folders["qwen3"]))
        torch.manual_seed(0)
        host.add("a", ADAPTERS[adapter]())
        host.save("a", tmp_path / adapter)
        stock_base = load(folders["qwen3"]).model
        stock = PeftModel.from_pretrained(stock_base, str(tmp_path / adapter)).eval()
        with host.use("a"), torch.no_grad():
            got, want = host.logprobs(examples()), stock_logprobs(stock, examples())
        assert (flatten(want) - flatten(got)).abs().max() <= ROUNDING
