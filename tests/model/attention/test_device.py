"""The path of a card, taken on the meta device: which kernel computes which heads."""

import pytest
import torch

from lowalign.data.pack import Segment
from lowalign.model.attention.blockwise import LayerAttention, varlen_applies
from lowalign.model.attention.device import device_type, planned_device
from lowalign.model.attention.packed import Layout, packed_attention
from lowalign.plan.meter import Meter

LAYOUT = Layout((Segment(6), Segment(5, 0), Segment(4, 0)))


def heads(size, values=None, device="meta"):
    shape = lambda count, width: torch.empty(1, count, 15, width, dtype=torch.bfloat16, device=device)  # noqa: E731
    return shape(4, size), shape(2, size), shape(2, values or size)


def flash_calls(query, key, value, **layer):
    with Meter() as meter:
        out = packed_attention(query, key, value, Layout(LAYOUT.segments), LayerAttention(0, 0.1, **layer))
    assert out.shape == (1, 15, 4, value.shape[-1])
    return meter.work.kernels["_varlen_attn"]


@pytest.mark.parametrize("size,values", [(64, None), (128, None), (256, None)])
def test_the_flash_kernel_where_it_has_the_shape(size, values):
    assert flash_calls(*heads(size, values)) == 1
    assert varlen_applies(*heads(size, values), None)


@pytest.mark.parametrize("size,values", [(100, None), (192, 128), (264, None)])
def test_other_heads_fall_back_with_one_line(size, values, capsys):
    """Not a multiple of 8, values of another size (DeepSeek-V3), too large: on a card they would raise at the first forward."""
    from lowalign.model.attention import packed

    packed._log_slow_path.cache_clear()
    assert flash_calls(*heads(size, values)) == flash_calls(*heads(size, values)) == 0
    assert capsys.readouterr().err.count("segment by segment") == 1
    assert not varlen_applies(*heads(size, values), None)


def test_soft_caps_and_other_devices():
    assert flash_calls(*heads(64), softcap=30.0) == 0
    with planned_device("cpu"):
        assert flash_calls(*heads(64)) == 0
        assert device_type(heads(64)[0]) == "cpu"
    assert device_type(heads(64)[0]) == "cuda"
    assert device_type(torch.zeros(1)) == "cpu"
