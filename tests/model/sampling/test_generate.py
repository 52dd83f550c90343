"""`host.generate` against stock transformers + peft generation, for every kind of adapter and for stacks.

In fp64 where tokens are compared, so that no rounding of any CPU decides between two of them.
"""

from itertools import chain

import pytest
import torch
from peft import get_peft_model

from lowalign import Base, Example, Host, Sampling
from tests.model.forward.test_packed import ADAPTERS
from tests.tiny import tiny_folder

PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15], [16, 17, 18], [19]]
GREEDY = Sampling(temperature=0, max_new_tokens=24)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: tiny_folder(tmp_path_factory.mktemp(kind), kind) for kind in ("llama", "qwen3", "mistral", "bloom")}


def load(folder) -> Base:
    return Base.load(folder, quantization="none", dtype="float64", device="cpu", quiet=True)


def exact(host, *names) -> Host:
    """With these adapters in fp64 too."""
    for name in names:
        for p in host.parameters(name):
            p.data = p.data.double()
    return host


def stock_generate(model, prompt) -> list[int]:
    ids = torch.tensor([prompt])
    fixed = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **fixed)[0].tolist()
    # With inputs_embeds alone (prompt tuning) the output does not repeat the prompt.
    return out[len(prompt) :] if out[: len(prompt)] == prompt else out


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral"])
def test_greedy_equals_stock_generate(kind, adapter, folders, tmp_path):
    host, stock, names = Host(load(folders[kind])), load(folders[kind]).model, ()
    stock.set_attn_implementation("eager")
    if ADAPTERS[adapter]:
        torch.manual_seed(1)
        stock = get_peft_model(stock, ADAPTERS[adapter]()).eval()
        stock.save_pretrained(tmp_path)
        host.load("a", tmp_path)
        names = ("a",)
    with exact(host, *names).use(*names):
        got = host.generate(PROMPTS, sampling=GREEDY)
        assert [c.ids for (c,) in got] == [stock_generate(stock, p) for p in PROMPTS]
        teacher_forced = host.logprobs([Example(p, [c.ids]) for p, (c,) in zip(PROMPTS, got, strict=True)])
    for (c,), (logp,) in zip(got, teacher_forced, strict=True):
        assert (c.logprobs - logp.detach()).abs().max() <= 1e-5


def test_a_stack_and_its_samples(folders):
    """LoRA on LoRA under a prefix: log-probs of samples equal a teacher-forced forward at their temperature."""
    host = Host(Base.load(folders["llama"], quantization="none", dtype="float32", device="cpu", quiet=True))
    torch.manual_seed(0)
    host.add("a", ADAPTERS["lora"]())
    host.add("b", ADAPTERS["lora"]())
    host.add("c", ADAPTERS["prefix"]())
    with host.use("a", "b", "c"):
        got = host.generate(PROMPTS, n=3, sampling=Sampling(temperature=0.7, max_new_tokens=12, seed=4))
        forced = host.logprobs(
            [Example(p, [c.ids for c in cs]) for p, cs in zip(PROMPTS, got, strict=True)], temperature=0.7
        )
    for completions, logps in zip(got, forced, strict=True):
        assert len({tuple(c.ids) for c in completions}) == 3
        for c, logp in zip(completions, logps, strict=True):
            assert (c.logprobs - logp.detach()).abs().max() <= 1e-4  # 5.8e-6 seen


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_rows_fall_back_draws_the_same(adapter, folders):
    """The fallback sampler and the packed one draw the same samples from the same seeds."""
    results = []
    for packed in (True, False):
        base = load(folders["mistral"])
        base.packed = packed
        host = Host(base)
        torch.manual_seed(0)
        names = ()
        if ADAPTERS[adapter]:
            host.add("a", ADAPTERS[adapter]())
            names = ("a",)
        with exact(host, *names).use(*names):
            results.append(host.generate(PROMPTS, n=2, sampling=Sampling(max_new_tokens=16, min_new_tokens=3)))
    for a, b in zip(*results, strict=True):
        assert [c.ids for c in a] == [c.ids for c in b] and [c.stopped for c in a] == [c.stopped for c in b]
        assert all((x.logprobs - y.logprobs).abs().max() <= 1e-5 for x, y in zip(a, b, strict=True))


def test_without_the_attention_interface(folders):
    base = load(folders["bloom"])
    got = Host(base).generate(PROMPTS, sampling=GREEDY)
    assert [c.ids for (c,) in got] == [stock_generate(base.model, p) for p in PROMPTS]


def test_generating_leaves_train_mode_as_it_was(folders):
    host = Host(load(folders["llama"]))
    host.training("on")
    host.generate([[5]], sampling=Sampling(max_new_tokens=2))
    assert host.base.model.training


@pytest.mark.parametrize("kind", ["llama", "bloom"])  # packed, and row by row
def test_a_completion_ends_where_stop_says(kind, folders):
    """It is the beginning of the one without `stop`, up to the first token after which the condition holds."""
    host, sampling = Host(load(folders[kind])), Sampling(max_new_tokens=24, seed=3)
    whole = host.generate(PROMPTS, 3, sampling)
    stop = lambda ids: len(ids) >= 4 and ids[-1] % 3 == 0  # noqa: E731
    stopped = host.generate(PROMPTS, 3, sampling, stop=stop)
    ended = 0
    for before, after in zip(chain(*whole), chain(*stopped), strict=True):
        ends = [t + 1 for t in range(len(before.ids)) if stop(before.ids[: t + 1])]
        assert after.ids == before.ids[: ends[0] if ends else None]
        assert after.stopped == (bool(ends) or before.stopped)
        ended += bool(ends)
    assert ended >= 7
