"""The layout of a Pack against one worked out by hand, and the two functions that decide what goes into a step."""

import random
from collections import Counter

import pytest
import torch

from lowalign.data.micro_batches import micro_batches
from lowalign.data.pack import Example, Segment, pack, step_order, total_supervised

PAIR = Example([1, 2, 3], [[4, 5], [6]], [[True, False], [True]])
TALK = Example([7], [[8, 9]])
BARE = Example([], [[10, 11, 12]])


def test_layout_by_hand() -> None:
    """prompt, two completions hanging on it | prompt and completion as one segment | completion without a prompt."""
    packed = pack([PAIR, TALK, BARE])
    assert packed.ids.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]
    assert packed.positions.tolist() == [0, 1, 2, 3, 4, 3, 0, 1, 2, 0, 1, 2]
    assert packed.segments == (Segment(3), Segment(2, 0), Segment(1, 0), Segment(3), Segment(3))
    assert packed.virtual.tolist() == [-1] * 12
    # Both completions are predicted from the prompt's last token, place 2; the first token of BARE from nothing.
    assert packed.predictors.tolist() == [2, 3, 2, 6, 7, 9, 10]
    assert packed.labels.tolist() == [4, 5, 6, 8, 9, 11, 12]
    assert packed.supervised.tolist() == [0, 2, 3, 4, 5, 6]
    assert packed.flat_index.tolist() == [0, 1, 2, 3, 4, 6, 7]
    assert packed.lengths == [[2, 1], [2], [3]]


def test_layout_with_virtual_tokens() -> None:
    """Two learned embeddings before every prompt: part of its segment, and what BARE's first token is predicted from
    stays nothing."""
    packed = pack([PAIR, BARE], virtual_tokens=2)
    assert packed.ids.tolist() == [-1, -1, 1, 2, 3, 4, 5, 6, -1, -1, 10, 11, 12]
    assert packed.virtual.tolist() == [0, 1, -1, -1, -1, -1, -1, -1, 0, 1, -1, -1, -1]
    assert packed.positions.tolist() == [0, 1, 2, 3, 4, 5, 6, 5, 0, 1, 2, 3, 4]
    assert packed.segments == (Segment(5), Segment(2, 0), Segment(1, 0), Segment(5))
    assert packed.predictors.tolist() == [4, 5, 4, 10, 11]
    assert packed.labels.tolist() == [4, 5, 6, 11, 12]


def test_positions_begin_after_a_prefix() -> None:
    packed = pack([PAIR, TALK], first_position=10)
    assert packed.positions.tolist() == [10, 11, 12, 13, 14, 13, 10, 11, 12]


def test_an_example_needs_its_completions() -> None:
    for wrong in ([], [[]], [[1], []]):
        with pytest.raises(ValueError, match=r"at least one completion.*x:3"):
            Example([1], wrong, source="x:3")
    with pytest.raises(ValueError, match="differ in length"):
        Example([1], [[2, 3]], [[True]])


def test_supervised_counts() -> None:
    assert [PAIR.supervised, TALK.supervised, BARE.supervised] == [2, 2, 2]
    assert BARE.mask(0) == [False, True, True]
    assert total_supervised([PAIR, TALK, BARE]) == 6


def test_micro_batches_keep_the_budget_and_every_example() -> None:
    rng = random.Random(0)
    examples = [Example([1] * rng.randrange(5), [[1] * rng.randrange(1, 40)], source=str(i)) for i in range(60)]
    for budget in (10, 44, 100, 10_000):
        groups = micro_batches(examples, budget)
        assert sorted(e.source for g in groups for e in g) == sorted(e.source for e in examples)
        assert all(sum(e.length for e in g) <= budget or len(g) == 1 for g in groups)
        assert groups == micro_batches(examples, budget)
    # First fit never leaves two groups that would go into one.
    sizes = sorted(sum(e.length for e in g) for g in micro_batches(examples, 100))
    assert sizes[0] + sizes[1] > 100


def test_step_order_visits_each_row_once_a_pass() -> None:
    rows, batch = 23, 5
    order = [k for step in range(23) for k in step_order(rows, batch, seed=3, step=step)]
    for epoch in range(5):
        assert sorted(order[epoch * rows : (epoch + 1) * rows]) == list(range(rows))
    assert order[:rows] != order[rows : 2 * rows]
    again = [step_order(rows, batch, seed=3, step=step) for step in (7, 0, 22)]
    assert again == [order[k * batch : (k + 1) * batch] for k in (7, 0, 22)]
    assert step_order(rows, batch, seed=4, step=0) != order[:batch]
    firsts = Counter(step_order(8, 1, seed=seed, step=0)[0] for seed in range(800))
    assert set(firsts) == set(range(8)) and max(firsts.values()) < 160


def test_to_moves_tensors_only() -> None:
    moved = pack([TALK]).to("meta")
    assert moved.ids.device == torch.device("meta") and moved.segments == (Segment(3),)


def test_a_pack_moves_in_one_copy() -> None:
    """Each copy to a card waits for it: all tensors are parts of one, with the values they had."""
    packed = pack([PAIR, TALK, BARE], virtual_tokens=2)
    assert packed.to("cpu") is packed
    for device in ("meta", "cpu:0"):
        moved = packed.to(device)
        tensors = {k: v for k, v in vars(moved).items() if isinstance(v, torch.Tensor)}
        assert len(tensors) == 8 and len({t.untyped_storage()._cdata for t in tensors.values()}) == 1
        for name, tensor in tensors.items():
            assert tensor.shape == getattr(packed, name).shape
            assert device == "meta" or torch.equal(tensor, getattr(packed, name))
        assert (moved.segments, moved.lengths) == (packed.segments, packed.lengths)
