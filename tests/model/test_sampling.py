"""The sampler against stock transformers, one prompt at a time, in fp32 (log-probs against fp64)."""

import copy
from itertools import chain

import pytest
import torch
from transformers import DynamicCache, GptOssConfig

from lowalign.config import Sampling
from lowalign.errors import UserError
from lowalign.model import attention, blockwise, rollout, sampling
from lowalign.model.rollout_layout import Tokens
from lowalign.model.rows import row_sample
from lowalign.model.sampling import sample
from tests.model.test_pick import truncated
from tests.tiny import CONFIGS, tiny_model

ARCHITECTURES = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "phi3", "gpt2"]
GREEDY = Sampling(temperature=0, max_new_tokens=80)  # past the first key buffer, and ten windows long


def draw(n: int, seed: int) -> list[int]:
    return torch.randint(4, 380, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


PROMPTS = [draw(14, 0), draw(5, 1), draw(20, 2), draw(1, 3)]


@pytest.fixture(scope="module")
def models():
    """Each architecture twice: with our attention in fp32, and as it is in fp64."""
    made = {}

    def get(kind):
        if kind not in made:
            model = tiny_model(kind)
            model.generation_config.eos_token_id = None
            stock = copy.deepcopy(model).double()
            stock.set_attn_implementation("eager")
            model.set_attn_implementation(attention.NAME)
            made[kind] = model, stock
        return made[kind]

    return get


def soft_prompt(kind, model):
    """(virtual, prefix) of four tokens; large enough to matter."""
    torch.manual_seed(7)
    config = model.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    if kind == "prompt":
        return torch.randn(4, config.hidden_size), None
    if kind == "prefix":
        return None, [
            (torch.randn(1, heads, 4, size), torch.randn(1, heads, 4, size)) for _ in range(config.num_hidden_layers)
        ]
    return None, None


@torch.no_grad()
def teacher_forced(stock, prompt, completion, virtual=None, prefix=None):
    """(len(completion), V) fp64 logits from one ordinary forward of the whole row."""
    words = stock.get_input_embeddings()(torch.tensor(prompt + completion[:-1], dtype=torch.long))
    words = words if virtual is None else torch.cat([virtual.double(), words])
    cache, first = None, 0
    if prefix is not None:
        cache, first = DynamicCache(config=stock.config), prefix[0][0].shape[2]
        for layer, (key, value) in enumerate(prefix):
            cache.update(key.double(), value.double(), layer)
    total = first + len(words)
    logits = stock(
        inputs_embeds=words[None],
        attention_mask=torch.ones(1, total, dtype=torch.long),
        position_ids=torch.arange(first, total)[None],
        past_key_values=cache,
    ).logits[0]
    return logits[-len(completion) :]


def check_logprobs(stock, prompt, completion, temperature=1.0, **soft):
    logp = (teacher_forced(stock, prompt, completion.ids, **soft) / temperature).log_softmax(-1)
    want = logp.gather(1, torch.tensor(completion.ids)[:, None])[:, 0]
    assert completion.logprobs.dtype == torch.float32
    assert (completion.logprobs - want).abs().max() <= 1e-5


def same(a, b) -> None:
    assert [[c.ids for c in cs] for cs in a] == [[c.ids for c in cs] for cs in b]
    for x, y in zip(chain(*a), chain(*b), strict=True):
        assert (x.logprobs - y.logprobs).abs().max() <= 1e-5
        assert x.stopped == y.stopped


# -- exact against stock ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_greedy_equals_stock_generate(kind, models):
    model, stock = models(kind)
    got = sample(model, PROMPTS, 2, GREEDY, eos_ids=())
    for prompt, completions in zip(PROMPTS, got, strict=True):
        fixed = {"max_new_tokens": 80, "do_sample": False, "pad_token_id": 0}
        want = stock.generate(torch.tensor([prompt]), **fixed)[0, len(prompt) :].tolist()
        for completion in completions:
            assert completion.ids == want
            assert not completion.stopped
            check_logprobs(stock, prompt, completion)


@pytest.mark.parametrize("soft", ["prompt", "prefix"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_soft_prompts(kind, soft, models):
    """Greedy with a soft prompt: every token is the likeliest of a teacher-forced forward, also where no prompt follows."""
    model, stock = models(kind)
    virtual, prefix = soft_prompt(soft, model)
    prompts = [*PROMPTS, []] if soft == "prompt" else PROMPTS
    got = sample(
        model, prompts, 1, Sampling(temperature=0, max_new_tokens=20), eos_ids=(), virtual=virtual, prefix=prefix
    )
    for prompt, (completion,) in zip(prompts, got, strict=True):
        logits = teacher_forced(stock, prompt, completion.ids, virtual, prefix)
        assert logits.argmax(-1).tolist() == completion.ids
        check_logprobs(stock, prompt, completion, virtual=virtual, prefix=prefix)
    (bare,) = sample(model, PROMPTS[3:4], 1, Sampling(temperature=0, max_new_tokens=20), eos_ids=())[0]
    assert (got[3][0].logprobs - bare.logprobs).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2"])
def test_a_prompt_computed_in_chunks(kind, models, monkeypatch):
    """Chunks shorter than the window, behind a prefix, several prompts to a forward, and to several."""
    model, stock = models(kind)
    _, prefix = soft_prompt("prefix", model)
    monkeypatch.setattr(rollout, "CHUNK", 5)
    monkeypatch.setattr(sampling, "PREFILL_TOKENS", 30)
    got = sample(model, PROMPTS, 1, Sampling(max_new_tokens=3), eos_ids=(), prefix=prefix)
    for prompt, (completion,) in zip(PROMPTS, got, strict=True):
        check_logprobs(stock, prompt, completion, prefix=prefix)


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
    stock = copy.deepcopy(model).double()
    stock.set_attn_implementation("eager")
    stock.set_experts_implementation("eager")  # the grouped one has no fp64
    model.set_attn_implementation(attention.NAME)
    for prompt, (completion,) in zip(PROMPTS, sample(model, PROMPTS, 1, GREEDY, eos_ids=()), strict=True):
        check_logprobs(stock, prompt, completion)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_log_probs_are_those_of_the_whole_distribution(kind, models):
    """At the sampling temperature, whatever top-k, top-p and min_new_tokens leave of it."""
    model, stock = models(kind)
    how = Sampling(temperature=0.7, top_k=20, top_p=0.9, max_new_tokens=30, min_new_tokens=10, seed=3)
    for prompt, completions in zip(PROMPTS, sample(model, PROMPTS, 2, how, eos_ids=range(0, 380, 9)), strict=True):
        for completion in completions:
            check_logprobs(stock, prompt, completion, 0.7)


# -- nothing else in the batch matters --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind,soft", [("llama", "prompt"), ("llama", "prefix"), ("mistral", "prefix"), ("gemma2", "none")]
)
def test_samples_do_not_depend_on_what_else_is_sampled(kind, soft, models):
    """Alone or together, in any order, few rows at a time or many, with ends at different times, and whatever n."""
    model, _ = models(kind)
    virtual, prefix = soft_prompt(soft, model)
    eos = list(range(0, 380, 12))

    def run(prompts, n, seeds, **options):
        how = Sampling(max_new_tokens=30, seed=1, **options)
        return sample(model, prompts, n, how, eos_ids=eos, virtual=virtual, prefix=prefix, seeds=seeds)

    together = run(PROMPTS, 4, [5, 6, 7, 8])
    lengths = {len(c.ids) for cs in together for c in cs}
    assert len(lengths) > 5
    same(together, [run([p], 4, [s])[0] for p, s in zip(PROMPTS, [5, 6, 7, 8], strict=True)])
    same(together, run(PROMPTS[::-1], 4, [8, 7, 6, 5])[::-1])
    for options in ({"max_rows": 1}, {"max_rows": 3}, {"max_rows": 7}, {"batch_tokens": 1}, {"batch_tokens": 150}):
        same(together, run(PROMPTS, 4, [5, 6, 7, 8], **options))
    same([cs[:2] for cs in together], run(PROMPTS, 2, [5, 6, 7, 8]))
    same(together, [cs[:4] for cs in run(PROMPTS, 6, [5, 6, 7, 8], max_rows=5)])


def test_seeds(models):
    model, _ = models("llama")
    how = Sampling(max_new_tokens=12)
    ids = lambda *args, **kw: [[c.ids for c in cs] for cs in sample(model, *args, eos_ids=(), **kw)]  # noqa: E731
    a, b = ids([PROMPTS[0]] * 2, 2, how)
    assert len({tuple(x) for x in a + b}) == 4  # the same prompt twice has samples of its own each time
    assert ids([PROMPTS[0]] * 2, 2, how, seeds=[0, 0]) == [a, a]
    assert ids([PROMPTS[0]], 2, Sampling(max_new_tokens=12, seed=1)) != [a]
    assert ids([PROMPTS[0]], 2, Sampling(max_new_tokens=5)) == [[x[:5] for x in a]]


def test_each_token_is_computed_once(models):
    """A prompt once, however many samples hang on it and however they are admitted; a sample's last token never."""
    model, _ = models("llama")
    seen = []
    hook = model.model.register_forward_pre_hook(
        lambda m, a, k: seen.append(k["position_ids"].numel()), with_kwargs=True
    )
    for max_rows in (2, 5, 64):
        seen.clear()
        how = Sampling(max_new_tokens=20, max_rows=max_rows)
        got = sample(model, PROMPTS, 4, how, eos_ids=range(0, 380, 12))
        assert sum(seen) == sum(map(len, PROMPTS)) + sum(len(c.ids) - 1 for cs in got for c in cs)
        assert max(seen[1:]) <= max(max_rows, max(map(len, PROMPTS)))
    hook.remove()


@pytest.mark.parametrize("budget,rows", [(150, 64), (400, 12)])
def test_keys_and_values_stay_within_the_budget(budget, rows, models):
    """Prompts as long as a sample of theirs is live or waits, samples at their longest; and no more rows than asked for."""
    model, _ = models("llama")
    held = []

    def look(module, args, kwargs):
        state = kwargs["rollout"]
        tokens = sum(len(key) for key, _ in state._prompts.get(0, {}).values())
        live = len(state.now.lengths) if isinstance(state.now, Tokens) else 0
        assert live <= rows
        held.append(tokens + 30 * live)

    hook = model.model.register_forward_pre_hook(look, with_kwargs=True)
    how = Sampling(max_new_tokens=30, batch_tokens=budget, max_rows=rows)
    sample(model, PROMPTS * 12, 4, how, eos_ids=range(0, 380, 12))
    hook.remove()
    assert budget / 2 < max(held[10:]) <= budget


# -- the distribution -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.6}, {"top_k": 4}, {"top_p": 0.7}, {"top_k": 6, "top_p": 0.8}]
)
def test_draws_follow_the_exact_probabilities(options):
    """Pairs of tokens of a 12-word model, chi-square over all pairs of probability above 0; none outside them."""
    model = tiny_model("llama", vocab_size=12, bos_token_id=None, pad_token_id=None, eos_token_id=None)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.5)
    stock = copy.deepcopy(model).double()
    stock.set_attn_implementation("eager")
    model.set_attn_implementation(attention.NAME)
    how = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | options
    n, prompt = 4000, [3, 1, 4, 1, 5]
    logits = torch.cat([teacher_forced(stock, prompt, [t, 0])[1:] for t in range(12)])
    first = truncated(teacher_forced(stock, prompt, [0])[0], **how)
    want = n * first[:, None] * torch.stack([truncated(row, **how) for row in logits])
    (got,) = sample(
        model, [prompt], n, Sampling(max_new_tokens=2, max_rows=1000, batch_tokens=10**6, **how), eos_ids=()
    )
    counts = torch.zeros(12, 12, dtype=torch.float64)
    for completion in got:
        counts[tuple(completion.ids)] += 1
    assert not counts[want == 0].any()
    # Cells that expect fewer than 5 are one cell.
    cells = want >= 5
    observed = torch.cat([counts[cells], counts[~cells].sum()[None]])
    expected = torch.cat([want[cells], want[~cells].sum()[None]])
    observed, expected = observed[expected > 0], expected[expected > 0]
    statistic, freedom = ((observed - expected) ** 2 / expected).sum(), len(expected) - 1
    assert freedom >= 8
    assert statistic < freedom + 3 * (2 * freedom) ** 0.5


# -- ends -------------------------------------------------------------------------------------------------------------


def test_any_eos_ends_a_completion(models):
    model, _ = models("qwen2")
    free = sample(model, PROMPTS, 3, Sampling(max_new_tokens=40), eos_ids=())
    eos = {c.ids[k] for cs in free for k, c in enumerate(cs, 3)}
    ended = sample(model, PROMPTS, 3, Sampling(max_new_tokens=40), eos_ids=sorted(eos))
    assert any(c.stopped for cs in ended for c in cs)
    for whole, cut in zip(chain(*free), chain(*ended), strict=True):
        end = next((i + 1 for i, token in enumerate(whole.ids) if token in eos), 40)
        assert cut.ids == whole.ids[:end]
        assert len(cut.logprobs) == end
        assert cut.stopped == (cut.ids[-1] in eos)


def test_min_new_tokens_bars_every_eos_until_then(models):
    """Before that the likeliest other token is taken; after it the eos ends the completion as ever."""
    model, stock = models("llama")
    (free,) = sample(model, PROMPTS[:1], 1, GREEDY, eos_ids=())[0]
    eos = sorted({free.ids[0], free.ids[2], free.ids[5]})
    how = Sampling(temperature=0, max_new_tokens=80, min_new_tokens=9)
    (got,) = sample(model, PROMPTS[:1], 1, how, eos_ids=eos)[0]
    logits = teacher_forced(stock, PROMPTS[0], got.ids)
    logits[:9, eos] = -torch.inf
    assert logits.argmax(-1).tolist() == got.ids
    check_logprobs(stock, PROMPTS[0], got)
    assert not set(got.ids[:9]) & set(eos)
    assert got.stopped == (got.ids[-1] in eos)
    assert not set(got.ids[:-1]) & set(eos)
    one = sample(model, PROMPTS[:1], 1, Sampling(temperature=0, max_new_tokens=80), eos_ids=eos)[0][0]
    assert (one.ids, one.stopped) == (free.ids[:1], True)


def test_a_completion_ends_with_the_positions_of_the_model():
    model = tiny_model("llama", max_position_embeddings=24)
    model.set_attn_implementation(attention.NAME)
    got = sample(model, PROMPTS, 1, Sampling(max_new_tokens=16), eos_ids=())
    assert [len(c.ids) for (c,) in got] == [10, 16, 4, 16]
    with pytest.raises(UserError, match="prompt 1 takes 24 of the model's 24 positions"):
        sample(model, [[5], [5] * 24], 1, Sampling(), eos_ids=())


def test_longrope_keeps_short_and_long_apart():
    """Beside a long prompt a short one keeps its factors; on either side of the switch log-probs are the model's own.

    Past the switch a sample does not see the others' positions: it is what a row of its own with a cache gives.
    """
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0 + i for i in range(8)]}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 32, **factors}
    model = tiny_model("phi3", rope_parameters=rope, original_max_position_embeddings=32)
    stock = copy.deepcopy(model).double()
    stock.set_attn_implementation("eager")
    model.set_attn_implementation(attention.NAME)
    prompts = [draw(14, 0), draw(40, 1), draw(5, 2), draw(33, 3)]
    got = sample(model, prompts, 2, Sampling(max_new_tokens=12), eos_ids=())
    for prompt, completions in zip(prompts, got, strict=True):
        for completion in completions:
            check_logprobs(stock, prompt, completion)
    how = {"eos_ids": range(0, 380, 12), "virtual": None, "prefix": None, "seeds": None}
    crossing = [model, [draw(26, 4)], 8, Sampling(max_new_tokens=20)]
    same(sample(*crossing, **how), row_sample(*crossing, **how))


# -- what is refused --------------------------------------------------------------------------------------------------


def test_refusals(models):
    model, stock = models("llama")
    how = Sampling(max_new_tokens=3)
    assert sample(model, [], 2, how, eos_ids=()) == []
    with pytest.raises(UserError, match="prompt 1 is empty"):
        sample(model, [[5], []], 1, how, eos_ids=())
    with pytest.raises(ValueError, match="seeds one per prompt"):
        sample(model, [[5]], 1, how, eos_ids=(), seeds=[1, 2])
    with pytest.raises(RuntimeError, match='attention "lowalign"'):
        sample(stock, [[5]], 1, how, eos_ids=())
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.model.norm.weight[0] = torch.nan
    with pytest.raises(UserError, match="logits for prompt 0 are not finite"):
        sample(broken, [[5]], 1, how, eos_ids=())


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0},
        {"min_new_tokens": 300},
        {"temperature": -0.1},
        {"top_k": -1},
        {"top_p": 0},
        {"max_rows": 0},
    ],
)
def test_settings_out_of_range(wrong):
    with pytest.raises(UserError, match=f"^{next(iter(wrong))} is "):
        Sampling(**wrong)


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
def test_the_calls_of_the_ragged_kernel(kind, soft, models, monkeypatch):
    """The path that CUDA takes, with the flash kernel replaced by its definition."""
    model, _ = models(kind)
    _, prefix = soft_prompt(soft, model)
    how = {"eos_ids": range(0, 380, 12), "prefix": prefix}
    want = sample(model, PROMPTS, 3, Sampling(max_new_tokens=80, max_rows=5), **how)
    calls = []
    counted = lambda *args, **kw: calls.append(1) or reference_varlen(*args, **kw)  # noqa: E731
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", counted)
    monkeypatch.setattr(blockwise, "varlen_applies", lambda *args: True)
    same(want, sample(model, PROMPTS, 3, Sampling(max_new_tokens=80, max_rows=5), **how))
    assert len(calls) > 50


@pytest.mark.parametrize("broken", ["", "lse", "used", "window", "old", "refuses"])
def test_a_ragged_kernel_that_is_not_as_expected_is_left_alone(broken, monkeypatch, capsys):
    """One line says so; the check itself is made against the definition."""

    def kernel(*args, seqused_k=None, return_aux, window_size, enable_gqa, scale):
        if broken == "refuses":
            raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.")
        used, window = seqused_k, window_size
        if broken == "used" and used is not None:
            used = used + 1
        if broken == "window" and window[0] > 0:
            window = (window[0] + 1, 0)
        options = {"return_aux": return_aux, "enable_gqa": enable_gqa, "scale": scale}
        out, lse = reference_varlen(*args, seqused_k=used, window_size=window, **options)
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
def test_cuda_gives_the_log_probs_of_the_cpu(kind, models):
    """bf16 on CUDA, teacher-forced in fp64 on the CPU with the same rounded weights."""
    model = tiny_model(kind, num_hidden_layers=1).bfloat16()
    stock = copy.deepcopy(model).double()
    stock.set_attn_implementation("eager")
    model.set_attn_implementation(attention.NAME)
    got = sample(model.cuda(), PROMPTS, 3, Sampling(max_new_tokens=40, max_rows=5), eos_ids=range(0, 380, 12))
    for prompt, completions in zip(PROMPTS, got, strict=True):
        for completion in completions:
            logp = teacher_forced(stock, prompt, completion.ids).log_softmax(-1)
            want = logp.gather(1, torch.tensor(completion.ids)[:, None])[:, 0]
            # 8 bits of mantissa through one layer and a head of large weights.
            assert (completion.logprobs - want).abs().mean() <= 0.05
