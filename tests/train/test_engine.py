"""The loop against plain torch, and what stops it."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from lowalign.data.pack import Example, step_order
from lowalign.errors import UserError
from lowalign.train import checkpoint, engine
from lowalign.train.accumulate import MicroBatches
from lowalign.train.engine import train
from lowalign.train.method import TrainableHost
from lowalign.train.signals import StopSignals
from tests.train import toy


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_the_toy_host_fits_the_protocol():
    assert isinstance(toy.ToyHost(), TrainableHost)


# -- gradients and the step -----------------------------------------------------------------------------------------------


def _gradient(host: toy.ToyHost, examples: list[Example], budget: int) -> tuple[torch.Tensor, float, int]:
    method = toy.ToyMethod(host)
    micro_batches = MicroBatches(method, {"policy": host.flat("policy")}, budget, StopSignals())
    sums = micro_batches.gradients(examples, seed=0)
    return host.flat("policy").master.grad.clone(), sums["loss"].item(), method.calls


def test_gradients_do_not_depend_on_the_micro_batch():
    """8 rows of unequal length at once, by about four, by about two, one by one; fp32."""
    host, examples = toy.ToyHost(dropout=0.0), toy.rows(8, seed=5)
    assert len({e.length for e in examples}) > 3
    total = sum(e.length for e in examples)
    whole, loss, calls = _gradient(host, examples, total)
    assert calls == 1
    counts = []
    for budget in (total // 2 + 3, total // 4 + 3, 1):
        gradient, again, calls = _gradient(host, examples, budget)
        counts.append(calls)
        assert (gradient - whole).norm() / whole.norm() <= 1e-6
        assert again == pytest.approx(loss, rel=1e-6)
    assert counts[0] < counts[1] < counts[2] == 8


def _by_hand(steps: int, clip: float, lr_multipliers: dict[str, float]) -> tuple[toy.ToyHost, list, list[list[float]]]:
    """The same training in plain torch: the whole batch at once, one parameter group per adapter, stock clipping of each.
    -> the host, the losses, and for each step the adapters' gradient norms."""
    host = toy.ToyHost(dropout=0.0)
    groups = [
        {"params": list(host.adapters[name].parameters()), "factor": factor} for name, factor in lr_multipliers.items()
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0, weight_decay=0.01)
    examples, losses, norms = toy.rows(40, seed=1), [], []
    rates = [0.5, 1, 1, 3 / 4, 2 / 4, 1 / 4]  # linear, warm-up of a third of 6 steps
    for step in range(steps):
        loss, tokens = 0.0, 0
        for i in step_order(40, 6, 0, step):
            e = examples[i]
            ids = torch.tensor(e.prompt + e.completions[0])
            for name in lr_multipliers:
                logits = host.logits(ids, name)[1:-1]
                loss = loss + F.cross_entropy(logits, ids[2:], reduction="sum")
            tokens += len(ids) - 2
        optimizer.zero_grad()
        (loss / tokens).backward()
        groups = optimizer.param_groups
        norms.append([torch.nn.utils.clip_grad_norm_(group["params"], clip).item() for group in groups])
        losses.append(loss.item() / tokens)
        for group in groups:
            group["lr"] = 1e-2 * group["factor"] * rates[step]
        optimizer.step()
    return host, losses, norms


def test_training_is_that_of_plain_torch(tmp_path):
    """Six steps, two adapters with different learning-rate factors, micro-batches of two or three rows, clipping in force."""
    lr_multipliers, clip = {"policy": 1.0, "value": 0.5}, 0.6
    plain, losses, norms = _by_hand(6, clip, lr_multipliers)
    assert min(map(max, norms)) > clip
    method = toy.ToyMethod(toy.ToyHost(dropout=0.0), lr_multipliers)
    host, _, result = toy.run(
        tmp_path,
        method=method,
        steps=6,
        schedule="linear",
        warmup=1 / 3,
        clip=clip,
        optimizer="adamw",
        weight_decay=0.01,
    )
    steps = [line for line in lines(tmp_path) if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6] and result.step == 6
    assert [line["loss"] for line in steps] == pytest.approx(losses, rel=1e-6)
    for k, name in enumerate(lr_multipliers):
        assert [line[f"grad_norm/{name}"] for line in steps] == pytest.approx([norm[k] for norm in norms], rel=1e-5)
    assert [line["grad_norm"] for line in steps] == pytest.approx([math.hypot(*norm) for norm in norms], rel=1e-5)
    assert [line["lr"] for line in steps] == pytest.approx([0.005, 0.01, 0.01, 0.0075, 0.005, 0.0025])
    for name in lr_multipliers:
        for p, q in zip(host.adapters[name].parameters(), plain.adapters[name].parameters(), strict=True):
            # Adam divides by the gradient's size: where it is 1e-6 a rounding error of 1e-8 is a hundredth of a step of 1e-2.
            assert torch.allclose(p, q, rtol=1e-4, atol=1e-4)


class Scaled(toy.ToyMethod):
    """The policy's loss is a tenth, the value's a thousandfold."""

    def loss(self, examples, normalizers):
        whole, trained = 0.0, self.lr_multipliers
        for name, factor in (("policy", 0.1), ("value", 1000.0)):
            self.lr_multipliers = {name: 1.0}
            whole = whole + factor * super().loss(examples, normalizers)[0]
        self.lr_multipliers = trained
        return whole, {"loss": whole.detach()}


def test_a_large_gradient_of_the_value_does_not_shrink_the_policys(tmp_path, monkeypatch):
    """The gradients that the optimizer gets: the value's is scaled down to the limit, the policy's is as it was."""
    make, seen = engine.make_optimizer, []

    def watched(masters, config):
        optimizer = make(masters, config)
        norms = lambda *_: seen.append({name: float(m.grad.norm()) for name, m in masters.items()})  # noqa: E731
        optimizer.register_step_pre_hook(norms)
        return optimizer

    monkeypatch.setattr(engine, "make_optimizer", watched)
    method = Scaled(toy.ToyHost(dropout=0.0), {"policy": 1.0, "value": 1.0})
    toy.run(tmp_path, method=method, steps=2, clip=1.0, optimizer="adamw")
    steps = [line for line in lines(tmp_path) if "loss" in line]
    for line, norms in zip(steps, seen, strict=True):
        assert line["grad_norm/value"] > 100 > 1 > line["grad_norm/policy"] > 0
        assert norms["value"] == pytest.approx(1.0, rel=1e-4)
        assert norms["policy"] == pytest.approx(line["grad_norm/policy"], rel=1e-6)


def test_clip_off_and_not_reached(tmp_path):
    a, _, _ = toy.run(tmp_path / "a", clip=0.0, optimizer="adamw")
    b, _, _ = toy.run(tmp_path / "b", clip=1e9, optimizer="adamw")
    assert torch.equal(toy.weights(a), toy.weights(b))


def test_only_what_the_method_trains_moves(tmp_path):
    host, fresh = toy.run(tmp_path)[0], toy.ToyHost()
    assert not torch.equal(toy.weights(host), toy.weights(fresh))
    assert torch.equal(toy.weights(host, "value"), toy.weights(fresh, "value"))
    assert all(p.grad is None for p in (host.embedding.weight, host.head.weight))


def test_low_precision_copy_is_trained_on_an_fp32_master(tmp_path):
    """At a learning rate of 1e-6 a bf16 weight stands still; the fp32 master moves and is what is saved."""
    method = toy.ToyMethod(toy.ToyHost(working_dtype=torch.bfloat16))
    start = toy.weights(method.host)
    host, _, _ = toy.run(tmp_path, method=method, learning_rate=1e-6, optimizer="adamw")
    copy = host.adapters["policy"][0].weight
    saved = checkpoint.newest_valid(tmp_path).read("weights")["policy/0.weight"]
    assert copy.dtype == torch.bfloat16 and saved.dtype == torch.float32
    assert torch.equal(saved, host.flat("policy").tensors()["0.weight"]) and torch.equal(saved.bfloat16(), copy)
    changed = (toy.weights(host) != start).float().mean()
    assert changed > 0.9 and (copy != start[: copy.numel()].view_as(copy).bfloat16()).float().mean() < 0.2


# -- evaluation -----------------------------------------------------------------------------------------------------------


def test_evaluation_is_over_all_heldout_rows_in_eval_mode_and_the_best_is_kept(tmp_path):
    modes: list[tuple[bool, bool]] = []
    method = toy.ToyMethod(toy.ToyHost(dropout=0.5))
    method.hook = lambda *_: modes.append((torch.is_grad_enabled(), method.host.adapters.training))
    host, _, result = toy.run(tmp_path, method=method, steps=12, learning_rate=0.05, schedule="constant", eval_every=3)
    assert set(modes) == {(True, True), (False, False)} and not host.adapters.training
    evals = [line for line in lines(tmp_path) if "eval/loss" in line]
    assert [line["step"] for line in evals] == [0, 3, 6, 9, 12]
    assert all(line["eval/rows"] == len(toy.heldout()) for line in evals)
    best = min(evals, key=lambda line: line["eval/loss"])
    assert best["eval/loss"] < evals[0]["eval/loss"] and best["step"] == result.best_step
    assert result.metrics["eval/loss"] == evals[-1]["eval/loss"]

    step, weights = checkpoint.read_best(tmp_path)
    assert step == result.best_step
    host.flat("policy").load({name.removeprefix("policy/"): tensor for name, tensor in weights.items()})
    examples = toy.heldout()
    with torch.no_grad():
        losses = [
            F.cross_entropy(
                host.logits(torch.tensor(e.prompt + e.completions[0]), "policy")[1:-1],
                torch.tensor(e.completions[0]),
                reduction="sum",
            )
            for e in examples
        ]
    tokens = sum(len(e.completions[0]) for e in examples)
    assert sum(losses).item() / tokens == pytest.approx(best["eval/loss"], rel=1e-6)


def test_evaluation_does_not_change_training(tmp_path):
    a, _, _ = toy.run(tmp_path / "a", eval_every=1)
    b, _, _ = toy.run(tmp_path / "b", eval_every=0)
    assert torch.equal(toy.weights(a), toy.weights(b))
    assert [line["step"] for line in lines(tmp_path / "b") if "eval/loss" in line] == [0, 8]


# -- what stops it --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_not_finite_stops_before_the_step(tmp_path, where):
    """At the sixth step: the weights stay those after five, which are saved nowhere but recomputable from the fourth."""
    method = toy.ToyMethod(toy.ToyHost())
    plain_loss = method.loss

    def poisoned(examples, normalizers):
        loss, metrics = plain_loss(examples, normalizers)
        if method.step == 5 and torch.is_grad_enabled():
            if where == "loss":
                loss = loss * float("nan")
            else:
                loss.register_hook(lambda gradient: gradient * float("inf"))
            metrics = {"loss": loss.detach()}
        return loss, metrics

    method.loss = poisoned
    with pytest.raises(UserError) as caught:
        toy.run(tmp_path, method=method)
    text = str(caught.value)
    rows = [f"toy.jsonl:{i + 1}" for i in step_order(40, 6, 0, 5)]
    assert text.startswith("step 6: loss ") and ", ".join(rows) in text
    assert f"The last checkpoint, {tmp_path / 'checkpoints' / 'step-000004'}, is intact." in text
    assert ("loss nan" in text) == (where == "loss")
    after_five, _, _ = toy.run(tmp_path / "straight", hook=toy.signal_at(5))
    assert torch.equal(toy.weights(method.host), toy.weights(after_five))


def test_a_tensor_without_gradient_is_noticed_at_the_first_step(tmp_path):
    host = toy.ToyHost()
    host.adapters["policy"].register_parameter("forgotten", torch.nn.Parameter(torch.ones(3)))
    with pytest.raises(RuntimeError, match='no gradient reached 1 tensors of "policy": forgotten'):
        toy.run(tmp_path, method=toy.ToyMethod(host))
    assert lines(tmp_path) == [] or all("loss" not in line for line in lines(tmp_path))


def test_a_gradient_of_zero_is_a_gradient(tmp_path):
    """The state of a LoRA at step 0: with the last layer zero, the first one's gradient is exactly zero."""
    host = toy.ToyHost()
    with torch.no_grad():
        host.adapters["policy"][3].weight.zero_()
    host.flat("policy")
    assert toy.run(tmp_path, method=toy.ToyMethod(host), steps=1)[2].step == 1


@pytest.mark.parametrize("at", [0, 7])
def test_a_changed_base_is_noticed(tmp_path, at):
    """After the first step, and at the end."""
    host = toy.ToyHost()

    def damage(step: int, call: int) -> None:
        if (step, call) == (at, 0):
            host.head.bias.data[3] += 1e-6

    with pytest.raises(RuntimeError, match="the base's weights have changed"):
        toy.run(tmp_path, method=toy.ToyMethod(host, hook=damage))
    assert len([line for line in lines(tmp_path) if "loss" in line]) == at + (at > 0)


def test_steps_must_be_known(tmp_path):
    method = toy.ToyMethod(toy.ToyHost())
    with pytest.raises(ValueError, match=r"config\.steps"):
        train(method.host, method, replace(toy.CONFIG, steps=None), tmp_path)


# -- out of memory --------------------------------------------------------------------------------------------------------


def _small_device(method: toy.ToyMethod, room: int, when: str) -> None:
    """A device on which a micro-batch of more than `room` tokens does not fit: in the forward, or half-way back."""
    plain_loss, full = method.loss, False

    def loss(examples, normalizers):
        nonlocal full
        full = sum(e.length for e in examples) > room
        if full and when == "forward":
            raise torch.OutOfMemoryError("tried to allocate 20.00 GiB")
        return plain_loss(examples, normalizers)

    def fail(gradient: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("tried to allocate 20.00 GiB")

    def fail_on_the_way_back(module, _, output: torch.Tensor) -> None:
        if full and when == "backward" and output.requires_grad:
            output.register_hook(fail)  # by then the last layer's gradients are there

    method.loss = loss
    method.host.adapters["policy"][1].register_forward_hook(fail_on_the_way_back)


@pytest.mark.parametrize("when", ["forward", "backward"])
def test_out_of_memory_gives_what_a_smaller_budget_gives(tmp_path, capsys, when):
    """Bit for bit: nothing of the abandoned attempts is left, and dropout starts over."""
    method = toy.ToyMethod(toy.ToyHost())
    _small_device(method, 30, when)
    batches, plain_batch = [], method.batch
    method.batch = lambda step: batches.append(step) or plain_batch(step)
    host, _, _ = toy.run(tmp_path / "small", method=method, token_budget=90)
    assert batches == list(range(8))  # the examples are not drawn again
    notices = [line for line in capsys.readouterr().err.splitlines() if line.startswith("out of memory")]
    budget = checkpoint.newest_valid(tmp_path / "small").state["token_budget"]
    assert budget["asked"] == 90 and 15 <= budget["now"] <= 30
    assert notices and f"the token budget is now {budget['now']}" in notices[-1]
    roomy, _, _ = toy.run(tmp_path / "roomy", token_budget=budget["now"])
    assert torch.equal(toy.weights(host), toy.weights(roomy))


def test_out_of_memory_does_not_change_the_result(tmp_path):
    """Against a device where all fits, without dropout: equal but for the order of fp32 sums."""
    weights = []
    for room in (30, 1000):
        method = toy.ToyMethod(toy.ToyHost(dropout=0.0))
        _small_device(method, room, "forward")
        host, _, _ = toy.run(tmp_path / str(room), method=method, token_budget=90, optimizer="adamw")
        weights.append(toy.weights(host))
    # As above: Adam turns a rounding error in a tiny gradient into a part of a step.
    assert torch.allclose(*weights, rtol=1e-4, atol=1e-4) and not torch.equal(*weights)


def test_the_smaller_budget_is_kept_unless_another_is_asked_for(tmp_path):
    method = toy.ToyMethod(toy.ToyHost(), hook=toy.signal_at(3))
    _small_device(method, 30, "forward")
    toy.run(tmp_path, method=method, token_budget=90)
    kept = checkpoint.newest_valid(tmp_path).state["token_budget"]["now"]
    for budget, expected in ((90, kept), (50, 50)):
        again = toy.ToyMethod(toy.ToyHost(), hook=toy.signal_at(3))
        toy.run(tmp_path, method=again, token_budget=budget, resume=True)
        again.hook = toy.signal_at(4)
        toy.run(tmp_path, method=again, token_budget=budget, resume=True)
        assert checkpoint.newest_valid(tmp_path).state["token_budget"] == {"asked": budget, "now": expected}


def test_a_single_example_that_does_not_fit_is_told_with_its_source(tmp_path):
    method = toy.ToyMethod(toy.ToyHost())
    _small_device(method, 8, "backward")
    with pytest.raises(UserError) as caught:
        toy.run(tmp_path, method=method, token_budget=90)
    longest = max((method.examples[i] for i in step_order(40, 6, 0, 0)), key=lambda e: e.length)
    assert str(caught.value).startswith(
        f"out of memory with a single example of {longest.length} tokens, {longest.source}."
    )
    assert f"--data.max-length below {longest.length}" in str(caught.value) and "20.00 GiB" in str(caught.value)
