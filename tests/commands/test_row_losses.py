"""`lowalign eval --per-row`, --data.max-loss and --data.min-loss, and `lowalign eval --refusals`."""

import json
import os
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel

import lowalign.commands.refusals as refusals
from lowalign.cli import main
from lowalign.config.sections import DataConfig
from lowalign.data.losses import filter_by_loss, quantile, row_losses
from lowalign.data.pack import Example
from lowalign.durable import write_jsonl
from lowalign.errors import UserError
from tests.commands.test_eval import PAIRS, RANKED, SFT
from tests.commands.tiny_runs import FP32, make

PROMPTS = [f"What is {i}?" for i in range(6)]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = make(tmp_path_factory.mktemp("losses"))
    write_jsonl(folder / "sft.jsonl", SFT)
    write_jsonl(folder / "pairs.jsonl", PAIRS)
    write_jsonl(folder / "ranked.jsonl", RANKED)
    write_jsonl(folder / "harmful.jsonl", [{"prompt": prompt} for prompt in PROMPTS[:4]])
    write_jsonl(folder / "harmless.jsonl", [{"prompt": prompt} for prompt in PROMPTS[4:]])
    write_jsonl(
        folder / "many.jsonl", [{"prompt": f"Which {i}?", "completion": f" The {i * 7919} fox"} for i in range(20)]
    )
    return folder


def evaluate(world: Path, *words: str) -> int:
    return main(["eval", "--model", str(world / "model"), *words, *FP32])


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_loss_of_each_row_is_that_of_stock_peft(world, tmp_path, capsys):
    """In fp64 sums; of preferences, that of the best answer."""
    files = [str(world / name) for name in ("sft.jsonl", "pairs.jsonl", "ranked.jsonl")]
    out = tmp_path / "losses.jsonl"
    assert evaluate(world, "--data", *files, "--adapter", str(world / "policy"), "--per-row", str(out)) == 0
    found = lines(out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(world / "model")
    ids = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    model = transformers.AutoModelForCausalLM.from_pretrained(world / "model")
    stock = PeftModel.from_pretrained(model, world / "policy").eval()

    @torch.no_grad()
    def loss(prompt: str, completion: str) -> float:
        x, y = ids(prompt), [*ids(completion), tokenizer.eos_token_id]
        logits = stock(torch.tensor([x + y])).logits[0, -len(y) - 1 : -1]
        return -logits.double().log_softmax(-1).gather(1, torch.tensor(y)[:, None]).mean().item()

    rows = [(row["prompt"], row["completion"]) for row in SFT] + [(row["prompt"], row["chosen"]) for row in PAIRS]
    rows += [(RANKED[0]["prompt"], RANKED[0]["completions"][1])]
    assert [line["tokens"] for line in found] == [len(ids(completion)) + 1 for _, completion in rows]
    policy = str(world / "policy")
    assert [line["loss"][policy] for line in found] == pytest.approx([loss(*row) for row in rows], abs=1e-4)
    with stock.disable_adapter():
        assert [line["loss"]["base"] for line in found] == pytest.approx([loss(*row) for row in rows], abs=1e-4)
    sources = [f"{files[0]}:{i + 1}" for i in range(3)] + [f"{files[1]}:{i + 1}" for i in range(9)] + [f"{files[2]}:1"]
    assert [line["source"] for line in found] == sources
    worst = max(found, key=lambda line: line["loss"]["base"])
    err = capsys.readouterr().err
    assert f"highest loss under base: {worst['source']} {worst['loss']['base']:.3f}" in err


def test_training_leaves_out_the_rows_beyond_the_bounds(world, tmp_path, monkeypatch, capsys):
    """By quantile and by value; the steps, the report and the log are of the rows that are left. A relative path is the same file."""
    monkeypatch.chdir(tmp_path)
    data = str(world / "many.jsonl")
    assert evaluate(world, "--data", data, "--per-row", "losses.jsonl") == 0
    by_loss = sorted(lines(tmp_path / "losses.jsonl"), key=lambda line: line["loss"]["base"])
    train = ["sft", "--model", str(world / "model"), *FP32, "--train.optimizer", "adamw", "--train.batch-size", "1"]
    train += ["--data.losses", "losses.jsonl"]
    rows = ["--data", os.path.relpath(data)]
    bounds = ["--data.max-loss", "90%", "--data.min-loss", repr(by_loss[3]["loss"]["base"])]
    capsys.readouterr()
    assert main([*train, *rows, "--out", "run", *bounds]) == 0
    report = json.loads((tmp_path / "run" / "data_report.json").read_text())
    assert (report["filtered"]["above"], report["filtered"]["below"], report["filtered"]["rows"]) == (2, 3, 20)
    assert report["filtered"]["max_loss"] == by_loss[17]["loss"]["base"] and report["cleaning"]["compared"] == 15
    err = capsys.readouterr().err
    assert (
        f"2 of 20 rows left out: their loss under base is above {by_loss[17]['loss']['base']:.4g} nats a token" in err
    )
    assert lines(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == 15
    for words, message in (
        (["--data.max-loss", "0.001"], "no row is left: the loss of none is within --data.max-loss 0.001"),
        (["--data.max-loss", "high"], "--data.max-loss is high; it must be nats per token, such as 2.5, or a quantile"),
        (["--data.max-loss", "101%"], "--data.max-loss is 101%"),
        (["--data.max-loss", "nan"], "--data.max-loss is nan"),
        ([], "--data.losses FILE goes with --data.max-loss or --data.min-loss"),
        (["--data.max-loss", "90%", "--data", str(world / "sft.jsonl")], "sft.jsonl:1 has no loss in --data.losses"),
    ):
        assert main([*train, *([] if "--data" in words else rows), "--out", "other", *words]) == 1
        err = capsys.readouterr().err
        assert message in err and "Traceback" not in err
    changed = [{"prompt": "Which?", "completion": f" A {i} dog"} for i in range(20)]
    (tmp_path / "copy.jsonl").write_bytes((world / "many.jsonl").read_bytes())
    assert evaluate(world, "--data", "copy.jsonl", "--per-row", "losses.jsonl") == 0
    write_jsonl(tmp_path / "copy.jsonl", changed)
    assert main([*train, "--out", "other", "--data", "copy.jsonl", "--data.max-loss", "90%"]) == 1
    assert "copy.jsonl:1 is another row than the one in --data.losses" in capsys.readouterr().err


def test_preferences_are_filtered_by_the_loss_of_their_best_answers(world, tmp_path, capsys):
    """Of dpo and of reward; data check says the same before."""
    data, losses = str(world / "pairs.jsonl"), str(tmp_path / "losses.jsonl")
    assert evaluate(world, "--data", data, "--per-row", losses) == 0
    bound = sorted(line["loss"]["base"] for line in lines(tmp_path / "losses.jsonl"))[4]
    filtered = ["--data.losses", losses, "--data.max-loss", "50%"]  # of 9 rows: the fifth is the highest
    message = f"4 of 9 rows left out: their loss under base is above {bound:.4g} nats a token"
    for verb in ("dpo", "reward"):
        words = ["--model", str(world / "model"), "--data", data, "--out", str(tmp_path / verb), "--train.steps", "1"]
        capsys.readouterr()
        assert main([verb, *words, *filtered, *FP32, "--train.optimizer", "adamw"]) == 0
        assert message in capsys.readouterr().err
        report = json.loads((tmp_path / verb / "data_report.json").read_text())
        assert (report["filtered"]["above"], report["cleaning"]["compared"]) == (4, 5)
    check = ["data", "check", data, "--model", str(world / "model"), *filtered]
    assert main(check) == 0
    assert message in capsys.readouterr().out
    assert main([*check, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["filtered"] == report["filtered"]


def test_all_examples_of_a_row_go_together_and_quantiles_are_nearest_ranks(tmp_path):
    for file, message in (("no.jsonl", "cannot be read"), ("bad.jsonl", r"bad.jsonl:1: no line of lowalign eval")):
        (tmp_path / "bad.jsonl").write_text('{"prompt": "q"}')
        with pytest.raises(UserError, match=message):
            filter_by_loss([], DataConfig(losses=tmp_path / file, max_loss="90%"))
    examples = [Example([1], [[i, 5]], source=f"f:{i // 2}") for i in range(8)]
    found = row_losses(examples, {"base": [[-float(i)] for i in range(8)]})
    assert [(line["loss"]["base"], line["tokens"]) for line in found] == [(0.25, 4), (1.25, 4), (2.25, 4), (3.25, 4)]
    write_jsonl(tmp_path / "l.jsonl", found)
    kept, counts = filter_by_loss(examples, DataConfig(losses=tmp_path / "l.jsonl", max_loss="75%", min_loss="1"))
    assert kept == examples[2:6] and (counts["above"], counts["below"], counts["max_loss"]) == (1, 1, 2.25)
    assert filter_by_loss(examples, DataConfig()) == (examples, {})
    values = [4.0, 1.0, 3.0, 2.0]
    assert [quantile(values, share) for share in (0, 0.25, 0.26, 0.5, 1)] == [1, 1, 2, 2, 4]
    assert quantile(range(1, 101), 0.55) == 55  # in floats 0.55 * 100 is a little more
    with pytest.raises(UserError, match="has no loss"):
        filter_by_loss([Example([1], [[2]], source="g:1")], DataConfig(losses=tmp_path / "l.jsonl", max_loss="5"))


def test_refusal_rates_by_file_before_and_after(world, tmp_path, monkeypatch, capsys):
    """By phrases and by a function; the answers are those of `generate`."""
    files = [str(world / "harmful.jsonl"), str(world / "harmless.jsonl")]
    words = ["--refusals", "--data", *files, "--adapter", str(world / "policy"), "--sampling.max-new-tokens", "6"]
    out, answers = tmp_path / "rates.json", tmp_path / "answers.jsonl"
    assert evaluate(world, *words, "--out", str(out), "--per-row", str(answers)) == 0
    rates = json.loads(out.read_text())["results"]
    assert rates["base"][files[0]] == {
        "prompts": 4,
        "refused": 0,
        "rate": 0.0,
        "interval": [0.0, pytest.approx(0.48989, abs=1e-4)],
    }
    found = lines(answers)
    assert len(found) == 12 and [line["policy"] for line in found] == ["base"] * 6 + [str(world / "policy")] * 6
    generated = tmp_path / "generated.jsonl"
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    ask = [
        "generate",
        "--model",
        str(world / "model"),
        "--data",
        str(tmp_path / "prompts.jsonl"),
        "--out",
        str(generated),
    ]
    assert main([*ask, "--sampling.max-new-tokens", "6", "--sampling.temperature", "0", *FP32]) == 0
    assert [line["completion"] for line in found[:6]] == [line["completion"] for line in lines(generated)]
    (tmp_path / "judge.py").write_text(
        "def even(prompts, completions):\n    return [0.5 if int(p.split()[-1][:-1]) % 2 == 0 else 0.4 for p in prompts]\n"
    )
    (tmp_path / "needy.py").write_text("def f(prompts, completions, answer):\n    return answer\n")
    capsys.readouterr()
    assert evaluate(world, *words, "--out", str(out), "--refusal-judge", f"{tmp_path / 'judge.py'}:even") == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["refused", *files] and table[1].split()[:2] == ["base", "50.0%"]
    monkeypatch.setattr(refusals, "refuses", lambda text: True)
    assert evaluate(world, *words, "--out", str(out)) == 0
    assert json.loads(out.read_text())["results"]["base"][files[1]]["rate"] == 1.0
    for wrong, message in (
        (["--refusals", "--tasks", "arc_easy"], "are about --data, not about --tasks"),
        (["--refusal-judge", "x.py:f", "--data", files[0]], "is an option of --refusals"),
        (
            ["--refusals", "--data", files[0], "--refusal-judge", "x.py:f"],
            "--refusal-judge x.py:f: there is no file x.py",
        ),
        (
            ["--refusals", "--data", files[0], "--refusal-judge", f"{tmp_path / 'needy.py'}:f"],
            "needy.py:1: f requires answer; a refusal judge gets prompts and completions",
        ),
        (
            ["--refusals", "--data", files[0], "--refusal-judge", "nan*x.py:f"],
            "--refusal-judge nan*x.py:f: expected",
        ),
        (["--data", files[0], "--per-row", "no/file.jsonl"], "--per-row no/file.jsonl: there is no folder no"),
    ):
        assert evaluate(world, *wrong) == 1
        err = capsys.readouterr().err
        assert message in err and "Traceback" not in err
