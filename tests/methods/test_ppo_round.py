"""PPO's rounds: when one begins and ends, that a repeated step changes nothing, and what a failure or a stop leaves."""

import json
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lowalign import Base, Example, Host
from lowalign.config.sections import AdapterConfig, Sampling, TrainConfig
from lowalign.config.training import PPOConfig, PPOLossConfig, RolloutConfig, ValueConfig
from lowalign.errors import UserError
from lowalign.methods import ppo_round
from lowalign.methods.ppo import PPO
from lowalign.methods.ppo_round import Roles
from lowalign.methods.rollout import Rollout
from lowalign.model.adapters.kinds import peft_config
from lowalign.train.accumulate import MicroBatches
from lowalign.train.engine import train
from lowalign.train.signals import Interrupted, StopSignals
from tests.tiny import tiny_folder

ENDS = tuple(range(2, 60))  # so many tokens end a text that random weights draw some


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tiny_folder(tmp_path_factory.mktemp("llama"), "llama")
    base = Base.load(folder, quantization="none", dtype="float32", device="cpu", quiet=True)
    base.eos_ids = ENDS
    return base


@pytest.fixture
def host(base):
    host = Host(base)
    torch.manual_seed(0)
    for name in ("policy", "value"):
        host.add(name, peft_config(AdapterConfig(r=4)))
    host.add_scalar_head("value", zero=True)
    yield host
    for name in tuple(host.adapters):
        host.delete(name)


def even(_, completions) -> list[list[float]]:
    """The share of even tokens."""
    return [[sum(t % 2 == 0 for t in c) / len(c) for c in group] for group in completions]


def ppo(host, score=even, prompts=6, on_round=lambda *_: None, new=8, rollout=None, ends=ENDS, **options) -> PPO:
    host.base.eos_ids = ends
    config = PPOConfig(
        model="",
        out=Path(),
        train=TrainConfig(batch_size=2),
        sampling=Sampling(max_new_tokens=new),
        rollout=RolloutConfig(prompts=4, samples=2, **rollout or {}),
        ppo=PPOLossConfig(**{"epochs": 2} | options),
    )
    ids = [[70 + i, 80, 90 + i] for i in range(prompts)]
    return PPO(host, Roles(("policy",), (), ("value",)), ids, score, config, on_round=on_round)


def engine(host, method: PPO, budget: int = 4096) -> MicroBatches:
    host.train_only(*method.lr_multipliers)
    return Steps(method, {name: host.flat(name) for name in method.lr_multipliers}, budget, StopSignals())


class Steps(MicroBatches):
    """As the engine does, it tells the method the metrics of a finished step."""

    def gradients(self, examples, seed):
        sums = super().gradients(examples, seed)
        self.method.last_metrics = {name: float(value) for name, value in sums.items()}
        return sums


def shift(host, amount: float) -> None:
    """In place of an optimizer step."""
    generator = torch.Generator().manual_seed(0)
    flat = host.flat("policy")
    with torch.no_grad():
        flat.master.add_(torch.randn(flat.master.shape, generator=generator) * amount)
    flat.sync_working_copy()


def content(examples) -> list:
    return [(e.prompt, e.completions, e.rewards, [a.tolist() for a in e.advantages]) for e in examples]


def test_a_round_is_epochs_over_its_minibatches(host):
    rounds = []
    method = ppo(host, on_round=lambda number, prompts, rollouts: rounds.append((number, prompts, list(rollouts))))
    steps = [method.batch(step) for step in range(8)]
    assert [number for number, _, _ in rounds] == [0, 1]
    for k, (_, prompts, rollouts) in enumerate(rounds):
        assert [r.prompt for r in rollouts] == [method.prompts[i] for i in prompts]
        for epoch in range(2):  # each pass has every rollout once, in the minibatches it was evaluated in
            two = steps[4 * k + 2 * epoch : 4 * k + 2 * epoch + 2]
            assert sorted(id(e) for batch in two for e in batch) == sorted(map(id, rollouts))
            place = {id(r): k for k, r in enumerate(rollouts)}
            assert all({place[id(e)] // 2 for e in batch} in ({0}, {1}) for batch in two)
    first, second = (prompts for _, prompts, _ in rounds)
    assert sorted(first + second[:2]) == list(range(6))  # a pass over the prompts, then the next


def test_each_epoch_takes_the_minibatches_in_an_order_of_its_own(host):
    method = ppo(host, epochs=6)
    steps = [place(method, method.batch(step)) for step in range(12)]
    epochs = [steps[k : k + 2] for k in range(0, 12, 2)]
    assert [0, 1] in epochs[0] and [2, 3] in epochs[0]
    assert {tuple(map(tuple, epoch)) for epoch in epochs} == {((0, 1), (2, 3)), ((2, 3), (0, 1))}


def test_the_pretraining_rows_come_in_turn(host):
    """Two in each step behind the rollouts, and all six within three steps, in each pass."""
    method = ppo(host)
    method.ptx = [Example([60 + i], [[70, 80 + i]]) for i in range(6)]
    steps = [[e for e in method.batch(step) if not isinstance(e, Rollout)] for step in range(6)]
    assert [len(rows) for rows in steps] == [2] * 6
    for once in (steps[:3], steps[3:]):
        assert sorted(e.prompt[0] for rows in once for e in rows) == [60, 61, 62, 63, 64, 65]


def test_the_level_of_the_value_function_is_set_once(host):
    """With a head of zero the values are that level: in a later round they are still those of the first."""
    method = ppo(host, whiten=False)
    method.batch(0)
    level = method.value_bias
    assert level != 0
    shift(host, 0.1)
    method.batch(4)
    assert method.round == 1 and method.value_bias == level
    assert all(torch.equal(v, torch.full_like(v, level)) for r in method.rollouts for v in r.values)
    again = [replace(r, values=[torch.zeros_like(v) for v in r.values]) for r in method.rollouts]
    assert abs(ppo_round.value_bias(again, method.config, method.kl.beta) - level) > 0.01  # what it would be now


def test_the_value_function_has_a_learning_rate_of_its_own(host):
    method = ppo(host)
    config = replace(method.config, value=ValueConfig(learning_rate=3.0))
    assert PPO(host, method.roles, method.prompts, even, config).lr_multipliers == {"policy": 1.0, "value": 3.0}


def test_reshuffled_minibatches(host):
    """The first epoch is as without; in the others every rollout comes once, in minibatches of its own."""
    plain, method = ppo(host, epochs=6), ppo(host, epochs=6, reshuffle=True)
    first = place(method, method.batch(0))
    steps = [first, *(place(method, method.batch(step)) for step in range(1, 12))]
    assert steps[:2] == [place(plain, plain.batch(step)) for step in range(2)]
    epochs = [steps[k : k + 2] for k in range(0, 12, 2)]
    assert all(sorted(i for batch in epoch for i in batch) == [0, 1, 2, 3] for epoch in epochs)
    divisions = {frozenset(map(frozenset, epoch)) for epoch in epochs}
    assert len(divisions) > 1 and frozenset({frozenset({0, 1}), frozenset({2, 3})}) in divisions
    other = ppo(host, epochs=6, reshuffle=True)  # in the middle of a round
    other.load_state(method.state())
    assert place(other, other.batch(7)) == steps[7]


def place(method: PPO, batch) -> list[int]:
    """The numbers of a minibatch's rollouts in their round."""
    return [next(i for i, r in enumerate(method.rollouts) if r is e) for e in batch]


def test_held_out_prompts_are_evaluated_after_every_so_many_rounds(host):
    """One completion of each, with the same random numbers every time; its score is asked for by the numbers that follow
    those of the training prompts."""
    asked = []

    def score(numbers, completions):
        asked.append((list(numbers), completions))
        return even(numbers, completions)

    method = ppo(host, score, rollout={"eval_every": 2})
    heldout = [[61, 62], [63, 64, 65], [66]]
    first = method.evaluate(heldout)
    assert not method.evaluation_due(0)  # the engine itself evaluates before the first step
    numbers, completions = asked.pop()
    assert numbers == [6, 7, 8] and [len(group) for group in completions] == [1, 1, 1]
    with host.use("policy"):
        want = [g[0] for g in host.generate(heldout, 1, method.config.sampling, seeds=range(3))]
    assert [group[0] for group in completions] == [c.ids for c in want]
    rewards = [sum(t % 2 == 0 for t in c.ids) / len(c.ids) for c in want]
    mean = sum(rewards) / 3
    assert first == pytest.approx({
        "reward": mean, "reward_std": (sum((r - mean) ** 2 for r in rewards) / 2) ** 0.5,
        "length": sum(len(c.ids) for c in want) / 3, "eos_share": sum(c.stopped for c in want) / 3,
    })  # fmt: skip
    due = []
    for step in range(17):
        due += [step] * method.evaluation_due(step)
        before = json.dumps({k: v for k, v in method.state().items() if not isinstance(v, torch.Tensor)})
        assert method.evaluate(heldout) == first  # the weights are the same
        assert json.dumps({k: v for k, v in method.state().items() if not isinstance(v, torch.Tensor)}) == before
        method.batch(step)
    assert due == [8, 16]  # a round is four steps


def test_few_prompts_are_sampled_twice_with_other_draws(host):
    method = ppo(host, prompts=1)
    seen = []
    for step in (0, 4):
        method.batch(step)
        seen += [tuple(k) for r in method.rollouts for k in r.completions]
    assert len(seen) == 16 and len(set(seen)) > 12  # some short ones may be drawn twice


def timeless(metrics: dict) -> dict:
    """Without what depends on the clock."""
    return {name: value for name, value in metrics.items() if not name.endswith("_per_second")}


def test_a_repeated_step_gives_the_same_batch(host):
    method = ppo(host, target_kl=1e-9)
    run = engine(host, method)
    for step in range(3):
        first = method.batch(step)
        state = json.dumps({k: v for k, v in method.state().items() if not isinstance(v, torch.Tensor)})
        one = timeless(run.gradients(first, 0))
        again = method.batch(step)  # after half a step, or a whole one whose weights were not changed
        assert [id(e) for e in again] == [id(e) for e in first]
        assert json.dumps({k: v for k, v in method.state().items() if not isinstance(v, torch.Tensor)}) == state
        assert timeless(run.gradients(again, 0)) == one
        shift(host, 0.02)


@pytest.mark.parametrize("options", [{}, {"target_kl": 1e-3, "kl_target": 1.0, "kl_horizon": 100}])
@pytest.mark.parametrize("cut_short", [False, True])
def test_state_goes_on_as_if_nothing_had_happened(host, options, cut_short):
    """At every step of three rounds, between steps and in the middle of one: the same examples from there on."""
    rollout = {"normalise": "running"}
    method = ppo(host, rollout=rollout, **options)
    run = engine(host, method)
    other = ppo(host, rollout=rollout, **options)
    for step in range(12):
        batch = method.batch(step) if cut_short else None
        if cut_short:
            run.gradients(batch[:1], 0)
        kept = method.state()
        numbers = json.loads(json.dumps({k: v for k, v in kept.items() if not isinstance(v, torch.Tensor)}))
        other.load_state({k: v.clone() for k, v in kept.items() if isinstance(v, torch.Tensor)} | numbers)
        batch = method.batch(step)
        assert content(other.batch(step)) == content(batch)
        assert (other.kl.beta, vars(other.moments), other.round_metrics) == (
            method.kl.beta,
            vars(method.moments),
            method.round_metrics,
        )
        assert timeless(run.gradients(other.batch(step), 0)) == timeless(run.gradients(batch, 0))
        shift(host, 0.02)
    assert method.round >= 2


def test_a_round_ends_early_when_the_policy_went_too_far(host):
    method = ppo(host, target_kl=1e-3)
    run = engine(host, method)
    for step, round_ in enumerate([0, 0, 1, 1]):
        metrics = run.gradients(method.batch(step), 0)
        assert method.round == round_
        shift(host, 0.1 if step == 0 else 0.0)
        assert step != 1 or metrics["approx_kl"] > 1e-3
        assert step in (1, 3) or metrics["approx_kl"] == 0
    never = ppo(host, target_kl=1e6)
    for step in range(4):
        engine(host, never).gradients(never.batch(step), 0)
        shift(host, 0.1)
    assert never.round == 0


def test_the_limit_of_the_divergence_is_on_its_mean_over_the_steps_tokens(host):
    method = ppo(host, target_kl=1.0)
    run = engine(host, method)
    run.gradients(method.batch(0), 0)
    shift(host, 0.1)
    mean = float(run.gradients(method.batch(1), 0)["approx_kl"])
    for limit, over in ((0.99 * mean, True), (1.01 * mean, False)):
        method.config = replace(method.config, ppo=replace(method.config.ppo, target_kl=limit))
        assert method.round_over(2) == over


def test_what_is_done_again_counts_once(host):
    """Where memory runs out behind the first micro-batch, that one comes again; the step's approx_kl does not grow."""
    method = ppo(host, target_kl=1.0)
    method.batch(0)
    shift(host, 0.1)
    batch = method.batch(1)
    want = float(engine(host, method).gradients(batch, 0)["approx_kl"])
    assert method.state()["approx_kl"] == pytest.approx(want, rel=1e-5)
    run, loss, calls = engine(host, method, max(e.length for e in batch)), method.loss, []

    def narrow(examples, normalizers):
        calls.append(examples)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("the card is full")
        return loss(examples, normalizers)

    method.batch(1)
    method.last_metrics, method.loss = {}, narrow
    with pytest.raises(UserError, match="out of memory with a single example"):
        run.gradients(batch, 0)
    run.gradients(batch, 0)
    assert method.state()["approx_kl"] == pytest.approx(want, rel=1e-5)


def test_a_signal_while_it_samples_leaves_the_state_of_the_last_finished_step(host):
    method, same = ppo(host), ppo(host)
    for step in range(4):
        method.batch(step)
    kept = json.dumps({k: v for k, v in method.state().items() if not isinstance(v, torch.Tensor)})
    stop = StopSignals()
    stop.received = signal.SIGTERM
    host.check = stop.check
    with pytest.raises(Interrupted):
        method.batch(4)
    host.check = lambda: None
    assert json.dumps({k: v for k, v in method.state().items() if not isinstance(v, torch.Tensor)}) == kept
    same.load_state(method.state())
    assert content(same.batch(4)) == content(method.batch(4))


def test_out_of_memory_while_a_round_is_evaluated(host, monkeypatch, capsys):
    """The signals are those of a device where all fits, but for the rounding of other packs."""
    method, other = ppo(host), ppo(host)
    method.batch(0)
    tokens = host.tokens

    def small(pack, request):
        if len(pack) > 1:
            raise torch.OutOfMemoryError("the card is full")
        return tokens(pack, request)

    monkeypatch.setattr(host, "tokens", small)
    batch = other.batch(0)
    assert "out of memory with" in capsys.readouterr().err
    for a, b in zip(method.rollouts, other.rollouts, strict=True):
        for name in ("old", "reference_logps", "values", "advantages", "returns"):
            for x, y in zip(getattr(a, name), getattr(b, name), strict=True):
                assert torch.allclose(x, y, atol=1e-5)
    assert other.round_metrics == pytest.approx(method.round_metrics, abs=1e-5)
    monkeypatch.undo()
    engine(host, other).gradients(
        batch, 0
    )  # in one pack, which is not one of those, so its ratio may be off by rounding


def test_a_smaller_budget_of_the_loop_is_that_of_the_next_rounds_evaluation(host, tmp_path, monkeypatch):
    """Where memory ran out in the update, later rounds are evaluated in the packs that the update has now."""
    method = ppo(host)
    loss, evaluated, trained = method.loss, [], []
    evaluate = ppo_round.compute_logps_and_values

    def small(examples, normalizers):
        if sum(e.length for e in examples) > 30:
            raise torch.OutOfMemoryError("the card is full")
        trained.append((method.round, tuple(map(id, examples))))
        return loss(examples, normalizers)

    def look(*arguments):
        evaluated.append(evaluate(*arguments))
        return evaluated[-1]

    monkeypatch.setattr(ppo_round, "compute_logps_and_values", look)
    method.loss = small
    train(host, method, replace(method.config.train, steps=8, checkpointing="off"), tmp_path)
    first, second = (packs for _, packs in evaluated)
    assert not {pack for number, pack in trained if number == 0} <= first
    assert {pack for number, pack in trained if number == 1} == second


def test_before_the_first_step_the_ratio_must_be_1(host):
    method = ppo(host)
    batch = method.batch(0)
    shift(host, 0.01)
    with pytest.raises(RuntimeError, match="before a round's first step the ratio must be 1; log-probs differ by"):
        engine(host, method).gradients(batch, 0)


def test_the_coefficient_follows_the_divergence_of_each_round(host):
    method = ppo(host, kl_target=0.5, kl_horizon=40, kl=0.2)
    beta = 0.2
    for step in range(0, 12, 4):
        method.batch(step)
        assert method.round_metrics["kl_coef"] == pytest.approx(beta, rel=1e-12)
        beta *= 1 + min(0.2, max(-0.2, method.round_metrics["kl"] / 0.5 - 1)) * 8 / 40  # 4 prompts × 2 samples
        shift(host, 0.1)
    assert method.round_metrics["kl"] > 0.5


def test_a_failure_leaves_the_state_of_the_step_before(host):
    """Reward, divergence and statistics of a round that came to nothing are not counted, so it can be begun again."""
    broken = []

    def score(numbers, completions):
        if broken:
            raise UserError("the reward function is broken")
        return even(numbers, completions)

    options = {"kl_target": 0.1, "rollout": {"normalise": "running"}}
    method, other = ppo(host, score, **options), ppo(host, **options)
    for step in range(4):
        assert content(method.batch(step)) == content(other.batch(step))
    before = {k: v for k, v in method.state().items() if not isinstance(v, torch.Tensor)}
    broken.append(True)
    for _ in range(2):
        with pytest.raises(UserError, match="the reward function is broken"):
            method.batch(4)
        assert {k: v for k, v in method.state().items() if not isinstance(v, torch.Tensor)} == before
    broken.clear()
    assert content(method.batch(4)) == content(other.batch(4))
    assert method.kl.beta == other.kl.beta != 0.05 and vars(method.moments) == vars(other.moments)


def test_a_round_in_which_nothing_ends(host):
    for missing in ("penalise", "mask"):
        with pytest.raises(UserError) as error:
            ppo(host, new=3, ends=(383,), rollout={"missing_eos": missing}).batch(0)
        assert str(error.value) == (
            "none of the 8 completions of this round ended within 3 tokens; raise --sampling.max-new-tokens, start from "
            "an SFT run that ends its answers (--init), or allow it with --rollout.missing-eos keep"
        )
    method = ppo(host, new=3, ends=(383,), rollout={"missing_eos": "keep"})
    method.batch(0)
    assert method.round_metrics["truncated_share"] == 1 and method.round_metrics["length"] == 3


def test_a_masked_completion_is_not_learned_from(host):
    """A minibatch of cut-off completions alone moves nothing, and its round's metrics stay as they were."""
    method = ppo(host, rollout={"missing_eos": "mask"}, entropy=0.1)
    batch = method.batch(0)
    for r in batch:
        r.masks = [[False] * len(c) for c in r.completions]
    method.unit_ratio_packs.clear()
    run = engine(host, method)
    metrics = run.gradients(batch, 0)
    assert all(not flat.master.grad.any() for flat in run.flats.values())
    assert metrics["loss"] == 0 and metrics["reward"] == pytest.approx(method.round_metrics["reward"])
