"""The self-test of the attention that trains: it fails for each fault of a kernel, and what is computed then is right."""

import pytest
import torch

from lowalign.data.pack import Segment
from lowalign.model.attention import packed
from lowalign.model.attention.blockwise import LayerAttention
from lowalign.model.attention.packed import Layout, check_attention, packed_attention
from lowalign.model.attention.self_test import CASES, TOLERANCE, attention_error, sees
from lowalign.model.attention.soft_prompt import SoftPrompt
from lowalign.model.base.base import Base
from tests.model.forward.test_packed import reference_varlen
from tests.tiny import CONFIGS, tiny_folder

CPU = torch.device("cpu")
FAULTS = ("window", "edge", "parents", "prefix", "groups", "many keys", "backward", "nan", "refuses")


class _Scaled(torch.autograd.Function):
    """The identity, whose gradient is a tenth too large."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return 1.1 * grad


def kernel(fault):
    """The definition of the flash kernel, with a fault."""

    def call(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa=False):
        if fault == "refuses":
            raise RuntimeError("no kernel image is available\nfor this device")
        if fault == "window":
            window_size = (-1, 0)
        if fault == "edge" and window_size[0] > 0:
            window_size = (window_size[0] + 1, 0)
        if fault in ("parents", "prefix"):  # sequences lose their first keys
            lost = cu_k.diff() - cu_q.diff() if fault == "parents" else (cu_k.diff() > cu_q.diff()) * 6
            keep = torch.cat([torch.arange(a + n, b) for a, b, n in zip(cu_k, cu_k[1:], lost, strict=False)])
            k, v, cu_k = k[keep], v[keep], cu_k - torch.nn.functional.pad(lost.cumsum(0), (1, 0)).int()
        if fault == "groups" and enable_gqa:
            k, v = (x.repeat(1, q.shape[1] // k.shape[1], 1) for x in (k, v))
            enable_gqa = False
        if fault == "backward":
            k = _Scaled.apply(k)
        out = reference_varlen(q, k, v, cu_q, cu_k, max_q, max_k, scale=scale, window_size=window_size, enable_gqa=enable_gqa)  # fmt: skip
        if fault == "many keys" and max_k > 256:
            out = out * 0.9
        return out * torch.nan if fault == "nan" else out

    return call


@pytest.fixture
def card(monkeypatch):
    """-> set the fault of a kernel; tensors on the CPU count as those of a card."""

    def use(fault):
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel(fault))
        monkeypatch.setattr(packed, "device_type", lambda _: "cuda")

    for cached in (packed._why_wrong, packed._log_slow_path):
        cached.cache_clear()
    yield use
    for cached in (packed._why_wrong, packed._log_slow_path):
        cached.cache_clear()


def by_hand(query, key, value, segments, prefix, window):
    """Each token by itself, from the words of Layout."""
    starts, outs = [sum(s.length for s in segments[:i]) for i in range(len(segments))], []
    for segment, start in zip(segments, starts, strict=True):
        for i in range(segment.length):
            keys = list(range(prefix))
            if segment.parent is not None:
                at = prefix + starts[segment.parent]
                keys += range(at, at + segments[segment.parent].length)
            keys += range(prefix + start, prefix + start + i + 1)
            keys = keys[-window:] if window else keys
            for_heads = (x[0, :, keys].repeat_interleave(query.shape[1] // key.shape[1], 0) for x in (key, value))
            k, v = for_heads
            scores = torch.einsum("hd,hkd->hk", query[0, :, start + i], k) * query.shape[-1] ** -0.5
            outs.append(torch.einsum("hk,hkd->hd", scores.softmax(-1), v))
    return torch.stack(outs)[None]


@pytest.mark.parametrize("prefix,window", [(0, None), (3, None), (3, 4)])
def test_the_mask_by_hand(prefix, window):
    segments = (Segment(5), Segment(4, 0), Segment(3, 0), Segment(6))
    query, key, value = (torch.randn(1, n, 18 + more, 8) for n, more in ((4, 0), (2, prefix), (2, prefix)))
    mask = sees(segments, prefix, window)
    assert mask.shape == (18, prefix + 18)
    k, v = (x.repeat_interleave(2, 1) for x in (key, value))
    out = torch.nn.functional.scaled_dot_product_attention(query, k, v, mask).transpose(1, 2)
    assert (out - by_hand(query, key, value, segments, prefix, window)).abs().max() < 1e-5


def test_over_300_keys_groups_parents_prefix_and_window_are_in_it():
    assert max(int(sees(*case).sum(1).max()) for case in CASES) > 300
    assert any(prefix and window for _, prefix, window in CASES)
    assert any(s.parent is not None for segments, _, _ in CASES for s in segments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_definition_of_the_kernel_passes(dtype, card, capsys):
    card("none")
    config = CONFIGS["llama"]()
    assert check_attention(config, CPU, dtype) == "" and capsys.readouterr().err == ""


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_kernel_is_not_used_and_the_results_are_right(fault, card, capsys):
    """One line at load; then forward and gradients as by hand. Each fault is found alone."""
    card(fault)
    assert check_attention(CONFIGS["mistral"](), CPU, torch.bfloat16) == ""
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "segment by segment" in line and "the flash kernel was tested" in line
    segments = (Segment(9), Segment(5, 0), Segment(7, 0), Segment(4))
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, n, 25, 16, dtype=torch.bfloat16).requires_grad_() for n in (4, 2, 2))
    prefix = tuple(torch.randn(1, 2, 2, 16, dtype=torch.bfloat16) for _ in range(2))
    layout, layer = Layout(segments, SoftPrompt(keys_values=[prefix])), LayerAttention(0, 0.25, 6)
    out = packed_attention(query, key, value, layout, layer)
    exact = [x.detach().float().requires_grad_() for x in (query, key, value)]
    k, v = (torch.cat([p.float(), x], 2) for p, x in zip(prefix, exact[1:], strict=True))
    expected = by_hand(exact[0], k, v, segments, 2, 6)
    assert (out - expected).norm() < 0.02 * expected.norm()
    got, want = (torch.autograd.grad((y.float() ** 2).sum(), x) for y, x in ((out, (query, key, value)), (expected, exact)))  # fmt: skip
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() < 0.02 * b.norm()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("size,values", [(100, 100), (24, 16), (264, 264)])
def test_heads_that_the_kernel_does_not_have(size, values, card, capsys):
    """Never called: on a card it would raise. The other path is tested with these heads."""
    card("refuses")
    config = CONFIGS["llama"](head_dim=size)
    config.v_head_dim = values
    assert check_attention(config, CPU, torch.bfloat16) == ""
    assert "the flash kernel has no soft cap" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_path_of_the_cpu_with_values_of_another_size(dtype):
    """Its backward is ours. DeepSeek-V3 has such heads."""
    segment_by_segment = lambda q, k, v, segments, prefix, layer: packed._by_segment(  # noqa: E731
        q, k, v, Layout(tuple(segments)), prefix, layer
    )
    assert attention_error(segment_by_segment, CPU, dtype, 4, 2, 24, 16) < (
        1e-5 if dtype == torch.float32 else TOLERANCE
    )


def test_a_base_whose_attention_is_wrong_computes_rows(tmp_path, monkeypatch, capsys):
    """The path of the CPU, with a wrong gradient: one row per completion, and it is said."""
    packed._why_wrong.cache_clear()
    with monkeypatch.context() as broken:
        broken.setattr(packed._OnCPU, "backward", staticmethod(lambda ctx, grad: (grad, *4 * [None])))
        base = Base.load(tiny_folder(tmp_path), device="cpu", dtype="float32")
    packed._why_wrong.cache_clear()
    assert not base.packed and "tested on cpu" in base.why_not
    assert "packed attention is off" in capsys.readouterr().err
    assert Base.load(tmp_path, device="cpu", dtype="float32", quiet=True).packed
