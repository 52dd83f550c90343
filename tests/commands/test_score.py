"""`lowalign score` against `host.scores` on each completion alone, for rows of preferences and of sft."""

import json

import pytest
import torch

from lowalign import Example, Host
from lowalign.cli import main
from lowalign.data.chat import Chat
from tests.commands.tiny_runs import FP32, load, make

PAIRS = [
    ("Where is Paris?", "France.", "The lazy dog jumps."),
    ("Who?", "A fox.", "The."),
    ("Why?", "No.", "Yes is it."),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = make(tmp_path_factory.mktemp("world"))
    turn = lambda role, text: {"role": role, "content": text}  # noqa: E731
    pairs = [{"prompt": [turn("user", p)], "chosen": a, "rejected": b} for p, a, b in PAIRS]
    sft = [{"messages": [turn("user", p), turn("assistant", a)]} for p, a, _ in PAIRS]
    for name, rows in (("pairs", pairs), ("sft", sft)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def alone(world) -> dict[tuple[str, str], float]:
    """The score of each answer, computed alone, at the token that ends the turn."""
    host = Host(load(world / "model"))
    chat = Chat(host.base.tokenizer)
    host.load("r", world / "reward")
    scores = {}
    for question, *answers in PAIRS:
        prompt = chat.prompt_ids([{"role": "user", "content": question}])
        for answer in answers:
            ids = [*chat.text_ids(answer)[len(chat.bos_ids) :], chat.end_of_turn]
            with host.use("r"), torch.no_grad():
                scores[question, answer] = host.scores([Example(prompt, [ids])], "r")[0].item()
    return scores


def ask(world, *more: str) -> list[str]:
    return ["score", "--model", f"{world}/model", "--adapter", f"{world}/reward", *FP32, *more]


@pytest.mark.parametrize("budget", ["1", "8192"])
def test_preferences(world, alone, tmp_path, capsys, budget):
    out = tmp_path / "scores.jsonl"
    assert main(ask(world, "--data", f"{world}/pairs.jsonl", "--out", str(out), "--token-budget", budget)) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    want = [
        (f"{world}/pairs.jsonl:{n}", answer, rank)
        for n, row in enumerate(PAIRS, 1)
        for rank, answer in enumerate(row[1:])
    ]
    ended = lambda text: text.removesuffix("<|im_end|>").strip()  # noqa: E731
    assert [(line["source"], ended(line["completion"]), line["rank"]) for line in lines] == want
    assert [line["score"] for line in lines] == pytest.approx(list(alone.values()), abs=1e-5)
    right = sum(alone[p, a] > alone[p, b] for p, a, b in PAIRS)
    assert f"{right / 3:.1%} of 3 pairs have the higher score on the better completion" in capsys.readouterr().err


def test_rows_of_sft(world, alone, capsys):
    assert main(ask(world, "--data", f"{world}/sft.jsonl", "--data.limit", "2")) == 0
    captured = capsys.readouterr()
    lines = [json.loads(line) for line in captured.out.splitlines()]
    assert [line["score"] for line in lines] == pytest.approx([alone[p, a] for p, a, _ in PAIRS[:2]], abs=1e-5)
    assert "rank" not in lines[0] and "pairs" not in captured.err


def test_wrong_use(world, tmp_path, capsys):
    for flags, says in {
        ("--data", f"{world}/pairs.jsonl", "--adapter", f"{world}/policy"): "is not a reward model",
        ("--data", f"{world}/none.jsonl"): "none.jsonl: no such file",
        (): "--data",
    }.items():
        assert main(ask(world, *flags)) == 1
        message = capsys.readouterr().err
        assert says in message and "Traceback" not in message
