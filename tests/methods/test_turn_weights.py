"""Turns with weights of their own: the loss against a plain fp64 formula, through cache, truncation, micro-batches and eval."""

import json
from pathlib import Path

import pytest
import torch

from lowalign.cli import main
from lowalign.config.sections import DataConfig, TrainConfig
from lowalign.data.chat import Chat
from lowalign.data.dataset import load_examples
from lowalign.data.micro_batches import micro_batches
from lowalign.data.pack import Example, total_weight
from lowalign.data.truncate import fit
from lowalign.durable import write_jsonl
from lowalign.methods.losses import negative_log_likelihood
from lowalign.methods.sft import SFT, weighted
from tests.commands.tiny_runs import FP32
from tests.methods.made import gradient, host_with
from tests.tiny import tiny_folder


def talk(*weights: float | None) -> dict:
    """A conversation whose answers have these weights; None: no key."""
    messages = []
    for k, weight in enumerate(weights):
        answer = {"role": "assistant", "content": f" the fox {k} jumps" * (k + 1)}
        answer |= {} if weight is None else {"weight": weight}
        messages += [{"role": "user", "content": f"what is {k}"}, answer]
    return {"messages": messages}


ROWS = [talk(0.5, None, 0, 2.5), talk(None, 0.25), talk(1, None), talk(3)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    tiny_folder(folder / "model", "llama")
    write_jsonl(folder / "rows.jsonl", ROWS)
    return folder


@pytest.fixture(scope="module")
def host(world: Path):
    return host_with(world / "model")


def load(world: Path, host, monkeypatch: pytest.MonkeyPatch, **options) -> list[Example]:
    monkeypatch.setenv("LOWALIGN_CACHE", str(world / "cache"))
    return load_examples([str(world / "rows.jsonl")], Chat(host.base.tokenizer), DataConfig(**options)).examples


def plain_loss(host, examples: list[Example]) -> torch.Tensor:
    """Σ w nll / Σ w in fp64, row by row; the weights are found from the texts, not from the Examples."""
    total, weights = torch.zeros((), dtype=torch.float64), 0.0
    for example, row in zip(examples, ROWS, strict=True):
        expected = [turn.get("weight", 1) for turn in row["messages"] if turn["role"] == "assistant"]
        answers = iter([weight for weight in expected if weight])  # an answer of weight 0 is not supervised
        ids, by_token, weight = example.prompt + example.completions[0], [], 0.0
        for supervised in example.mask(0):
            weight = (weight or next(answers)) if supervised else 0.0
            by_token.append(weight)
        logits = host.base.model(torch.tensor([ids])).logits[0, len(example.prompt) - 1 : -1]
        nll = -logits.double().log_softmax(-1).gather(1, torch.tensor(example.completions[0])[:, None])[:, 0]
        total = total + (nll * torch.tensor(by_token, dtype=torch.float64)).sum()
        weights += sum(by_token)
    return total / weights


def test_a_value_worked_by_hand() -> None:
    example = Example([1], [[5, 6, 7]], [[True, False, True]], token_weights=[[0.5, 0.5, 2.0]])
    logps = weighted([[torch.tensor([-1.0, 0.0, -4.0])]], [example])
    assert total_weight([example]) == 2.5
    assert negative_log_likelihood(logps, 2.5).item() == pytest.approx((0.5 * 1 + 2 * 4) / 2.5)
    assert example.weights(0) == [0.5, 0, 2.0] and example.supervised == 2


def test_loss_and_gradient_are_the_weighted_formula_whatever_the_micro_batch(world, host, monkeypatch) -> None:
    examples = load(world, host, monkeypatch, cache=False)
    with host.use("policy"):
        plain = plain_loss(host, examples)
        plain.backward()
    expected = gradient(host)
    host.training("on")
    method = SFT(host, examples, ("policy",), TrainConfig())
    normalizers = method.normalizers(examples)
    for budget, groups in ((1000, 1), (1, 4)):
        parts = micro_batches(examples, budget)
        assert len(parts) == groups
        loss = 0.0
        for part in parts:
            share, _ = method.loss(part, normalizers)
            share.backward()
            loss += share.item()
        assert loss == pytest.approx(plain.item(), rel=2e-6)
        assert (gradient(host) - expected).norm() <= 1e-5 * expected.norm()


def test_rows_without_fractions_stay_masks_and_the_cache_keeps_weights(world, host, monkeypatch) -> None:
    fresh = load(world, host, monkeypatch)
    assert [e.token_weights is None for e in fresh] == [False, False, True, False]
    assert load(world, host, monkeypatch) == fresh and any((world / "cache").rglob("*.safetensors"))
    assert {w for w in fresh[0].token_weights[0] if w} == {0.5, 1, 2.5} and set(fresh[3].token_weights[0]) == {3}
    assert fresh[0].masks[0] == [w > 0 for w in fresh[0].token_weights[0]]


def test_a_cut_row_keeps_the_weights_of_what_is_left(world, host, monkeypatch) -> None:
    whole = load(world, host, monkeypatch, cache=False)[0]
    first = whole.mask(0).index(False) + len(whole.prompt)
    cut = load(world, host, monkeypatch, cache=False, max_length=first + 2)[0]
    assert set(cut.token_weights[0]) == {0.5} and len(cut.completions[0]) == first - len(whole.prompt)
    short, what = fit(whole, 20, [])
    assert what == "completion" and short.token_weights == [whole.token_weights[0][:20]]


def test_held_out_loss_eval_and_each_row_weigh_the_same(world, host, monkeypatch, tmp_path, capsys) -> None:
    """The numbers of sft, eval and eval --per-row are those of the formula."""
    examples = load(world, host, monkeypatch, cache=False)
    rows, model = str(world / "rows.jsonl"), str(world / "model")
    train = ["sft", "--model", model, "--data", rows, "--data.eval", rows, "--out", str(tmp_path / "run"), *FP32]
    assert main([*train, "--train.steps", "1", "--train.optimizer", "adamw"]) == 0
    first = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])
    measured, per_row = tmp_path / "eval.json", tmp_path / "rows.jsonl"
    words = ["--data", rows, "--out", str(measured), "--per-row", str(per_row)]
    assert main(["eval", "--model", model, *words, *FP32]) == 0
    loss = json.loads(measured.read_text())["results"]["base"]["loss"]
    with torch.no_grad(), host.use():
        assert loss == pytest.approx(plain_loss(host, examples).item(), rel=2e-6)
    assert first["eval/loss"] == pytest.approx(loss, rel=2e-6)
    lines = [json.loads(line) for line in per_row.read_text().splitlines()]
    nats = sum(line["loss"]["base"] * total_weight([e]) for line, e in zip(lines, examples, strict=True))
    assert nats / total_weight(examples) == pytest.approx(loss, rel=1e-9)
    capsys.readouterr()
    check = ["data", "check", rows, "--model", model, "--examples", str(tmp_path / "examples.jsonl")]
    assert main(check) == 0
    assert "weights of its turns 0.5, 1, 2.5" in capsys.readouterr().out
    stored = [json.loads(line) for line in (tmp_path / "examples.jsonl").read_text().splitlines()]
    assert stored[0]["token_weights"] == examples[0].token_weights and "token_weights" not in stored[2]


def test_methods_that_cannot_weigh_refuse(world, tmp_path, capsys) -> None:
    question, answer = ROWS[3]["messages"]
    pair = {"prompt": [question], "chosen": [answer | {"weight": 0.5}], "rejected": [answer | {"content": "no"}]}
    write_jsonl(tmp_path / "pairs.jsonl", [pair])
    for verb in ("dpo", "reward"):
        words = ["--data", str(tmp_path / "pairs.jsonl"), "--out", str(tmp_path / "out"), *FP32]
        assert main([verb, "--model", str(world / "model"), *words]) == 1
        err = capsys.readouterr().err
        assert 'pairs.jsonl:1: a turn has a "weight" of 0.5; only lowalign sft weighs turns' in err
