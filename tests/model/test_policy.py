"""What a run starts from, and the check before its first step."""

import contextlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lowalign import Base, Example, Host, demo
from lowalign.config.sections import AdapterConfig
from lowalign.errors import UserError
from lowalign.model.adapters.kinds import peft_config
from lowalign.model.policy import POLICY, check_start, load_stack, mean_kl, start_policy
from tests.tiny import tiny_folder

EXAMPLES = [Example([5, 6, 7, 8], [[9, 10, 11], [12, 13]]), Example([14, 15], [[16, 17, 18, 19]])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture
def host(folder):
    return Host(Base.load(folder, device="cpu", quiet=True))


def shaken(host, name):
    """As if trained: no weight is where it started."""
    flat = host.flat(name)
    for tensor in flat.tensors().values():
        tensor.add_(torch.randn_like(tensor) * 0.05)
    flat.sync_working_copy()


def values(host, stack):
    with host.use(*stack), torch.no_grad():
        return torch.cat([t for row in host.logprobs(EXAMPLES) for t in row])


@pytest.mark.parametrize("options", [{}, {"rslora": True}, {"dora": True}], ids=["lora", "rslora", "dora"])
def test_a_lora_starts_as_the_base(host, options):
    policy, reference = start_policy(host, AdapterConfig(**options), None, "stack", 0)
    assert (policy, reference) == ((POLICY,), ())
    assert "equal" in check_start(host, policy, reference, EXAMPLES)


def test_a_policy_that_is_not_its_reference_is_caught(host):
    policy, reference = start_policy(host, AdapterConfig(), None, "stack", 0)
    shaken(host, POLICY)
    with pytest.raises(RuntimeError, match="must equal its reference"):
        check_start(host, policy, reference, EXAMPLES)


@pytest.fixture(scope="module")
def demo_base():
    return Base.load(Path(demo.__file__).parent / "base", device="cpu", quiet=True)


@pytest.mark.parametrize(
    ("part", "change", "equal"),
    [
        ("lora_B", lambda p: p, True),
        ("lora_B", lambda p: p.fill_(1e-6), False),
        ("lora_magnitude_vector", lambda p: p.mul_(1.15), False),
    ],
    ids=["fresh", "B is not zero", "magnitudes are not the norms"],
)
def test_dora_starts_as_the_base_within_rounding(demo_base, part, change, equal):
    """bf16 moves single log-probs by 0.2 nats here, which is rounding; what is wrong is seen all the same."""
    host = Host(demo_base)
    policy, reference = start_policy(host, AdapterConfig(dora=True, dropout=0.1), None, "stack", 0)
    host.training("off")  # with dropout on, which the check must switch off
    with torch.no_grad():
        for key, p in host.weights(POLICY).items():
            if part in key:
                change(p)
    g = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randint(5, len(demo_base.tokenizer), (n,), generator=g).tolist()  # noqa: E731
    examples = [Example(draw(20), [draw(60)]) for _ in range(4)]
    with contextlib.nullcontext() if equal else pytest.raises(RuntimeError, match="must equal its reference"):
        check_start(host, policy, reference, examples)
    host.delete(POLICY)


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_a_soft_prompt_tells_its_divergence(host, kind):
    policy, reference = start_policy(host, AdapterConfig(kind=kind, virtual_tokens=4), None, "stack", 0)
    line = check_start(host, policy, reference, EXAMPLES)
    assert "nats a token" in line and "0.00 nats" not in line
    assert mean_kl(host, (), (), EXAMPLES) == 0.0


def test_divergence_against_its_definition(host):
    """KL(p ‖ q) over the whole vocabulary, from the model's own logits in fp64."""
    host.add("a", peft_config(AdapterConfig(r=4)))
    shaken(host, "a")
    example = Example([5, 6, 7], [[8, 9, 10, 11]])
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])
    logp = []
    for stack in ((), ("a",)):
        with host.use(*stack), torch.no_grad():
            logp.append(host.base.model(ids).logits[0, 2:6].double().log_softmax(-1))
    want = (logp[0].exp() * (logp[0] - logp[1])).sum(-1).mean().item()
    assert mean_kl(host, (), ("a",), [example]) == pytest.approx(want, rel=1e-3)  # logits are bf16 in both


@pytest.mark.parametrize("init,new,mode", [("lora", "lora", "stack"), ("lora", "lora", "copy"), ("prompt", "prompt", "stack"),
                                           ("prefix", "prefix", "stack"), ("prompt", "lora", "stack")])  # fmt: skip
def test_starting_from_an_earlier_adapter(host, tmp_path, init, new, mode):
    """Step 0 of the second run is the first run's end; what it saves loads as a whole."""
    host.add("first", peft_config(AdapterConfig(kind=init, virtual_tokens=4)))
    shaken(host, "first")
    host.save("first", tmp_path / "one" / "adapter")
    policy, reference = start_policy(host, AdapterConfig(kind=new, virtual_tokens=4), str(tmp_path / "one"), mode, 0)
    assert reference == ("init",)
    copied = mode == "copy" or init == new != "lora"
    assert policy == (("policy",) if copied else ("init", "policy"))
    assert torch.equal(values(host, policy), values(host, ("first",)))
    check_start(host, policy, reference, EXAMPLES)
    shaken(host, "policy")
    want = values(host, policy)
    host.save("policy", tmp_path / "two" / "adapter", parents=policy[:-1])
    stack = load_stack(host, "again", str(tmp_path / "two"))
    assert len(stack) == len(policy)
    assert torch.equal(values(host, stack), want)


@pytest.mark.parametrize("mode", ["copy", "stack"])
def test_what_is_trained_on_16_bits_computes_what_its_reference_computes(host, tmp_path, mode):
    """The frozen original in fp32 and its copy in 16 bit gave other log-probs, after a check of both in fp32."""
    host.add("first", peft_config(AdapterConfig()))
    shaken(host, "first")
    host.save("first", tmp_path)
    policy, reference = start_policy(host, AdapterConfig(), str(tmp_path), mode, 0)
    assert all(p.dtype == torch.bfloat16 for p in host.parameters(reference[-1]))
    check_start(host, policy, reference, EXAMPLES)
    host.flat(POLICY)  # as the loop does
    assert all(p.dtype == torch.bfloat16 for p in host.parameters(POLICY))
    assert torch.equal(values(host, policy), values(host, reference))
    stored = load_file(tmp_path / "adapter_model.safetensors")
    exact = [reference[-1]] + [POLICY] * (mode == "copy")
    for name in exact:  # what is trained further, and what is saved, has lost no bit
        weights = {f"base_model.model.{k}": t for k, t in host.weights(name).items()}
        assert weights.keys() == stored.keys() and {t.dtype for t in weights.values()} == {torch.float32}
        assert all(torch.equal(t, stored[k]) for k, t in weights.items())


def test_a_head_that_is_added_later_keeps_the_fp32_weights(host, tmp_path):
    host.add("first", peft_config(AdapterConfig()))
    shaken(host, "first")
    host.save("first", tmp_path)
    for with_flat in (False, True):
        host.load("again", tmp_path)
        if with_flat:
            host.flat("again")
        host.add_scalar_head("again")
        host.flat("again")
        want = host.weights("first")
        assert all(torch.equal(t, host.weights("again")[k]) for k, t in want.items())
        assert host.scalar_head("again").dtype == torch.float32
        host.delete("again")


def test_a_copy_of_a_dora_equals_it_bit_for_bit(host, tmp_path):
    host.add("first", peft_config(AdapterConfig(dora=True)))
    shaken(host, "first")
    host.save("first", tmp_path)
    policy, reference = start_policy(host, AdapterConfig(dora=True), str(tmp_path), "copy", 0)
    assert torch.equal(values(host, policy), values(host, reference))
    check_start(host, policy, reference, EXAMPLES)
    shaken(host, POLICY)
    with pytest.raises(RuntimeError, match="must equal its reference"):
        check_start(host, policy, reference, EXAMPLES)


def test_what_does_not_go_together_is_refused(host, tmp_path):
    host.add("first", peft_config(AdapterConfig()))
    host.save("first", tmp_path)
    with pytest.raises(UserError, match="it is LORA, not PREFIX_TUNING"):
        start_policy(host, AdapterConfig(kind="prefix"), str(tmp_path), "copy", 0)


def test_prompt_from_a_text(host):
    """The learned embeddings start as those of the text, repeated until they are enough."""
    host.add("a", peft_config(AdapterConfig(kind="prompt", virtual_tokens=12, init_text="The quick brown fox")))
    ids = host.base.tokenizer("The quick brown fox", add_special_tokens=False)["input_ids"]
    want = host.base.model.get_input_embeddings()(torch.tensor((ids * 12)[:12])).float()
    assert torch.equal(host.parameters("a")[0].data, want)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral", "gemma2", "phi3", "bloom"])
def test_prefix_from_a_text(tmp_path, kind):
    """It acts as the text in front of the prompt does: windows, soft caps, and a model that cannot be packed too."""
    host = Host(Base.load(tiny_folder(tmp_path, kind), quantization="none", dtype="float32", device="cpu", quiet=True))
    text = "The quick brown fox"
    ids = host.base.tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = (ids * 12)[:12]
    policy, _ = start_policy(host, AdapterConfig(kind="prefix", virtual_tokens=12, init_text=text), None, "stack", 0)
    behind = [Example(ids + e.prompt, e.completions) for e in EXAMPLES]
    with torch.no_grad():
        want = torch.cat([t for row in host.logprobs(behind) for t in row])
        bare = values(host, ())
    got = values(host, policy)
    assert (got - want).abs().max() <= 1e-4 < 0.1 < (bare - want).abs().max()  # 1.9e-6 seen


def test_prefix_from_a_text_on_an_adapter(folder, tmp_path):
    """The keys and values are those that the text has under the adapter the prefix is put on."""
    host = Host(Base.load(folder, dtype="float32", device="cpu", quiet=True))
    host.add("first", peft_config(AdapterConfig()))
    shaken(host, "first")
    host.save("first", tmp_path)
    host.delete("first")
    adapter = AdapterConfig(kind="prefix", virtual_tokens=5, init_text="jumps over the lazy dog")
    policy, reference = start_policy(host, adapter, str(tmp_path), "stack", 0)
    ids = host.base.tokenizer(adapter.init_text, add_special_tokens=False)["input_ids"][:5]
    behind = [Example(ids + e.prompt, e.completions) for e in EXAMPLES]
    with host.use(*reference), torch.no_grad():
        want = torch.cat([t for row in host.logprobs(behind) for t in row])
    assert (values(host, policy) - want).abs().max() <= 1e-4  # 1e-6 seen


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"init_text": "fox"}, "--adapter.init-text is for soft prompts"),
        ({"kind": "prefix", "init_text": "fox", "projection": True}, "a prefix without a projection"),
    ],
)
def test_what_a_text_cannot_start(host, options, says):
    with pytest.raises(UserError, match=says):
        start_policy(host, AdapterConfig(**options), None, "stack", 0)


def test_a_copy_has_no_text_to_start_from(host, tmp_path):
    host.add("first", peft_config(AdapterConfig(kind="prefix")))
    host.save("first", tmp_path)
    with pytest.raises(UserError, match="starts a fresh one"):
        start_policy(host, AdapterConfig(kind="prefix", init_text="fox"), str(tmp_path), "stack", 0)
