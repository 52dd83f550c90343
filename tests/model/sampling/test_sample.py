"""Samples do not depend on the batch, follow the exact distribution, and end where they should."""

import contextlib
import copy
import re
import sys
from itertools import chain

import pytest
import torch
from tqdm import tqdm

from lowalign.config.sections import Sampling
from lowalign.errors import UserError
from lowalign.model.attention.sampler_layout import TokenBatch
from lowalign.model.forward.unpacked import row_sample
from lowalign.model.sampling.batcher import SampledModel, moves
from lowalign.model.sampling.sample import sample_batched
from tests.model.attention.test_sampler_cache import (
    GREEDY,
    PROMPTS,
    check_logprobs,
    draw,
    models,
    same,
    sample,
    soft_prompt,
    teacher_forced,
    with_stock,
)
from tests.model.sampling.test_draw import truncated
from tests.tiny import tiny_model

# -- independence of the batch ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind,soft", [("llama", "prompt"), ("llama", "prefix"), ("mistral", "prefix"), ("gemma2", "none")]
)
def test_samples_do_not_depend_on_what_else_is_sampled(kind, soft):
    """Alone or together, in any order, few or many rows at a time, with different ends, for any n."""
    model, _ = models(kind)
    learned = soft_prompt(soft, model)
    eos = list(range(0, 380, 12))

    def run(prompts, n, seeds, **options):
        how = Sampling(max_new_tokens=30, seed=1, **options)
        return sample(model, prompts, n, how, eos_ids=eos, soft=learned, seeds=seeds)

    together = run(PROMPTS, 4, [5, 6, 7, 8])
    lengths = {len(c.ids) for cs in together for c in cs}
    assert len(lengths) > 5
    same(together, [run([p], 4, [s])[0] for p, s in zip(PROMPTS, [5, 6, 7, 8], strict=True)])
    same(together, run(PROMPTS[::-1], 4, [8, 7, 6, 5])[::-1])
    for options in ({"max_rows": 1}, {"max_rows": 3}, {"max_rows": 7}, {"batch_tokens": 1}, {"batch_tokens": 150}):
        same(together, run(PROMPTS, 4, [5, 6, 7, 8], **options))
    same([cs[:2] for cs in together], run(PROMPTS, 2, [5, 6, 7, 8]))
    same(together, [cs[:4] for cs in run(PROMPTS, 6, [5, 6, 7, 8], max_rows=5)])


@contextlib.contextmanager
def small_device(model, rows: int, after: int = 0):
    """From the `after`-th forward on, more than `rows` sampled tokens do not fit in one."""
    calls = []

    def look(module, args, kwargs) -> None:
        calls.append(1)
        batch = kwargs["sampler_cache"].batch
        if len(calls) >= after and isinstance(batch, TokenBatch) and len(batch.prompts) > rows:
            raise torch.OutOfMemoryError("tried to allocate 20.00 GiB")

    hook = model.model.register_forward_pre_hook(look, with_kwargs=True)
    yield
    hook.remove()


@pytest.mark.parametrize("soft", ["none", "prompt", "prefix"])
@pytest.mark.parametrize("after", [0, 9])
def test_out_of_memory_costs_time_and_changes_no_sample(soft, after, capsys):
    """At the first token, or later: finished samples are kept, and a prompt starts again at any of its samples."""
    model, _ = models("llama")
    how = {"eos_ids": range(0, 380, 12), "soft": soft_prompt(soft, model)}
    run = lambda: sample(model, PROMPTS, 5, Sampling(max_new_tokens=30, seed=1), **how)  # noqa: E731
    want = run()
    with small_device(model, 3, after):
        got = run()
    same(want, got)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("out of memory while sampling")]
    assert "at most 10 at a time" in lines[0] if after == 0 else lines
    assert int(re.search(r"at most (\d+)", lines[-1])[1]) in (2, 3)


@pytest.mark.parametrize("rows", [0, 1])
def test_one_completion_has_to_fit(rows):
    model, _ = models("llama")
    run = lambda: sample(model, PROMPTS[:1], 2, Sampling(max_new_tokens=9))  # noqa: E731
    want = run()
    with small_device(model, rows):
        if rows:
            same(want, run())
            return
        with pytest.raises(
            UserError, match=rf"which may take {len(PROMPTS[0]) + 9} tokens with its prompt.* 20\.00 GiB"
        ):
            run()


def test_check_can_abort_between_forwards():
    model, _ = models("llama")
    calls = []

    def check() -> None:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample_batched(SampledModel(model, check=check), PROMPTS, 2, Sampling(max_new_tokens=30))


def test_a_bar_counts_tokens_before_the_first_completion_is_done(monkeypatch, capsys):
    model, _ = models("llama")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("lowalign.model.sampling.batcher.BAR_DELAY", 0)
    options = {"mininterval": 0, "miniters": 0, "ncols": 80}  # each state is written
    monkeypatch.setattr("lowalign.model.sampling.batcher.progress", lambda _, **more: tqdm(**options | more))
    drawn = sample(model, PROMPTS, 2, Sampling(max_new_tokens=6), eos_ids=[2])
    states = [state for state in capsys.readouterr().err.split("\r") if "tokens" in state]
    rows = 2 * len(PROMPTS)
    assert f" 0/{rows} " in states[0] and f"{rows + rows:,} tokens" in states[0]  # the first forward has two of each
    assert f"{sum(len(c.ids) for cs in drawn for c in cs):,} tokens" in states[-1]


def test_seeds():
    model, _ = models("llama")
    how = Sampling(max_new_tokens=12)
    ids = lambda *args, **kw: [[c.ids for c in cs] for cs in sample(model, *args, **kw)]  # noqa: E731
    a, b = ids([PROMPTS[0]] * 2, 2, how)
    assert len({tuple(x) for x in a + b}) == 4  # the same prompt twice gets different samples
    assert ids([PROMPTS[0]] * 2, 2, how, seeds=[0, 0]) == [a, a]
    assert ids([PROMPTS[0]], 2, Sampling(max_new_tokens=12, seed=1)) != [a]
    assert ids([PROMPTS[0]], 2, Sampling(max_new_tokens=5)) == [[x[:5] for x in a]]


def test_each_token_is_computed_once():
    """A prompt once, for any number of samples in any order; the last token of a sample never."""
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
def test_keys_and_values_stay_within_the_budget(budget, rows):
    """Counted: prompts with a live or waiting sample, and samples at their longest. Never more rows than max_rows."""
    model, _ = models("llama")
    tokens = []

    def look(module, args, kwargs):
        cache = kwargs["sampler_cache"]
        prompt_tokens = sum(len(key) for key, _ in cache._prompts.get(0, {}).values())
        live = len(cache.batch.prompts) if isinstance(cache.batch, TokenBatch) else 0
        assert live <= rows
        own = cache._own.get(0)
        assert own is None or own[0].shape[0] * own[0].shape[1] <= budget  # slots times room
        tokens.append(prompt_tokens + 30 * live)

    hook = model.model.register_forward_pre_hook(look, with_kwargs=True)
    how = Sampling(max_new_tokens=30, batch_tokens=budget, max_rows=rows)
    sample(model, PROMPTS * 12, 4, how, eos_ids=range(0, 380, 12))
    hook.remove()
    assert budget / 2 < max(tokens[10:]) <= budget


def test_rows_of_a_prompt_stay_side_by_side():
    """Whatever rows finish: the live ones fill the first slots, each is kept once, and few are copied."""
    random = torch.Generator().manual_seed(0)
    for _ in range(200):
        sizes = torch.randint(1, 5, (6,), generator=random).tolist()
        prompts = [p for p, size in enumerate(sizes) for _ in range(size)]
        finished = (torch.rand(len(prompts), generator=random) < 0.4).tolist()
        sources, targets = moves(prompts, finished)
        slots: list = list(range(len(prompts)))
        for source, target in zip(sources, targets, strict=True):
            slots[target] = source
        live = [r for r, end in enumerate(finished) if not end]
        kept = slots[: len(live)]
        assert sorted(kept) == live
        assert [prompts[r] for r in kept] == [prompts[r] for r in live]
        assert not set(sources) & {slot for slot, row in enumerate(kept) if slot == row}
    assert moves([0, 0, 0, 1, 1], [False, True, False, False, False]) == ([2, 4], [1, 2])


# -- the distribution -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.6}, {"top_k": 4}, {"top_p": 0.7}, {"top_k": 6, "top_p": 0.8}]
)
def test_draws_follow_the_exact_probabilities(options):
    """Pairs of tokens of a 12-word model, chi-square over all pairs of probability above 0; none outside them."""
    model = tiny_model("llama", vocab_size=12, bos_token_id=None, pad_token_id=None, eos_token_id=None)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.5)
    model, stock = with_stock(model)
    how = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | options
    n, prompt = 4000, [3, 1, 4, 1, 5]
    logits = torch.cat([teacher_forced(stock, prompt, [t, 0])[1:] for t in range(12)])
    first = truncated(teacher_forced(stock, prompt, [0])[0], **how)
    want = n * first[:, None] * torch.stack([truncated(row, **how) for row in logits])
    (got,) = sample(model, [prompt], n, Sampling(max_new_tokens=2, max_rows=1000, batch_tokens=10**6, **how))
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


def test_any_eos_ends_a_completion():
    model, _ = models("qwen2")
    free = sample(model, PROMPTS, 3, Sampling(max_new_tokens=40))
    eos = {c.ids[k] for cs in free for k, c in enumerate(cs, 3)}
    ended = sample(model, PROMPTS, 3, Sampling(max_new_tokens=40), eos_ids=sorted(eos))
    assert any(c.stopped for cs in ended for c in cs)
    for whole, cut in zip(chain(*free), chain(*ended), strict=True):
        end = next((i + 1 for i, token in enumerate(whole.ids) if token in eos), 40)
        assert cut.ids == whole.ids[:end]
        assert len(cut.logprobs) == end
        assert cut.stopped == (cut.ids[-1] in eos)


def test_min_new_tokens_bans_every_eos_until_then():
    """Before that the likeliest other token is taken; after it an eos ends the completion."""
    model, stock = models("llama")
    (free,) = sample(model, PROMPTS[:1], 1, GREEDY)[0]
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
    model, _ = with_stock(tiny_model("llama", max_position_embeddings=24))
    got = sample(model, PROMPTS, 1, Sampling(max_new_tokens=16))
    assert [len(c.ids) for (c,) in got] == [10, 16, 4, 16]
    with pytest.raises(UserError, match="prompt 1 takes 24 of the model's 24 positions"):
        sample(model, [[5], [5] * 24], 1, Sampling())


def test_longrope_keeps_short_and_long_apart():
    """A short prompt beside a long one keeps its factors; on both sides of the switch log-probs are the model's own.

    Past the switch a sample does not depend on the positions of others: it equals a single row with a cache.
    """
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0 + i for i in range(8)]}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 32, **factors}
    model, stock = with_stock(tiny_model("phi3", rope_parameters=rope, original_max_position_embeddings=32).double())
    prompts = [draw(14, 0), draw(40, 1), draw(5, 2), draw(33, 3)]
    got = sample(model, prompts, 2, Sampling(max_new_tokens=12))
    for prompt, completions in zip(prompts, got, strict=True):
        for completion in completions:
            check_logprobs(stock, prompt, completion)
    crossing = [SampledModel(model, range(0, 380, 12)), [draw(26, 4)], 8, Sampling(max_new_tokens=20)]
    same(sample_batched(*crossing), row_sample(*crossing))


# -- errors -----------------------------------------------------------------------------------------------------------


def test_refusals():
    model, stock = models("llama")
    how = Sampling(max_new_tokens=3)
    assert sample(model, [], 2, how) == []
    with pytest.raises(UserError, match="prompt 1 is empty"):
        sample(model, [[5], []], 1, how)
    with pytest.raises(ValueError, match="seeds one per prompt"):
        sample(model, [[5]], 1, how, seeds=[1, 2])
    with pytest.raises(RuntimeError, match='attention "lowalign"'):
        sample(stock, [[5]], 1, how)
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.model.norm.weight[0] = torch.nan
    with pytest.raises(UserError, match="logits for prompt 0 are not finite"):
        sample(broken, [[5]], 1, how)


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
    flag = next(iter(wrong)).replace("_", "-")
    with pytest.raises(UserError, match=f"^--sampling.{flag} is "):
        Sampling(**wrong)
