"""The sampler's attention against stock transformers, one prompt at a time.

Tokens are compared in fp64, where no rounding of any CPU decides between two of them; log-probs in fp32 too.
"""

import copy
from functools import cache
from itertools import chain

import pytest
import torch
from transformers import DynamicCache, GptOssConfig

from lowalign.config.sections import Sampling
from lowalign.model.attention import blockwise, sampler_cache
from lowalign.model.attention.interface import ATTN_IMPLEMENTATION
from lowalign.model.attention.soft_prompt import NO_SOFT_PROMPT, SoftPrompt
from lowalign.model.sampling import batcher
from lowalign.model.sampling.batcher import SampledModel
from lowalign.model.sampling.sample import sample_batched
from tests.tiny import CONFIGS, tiny_model

ARCHITECTURES = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "phi3", "gpt2"]
GREEDY = Sampling(temperature=0, max_new_tokens=80)  # past the first key buffer, and ten windows long


def draw(n: int, seed: int) -> list[int]:
    return torch.randint(4, 380, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


PROMPTS = [draw(14, 0), draw(5, 1), draw(20, 2), draw(1, 3)]


@cache
def models(kind, dtype=torch.float64):
    """Two copies of a model: with our attention in `dtype`, and with its own in fp64."""
    model, stock = with_stock(tiny_model(kind))
    return model.to(dtype), stock


def with_stock(model):
    model.generation_config.eos_token_id = None
    stock = copy.deepcopy(model).double()
    stock.set_attn_implementation("eager")
    model.set_attn_implementation(ATTN_IMPLEMENTATION)
    return model, stock


def sample(model, prompts, n, sampling, *, eos_ids=(), soft=NO_SOFT_PROMPT, seeds=None):
    return sample_batched(SampledModel(model, eos_ids, soft), prompts, n, sampling, seeds)


def soft_prompt(kind, model):
    """Four virtual tokens, a prefix of four, or none; large enough to change the results."""
    torch.manual_seed(7)
    config = model.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    if kind == "prompt":
        return SoftPrompt(torch.randn(4, config.hidden_size))
    if kind == "prefix":
        return SoftPrompt(
            keys_values=[
                (torch.randn(1, heads, 4, size), torch.randn(1, heads, 4, size))
                for _ in range(config.num_hidden_layers)
            ]
        )
    return NO_SOFT_PROMPT


@torch.no_grad()
def teacher_forced(stock, prompt, completion, soft=NO_SOFT_PROMPT):
    """(len(completion), V) fp64 logits from one ordinary forward of the whole row."""
    words = stock.get_input_embeddings()(torch.tensor(prompt + completion[:-1], dtype=torch.long))
    words = words if soft.embeddings is None else torch.cat([soft.embeddings.double(), words])
    cache, first = None, 0
    if soft.keys_values is not None:
        cache, first = DynamicCache(config=stock.config), soft.keys_values[0][0].shape[2]
        for layer, (key, value) in enumerate(soft.keys_values):
            cache.update(key.double(), value.double(), layer)
    total = first + len(words)
    logits = stock(
        inputs_embeds=words[None],
        attention_mask=torch.ones(1, total, dtype=torch.long),
        position_ids=torch.arange(first, total)[None],
        past_key_values=cache,
    ).logits[0]
    return logits[-len(completion) :]


def check_logprobs(stock, prompt, completion, temperature=1.0, soft=NO_SOFT_PROMPT):
    logp = (teacher_forced(stock, prompt, completion.ids, soft) / temperature).log_softmax(-1)
    want = logp.gather(1, torch.tensor(completion.ids)[:, None])[:, 0]
    assert completion.logprobs.dtype == torch.float32
    assert (completion.logprobs - want).abs().max() <= 1e-4  # 6.2e-6 seen in fp32


def same(a, b) -> None:
    assert [[c.ids for c in cs] for cs in a] == [[c.ids for c in cs] for cs in b]
    for x, y in zip(chain(*a), chain(*b), strict=True):
        assert (x.logprobs - y.logprobs).abs().max() <= 1e-5  # fp64 handed over as fp32: one unit in the last place
        assert x.stopped == y.stopped


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_greedy_equals_stock_generate(kind):
    model, stock = models(kind)
    got = sample(model, PROMPTS, 2, GREEDY)
    for prompt, completions in zip(PROMPTS, got, strict=True):
        fixed = {"max_new_tokens": 80, "do_sample": False, "pad_token_id": 0}
        want = stock.generate(torch.tensor([prompt]), **fixed)[0, len(prompt) :].tolist()
        for completion in completions:
            assert completion.ids == want
            assert not completion.stopped
            check_logprobs(stock, prompt, completion)


@pytest.mark.parametrize("soft", ["prompt", "prefix"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_soft_prompts(kind, soft):
    """Greedy behind a soft prompt: each token is the likeliest of a teacher-forced forward, also for an empty prompt."""
    model, stock = models(kind)
    learned = soft_prompt(soft, model)
    prompts = [*PROMPTS, []] if soft == "prompt" else PROMPTS
    got = sample(model, prompts, 1, Sampling(temperature=0, max_new_tokens=20), soft=learned)
    for prompt, (completion,) in zip(prompts, got, strict=True):
        logits = teacher_forced(stock, prompt, completion.ids, learned)
        assert logits.argmax(-1).tolist() == completion.ids
        check_logprobs(stock, prompt, completion, soft=learned)
    (bare,) = sample(model, PROMPTS[3:4], 1, Sampling(temperature=0, max_new_tokens=20))[0]
    assert (got[3][0].logprobs - bare.logprobs).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2"])
def test_a_prompt_computed_in_chunks(kind, monkeypatch):
    """Chunks shorter than the window, behind a prefix; several prompts per forward, and several forwards."""
    model, stock = models(kind, torch.float32)
    prefix = soft_prompt("prefix", model)
    monkeypatch.setattr(sampler_cache, "QUERY_ROWS", 5)
    monkeypatch.setattr(batcher, "PREFILL_TOKENS", 30)
    got = sample(model, PROMPTS, 1, Sampling(max_new_tokens=3), soft=prefix)
    for prompt, (completion,) in zip(PROMPTS, got, strict=True):
        check_logprobs(stock, prompt, completion, soft=prefix)


def test_a_learned_sink_takes_its_share():
    shape = CONFIGS["llama"]().to_dict()
    keep = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "num_hidden_layers",
    )
    config = GptOssConfig(
        **{k: shape[k] for k in keep}, head_dim=16, num_local_experts=2, num_experts_per_tok=1, sliding_window=8,
        layer_types=["sliding_attention", "full_attention"], max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    CONFIGS["gpt_oss"] = lambda: config
    try:
        model = tiny_model("gpt_oss")
    finally:
        del CONFIGS["gpt_oss"]
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks)
    model, stock = with_stock(model)
    stock.set_experts_implementation("eager")  # the grouped one has no fp64
    for prompt, (completion,) in zip(PROMPTS, sample(model, PROMPTS, 1, GREEDY), strict=True):
        check_logprobs(stock, prompt, completion)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_log_probs_are_those_of_the_whole_distribution(kind):
    """At the sampling temperature, before top-k, top-p and min_new_tokens."""
    model, stock = models(kind, torch.float32)
    how = Sampling(temperature=0.7, top_k=20, top_p=0.9, max_new_tokens=30, min_new_tokens=10, seed=3)
    for prompt, completions in zip(PROMPTS, sample(model, PROMPTS, 2, how, eos_ids=range(0, 380, 9)), strict=True):
        for completion in completions:
            check_logprobs(stock, prompt, completion, 0.7)


# -- the kernel of CUDA -----------------------------------------------------------------------------------------------


def reference_varlen(
    q, k, v, bounds_q, bounds_k, max_q, max_k, *, return_aux, scale, window_size, enable_gqa, seqused_k=None
):
    """What torch.nn.attention.varlen.varlen_attn computes, by hand: windows aligned bottom right, lse (H, T)."""
    assert return_aux.lse
    assert enable_gqa == (q.shape[1] != k.shape[1])
    assert bounds_q.dtype == bounds_k.dtype == torch.int32
    left, right = window_size
    outs, sums = [], []
    for i in range(len(bounds_q) - 1):
        n, count = int(bounds_q[i + 1] - bounds_q[i]), int(bounds_k[i + 1] - bounds_k[i])
        count = count if seqused_k is None else int(seqused_k[i])
        assert n <= max_q
        assert count <= max_k
        queries = q[bounds_q[i] : bounds_q[i + 1]].transpose(0, 1)
        keys, values = (x[bounds_k[i] : bounds_k[i] + count].transpose(0, 1) for x in (k, v))
        keys, values = (x.repeat_interleave(q.shape[1] // k.shape[1], 0) for x in (keys, values))
        behind = torch.arange(count - n, count)[:, None] - torch.arange(count)
        seen = (behind <= left if left >= 0 else True) & (
            behind >= -right if right >= 0 else torch.ones_like(behind) > 0
        )
        scores = (queries @ keys.mT * scale).masked_fill(~seen, -torch.inf)
        outs.append((scores.softmax(-1) @ values).transpose(0, 1))
        sums.append(scores.logsumexp(-1))
    assert bounds_q[-1] == len(q)
    assert bounds_k[-1] <= len(k)
    return torch.cat(outs), torch.cat(sums, 1)


@pytest.mark.parametrize("soft", ["none", "prefix"])
@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2"])
def test_the_calls_of_the_varlen_kernel(kind, soft, monkeypatch):
    """The CUDA path, with the flash kernel replaced by its definition."""
    model, _ = models(kind)
    how = {"eos_ids": range(0, 380, 12), "soft": soft_prompt(soft, model)}
    want = sample(model, PROMPTS, 3, Sampling(max_new_tokens=80, max_rows=5), **how)
    calls = []
    counted = lambda *args, **kw: calls.append(1) or reference_varlen(*args, **kw)  # noqa: E731
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", counted)
    monkeypatch.setattr(blockwise, "varlen_applies", lambda *args: True)
    same(want, sample(model, PROMPTS, 3, Sampling(max_new_tokens=80, max_rows=5), **how))
    assert len(calls) > 50


@pytest.mark.parametrize("broken", ["", "lse", "used", "window", "no window", "prompt", "many", "old", "refuses"])
def test_a_wrong_varlen_kernel_is_not_used(broken, monkeypatch, capsys):
    """One line is logged. The check runs against the definition of the kernel."""

    def kernel(*args, seqused_k=None, return_aux, window_size, enable_gqa, scale):
        if broken == "refuses":
            raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.")
        used, window = seqused_k, window_size
        if broken == "used" and used is not None:
            used = used + 1
        if broken == "window" and window[0] > 0:
            window = (window[0] + 1, 0)
        if broken == "no window":
            window = (-1, window[1])
        options = {"return_aux": return_aux, "enable_gqa": enable_gqa, "scale": scale}
        if broken == "prompt" and used is None:  # samples see the last key of their prompt only
            window = (0, window[1])
        out, lse = reference_varlen(*args, seqused_k=used, window_size=window, **options)
        if broken == "many" and args[6] > 256:  # keys of the longest sequence
            out = out * 0.9
        return out, lse.T if broken == "lse" else lse

    def old_kernel(q, k, v, bounds_q, bounds_k, max_q, max_k, is_causal=False):
        raise AssertionError("must not be called")

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", old_kernel if broken == "old" else kernel)
    blockwise._varlen_is_right.cache_clear()
    for _ in range(2):
        assert blockwise._varlen_is_right(torch.device("cpu"), torch.float32, 4, 2, 16) == (not broken)
    blockwise._varlen_is_right.cache_clear()
    assert capsys.readouterr().err.count("\n") == bool(broken)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2"])
def test_cuda_gives_the_log_probs_of_the_cpu(kind):
    """bf16 on CUDA, teacher-forced in fp64 on the CPU with the same rounded weights."""
    model = tiny_model(kind, num_hidden_layers=1).bfloat16()
    model, stock = with_stock(model)
    got = sample(model.cuda(), PROMPTS, 3, Sampling(max_new_tokens=40, max_rows=5), eos_ids=range(0, 380, 12))
    for prompt, completions in zip(PROMPTS, got, strict=True):
        for completion in completions:
            logp = teacher_forced(stock, prompt, completion.ids).log_softmax(-1)
            want = logp.gather(1, torch.tensor(completion.ids)[:, None])[:, 0]
            # 8 bits of mantissa through one layer and a head of large weights.
            assert (completion.logprobs - want).abs().mean() <= 0.05
