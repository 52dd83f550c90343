"""`lowalign best-of-n` on a tiny base: a prefix policy with a LoRA reward, kill and resume, and its rounds."""

import json
import os
import shutil
import signal
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from lowalign import Example, Host, Sampling
from lowalign.cli import main
from lowalign.commands import best_of_n
from lowalign.config.commands import BestOfNConfig
from lowalign.config.recipe import parse
from lowalign.config.sections import DataConfig, PreferenceConfig
from lowalign.data.chat import Chat
from lowalign.data.dataset import load_examples
from lowalign.data.preferences import load_preferences
from lowalign.errors import UserError
from lowalign.model.adapters.flat import FlatWeights
from tests.commands.tiny_runs import FP32, load, make
from tests.train import toy

ASKED = ["Where is Paris?", "Who jumps?", "What is lazy?", "The dog.", "Is it quick?", "A fox?", "Why?", "How?", "No.", "Yes."]  # fmt: skip
FILES = ("candidates.jsonl", "best.jsonl", "pairs.jsonl", "rankings.jsonl", "report.json")
# Rewards the share of vowels. Where a file names a call, that call sends its process the signal written in it.
VOWELS = """
import os, pathlib, signal

def vowels(prompts, completions):
    file = pathlib.Path({signal!r})
    if file.exists():
        name, calls = file.read_text().split()
        if calls == "1":
            file.unlink()
            os.kill(os.getpid(), signal.Signals[name])
        else:
            file.write_text(f"{{name}} {{int(calls) - 1}}")
    return [sum(c in "aeiou" for c in text) / (1 + len(text)) for text in completions]
"""


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(best_of_n, "PROMPTS_PER_BLOCK", 4)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = make(tmp_path_factory.mktemp("world"))
    rows = [{"prompt": ASKED[0]}, {"prompt": ASKED[0], "chosen": "x", "rejected": "y"}]
    rows += [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": "x"}]} for q in ASKED[1:]]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "vowels.py").write_text(VOWELS.format(signal=str(folder / "signal")))
    return folder


def flags(world: Path, out: Path, *more: str, reward: str = "vowels.py:vowels") -> list[str]:
    return [
        "best-of-n", "--model", f"{world}/model", "--adapter", f"{world}/policy", "--data", f"{world}/rows.jsonl",
        "--reward", f"{world}/{reward}", "--out", str(out), "--n", "4", "--sampling.max-new-tokens", "9",
        "--unfinished", "keep", "--data.prompt-format", "chat", *FP32, *more,
    ]  # fmt: skip


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def contents(out: Path) -> list[bytes]:
    return [(out / name).read_bytes() for name in FILES]


@pytest.fixture(scope="module")
def straight(world, tmp_path_factory):
    """An uninterrupted run with the function."""
    out = tmp_path_factory.mktemp("straight") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(best_of_n, "PROMPTS_PER_BLOCK", 4)
        assert main(flags(world, out)) == 0
    return out


def test_a_prefix_policy_with_a_lora_reward_on_one_base(world, tmp_path, capsys):
    """Every completion and its score are those of its prompt alone: sampled under the prefix, scored under the LoRA."""
    out = tmp_path / "a run"
    # With this seed no token flips under noise of 1e-4 in the logits; alone and together they differ by 1e-5 at most.
    assert main(flags(world, out, "--sampling.seed", "5", reward="reward")) == 0, capsys.readouterr().err
    log, policy = (
        capsys.readouterr().err,
        f"--model {world}/model --init {world}/policy",
    )  # which goes on from what was sampled
    assert f"Next: lowalign dpo lora/dpo {policy} --data '{out}/pairs.jsonl' --out DIR\nor: lowalign sft " in log
    assert f"{len(ASKED)} prompts, none longer than" in log
    host = Host(load(world / "model"))
    chat = Chat(host.base.tokenizer)
    host.base.eos_ids = (*host.base.eos_ids, chat.end_of_turn)
    host.load("prefix", world / "policy")
    host.load("lora", world / "reward")
    candidates = lines(out / "candidates.jsonl")
    prompts = [[{"role": "user", "content": q}] for q in ASKED]
    assert [line["prompt"] for line in candidates] == prompts  # each once, without the answers
    for i, line in enumerate(candidates):
        ids = chat.prompt_ids([{"role": "user", "content": ASKED[i]}])
        with host.use("prefix"):
            (drawn,) = host.generate([ids], 4, Sampling(max_new_tokens=9, seed=5), seeds=[i])
        with host.use("lora"), torch.no_grad():
            end = lambda c: [*c.ids[:-1], chat.end_of_turn] if c.stopped else c.ids  # noqa: E731
            scores = [host.scores([Example(ids, [end(c)])], "lora")[0].item() for c in drawn]
        completions = line["completions"]
        decode = lambda c: host.base.tokenizer.decode(c.ids, skip_special_tokens=True)  # noqa: E731
        assert [c["completion"] for c in completions] == [decode(c) for c in drawn]
        assert [c["score"] for c in completions] == pytest.approx(scores, abs=1e-5)
        assert [(c["stopped"], c["tokens"]) for c in completions] == [(c.stopped, len(c.ids)) for c in drawn]


def test_a_function_with_the_columns_of_the_rows(world, tmp_path, capsys):
    """Blocks whose rows lack a column get None for it; a changed column is refused on --resume."""
    rows = [{"prompt": f"What is {i}?"} | ({"answer": i} if i < 2 else {}) for i in range(6)]
    data, file = tmp_path / "rows.jsonl", tmp_path / "f.py"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    file.write_text(
        "def f(prompts, completions, answer, stopped, completion_ids):\n"
        "    for prompt, number in zip(prompts, answer):\n"
        "        assert prompt[0]['content'] == f'What is {number}?' if number in (0, 1) else number is None\n"
        "    return [10 * stop + len(ids) for stop, ids in zip(stopped, completion_ids)]\n"
    )
    command = [*flags(world, tmp_path / "out"), "--data.max-length", "200"]
    command[command.index("--data") + 1] = str(data)
    command[command.index("--reward") + 1] = f"{file}:f"
    assert main(command) == 0, capsys.readouterr().err
    completions = [c for line in lines(tmp_path / "out/candidates.jsonl") for c in line["completions"]]
    assert len(completions) == 24
    assert [c["score"] for c in completions] == [10 * c["stopped"] + c["tokens"] for c in completions]
    data.write_text("".join(json.dumps(row | {"answer": 7}) + "\n" for row in rows))
    assert main([*command, "--resume"]) == 1
    assert "columns: the content has changed" in capsys.readouterr().err
    file.write_text("def f(prompts, completions, solution):\n    return 0\n")
    assert main([*command, "--out", str(tmp_path / "other")]) == 1
    assert "f.py:1: f requires solution, which is no column of the prompts' rows" in capsys.readouterr().err
    assert not (tmp_path / "other/candidates.jsonl").exists()


def test_a_reward_that_fails_leaves_the_base_without_adapters(world, tmp_path):
    (world / "fails.py").write_text("def f(prompts, completions):\n    return 1 / 0\n")
    base = load(world / "model")
    words = flags(world, tmp_path / "out", str(world / "fails.py") + ":f", reward="reward")
    words.insert(words.index("--out"), words.pop())
    with pytest.raises(UserError, match=r"fails.py:2: f: ZeroDivisionError"):
        best_of_n.best_of_n(parse(BestOfNConfig, [*words[1:], "--allow-training-spread"]), base)
    assert not [name for name, _ in base.model.named_parameters() if "lora_" in name]


def test_best_pairs_and_rankings(straight):
    rows, report = lines(straight / "candidates.jsonl"), json.loads((straight / "report.json").read_text())
    best, pairs, rankings = (lines(straight / f"{name}.jsonl") for name in ("best", "pairs", "rankings"))
    assert report["prompts"] == len(rows) == len(ASKED)
    assert (report["best"], report["pairs"], report["rankings"]) == (len(best), len(pairs), len(rankings))
    assert len(best) == len(ASKED) and len(pairs) > 5
    scores = {q: {c["completion"]: c["score"] for c in row["completions"]} for q, row in zip(ASKED, rows, strict=True)}
    for row in best:
        user, assistant = row["messages"]
        assert scores[user["content"]][assistant["content"]] == max(scores[user["content"]].values())
    for row in pairs:
        by_text = scores[row["prompt"][0]["content"]]
        assert by_text[row["chosen"][0]["content"]] == max(by_text.values()) > by_text[row["rejected"][0]["content"]]
        assert by_text[row["rejected"][0]["content"]] == min(by_text.values())
    for row in rankings:
        by_text = scores[row["prompt"][0]["content"]]
        by_rank = sorted(zip(row["ranks"], (by_text[c[0]["content"]] for c in row["completions"]), strict=True))
        assert len(by_rank) == 4
        assert all((a == b) == (x == y) and x >= y for (a, x), (b, y) in pairwise(by_rank))
    groups = [[c["score"] for c in row["completions"]] for row in rows]
    assert report["mean_reward"]["1"] == pytest.approx(sum(map(sum, groups)) / 40)
    assert report["mean_reward"]["4"] == pytest.approx(sum(map(max, groups)) / 10)
    assert report["acceptance"] == sum(max(g) > g[0] for g in groups) / 10
    assert report["gain"] == pytest.approx(report["mean_reward"]["4"] - report["mean_reward"]["1"])


def test_the_files_are_read_by_the_next_stage(world, straight):
    tokenizer = load(world / "model").tokenizer
    chat = Chat(tokenizer)
    sft = load_examples([str(straight / "best.jsonl")], chat, DataConfig(cache=False))
    assert [e.prompt for e in sft.examples] == [chat.prompt_ids([{"role": "user", "content": q}]) for q in ASKED]
    decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=True)  # noqa: E731
    for name in ("pairs", "rankings"):
        rows = lines(straight / f"{name}.jsonl")
        read = load_preferences([str(straight / f"{name}.jsonl")], chat, PreferenceConfig(cache=False))  # fmt: skip
        assert len(read.examples) == len(rows)
        for example, row in zip(read.examples, rows, strict=True):
            answers = row["completions"] if name == "rankings" else [row["chosen"], row["rejected"]]
            ranks = row.get("ranks", [1, 2])
            rank_by_text = {c[0]["content"].strip(): r for c, r in zip(answers, ranks, strict=True)}
            got = [rank_by_text[decode(c).removesuffix("<|im_end|>").strip()] for c in example.completions]
            order = lambda values: [[a < b for b in values] for a in values]  # noqa: E731
            assert order(got) == order(example.rank)


def test_blank_repeated_and_unfinished_completions(tmp_path):
    from lowalign.rewards.selection import write_datasets

    sample = lambda text, score, stopped=True: {"completion": text, "score": score, "stopped": stopped}  # noqa: E731
    candidates = [
        {
            "prompt": "p",
            "completions": [sample(" ", 9), sample("cut", 5, False), sample("a", 2), sample("b", 3), sample("b", 3)],
        },
        {"prompt": "q", "completions": [sample("cut", 5, False), sample("", 1)]},
        {"prompt": "r", "completions": [sample("same", 1), sample("as", 1)]},
    ]
    assert write_datasets(tmp_path, candidates, unfinished=False) == {"best": 2, "pairs": 1, "rankings": 1}
    assert lines(tmp_path / "best.jsonl") == [{"prompt": "p", "completion": "b"}, {"prompt": "r", "completion": "same"}]
    assert lines(tmp_path / "pairs.jsonl") == [{"prompt": "p", "chosen": "b", "rejected": "a"}]
    assert lines(tmp_path / "rankings.jsonl") == [{"prompt": "p", "completions": ["a", "b"], "ranks": [2, 1]}]
    assert write_datasets(tmp_path, candidates, unfinished=True)["best"] == 3
    assert lines(tmp_path / "rankings.jsonl") == [{"prompt": "p", "completions": ["cut", "a", "b"], "ranks": [1, 3, 2]}]
    assert [row["completion"] for row in lines(tmp_path / "best.jsonl")] == ["cut", "cut", "same"]


def test_a_ranking_never_prefers_an_answer_that_was_cut_off(tmp_path):
    """It would be trained to end there. One that scores below all finished ones is worse than these, and no better than
    another one that was cut off; with a score between finished ones it is left out."""
    from lowalign.rewards.selection import write_datasets

    sample = lambda text, score, stopped: {"completion": text, "score": score, "stopped": stopped}  # noqa: E731
    answers = [("first", 9, False), ("a", 8, True), ("between", 7, False), ("b", 6, True), ("low", 1, False), ("lower", 0, False)]  # fmt: skip
    candidates = [
        {"prompt": "p", "completions": [sample(*answer) for answer in answers]},
        {"prompt": "q", "completions": [sample("cut", 1, False), sample("also", 0, False)]},
        {"prompt": "r", "completions": [sample("cut", 1, False), sample("a", 0, True)]},
    ]
    assert write_datasets(tmp_path, candidates, unfinished=False) == {"best": 2, "pairs": 1, "rankings": 1}
    (ranking,) = lines(tmp_path / "rankings.jsonl")
    assert dict(zip(ranking["completions"], ranking["ranks"], strict=True)) == {"a": 1, "b": 2, "low": 3, "lower": 3}
    assert lines(tmp_path / "pairs.jsonl") == [{"prompt": "p", "chosen": "a", "rejected": "lower"}]


def test_earlier_answers_of_a_prompt_are_not_supervised(tmp_path):
    from lowalign.rewards.selection import write_datasets

    turns = [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"))]
    candidates = [{"prompt": turns, "completions": [{"completion": "d", "score": 1, "stopped": True}]}]
    write_datasets(tmp_path, candidates, unfinished=False)
    assert [t.get("weight", 1) for t in lines(tmp_path / "best.jsonl")[0]["messages"]] == [1, 0, 1, 1]


@pytest.mark.parametrize("share", [0.0, 0.013, 0.35, 0.41, 0.72, 0.999])
def test_cut_off_at_any_byte_and_resumed(world, straight, tmp_path, share):
    out = shutil.copytree(straight, tmp_path / "run")
    whole = (out / "candidates.jsonl").read_bytes()
    for name in FILES:
        (out / name).unlink()
    (out / "candidates.jsonl").write_bytes(whole[: int(len(whole) * share)])
    assert main(flags(world, out, "--resume")) == 0
    assert contents(out) == contents(straight)


def small_blocks_main(arguments: list[str]) -> None:
    best_of_n.PROMPTS_PER_BLOCK = 4
    main(arguments)


def test_killed_and_resumed(world, straight, tmp_path):
    """SIGKILL while the second block is scored."""
    out = tmp_path / "run"
    (world / "signal").write_text("SIGKILL 2")
    assert toy.in_child(small_blocks_main, flags(world, out)) == -signal.SIGKILL
    assert len(lines(out / "candidates.jsonl")) == 4
    assert main(flags(world, out, "--resume")) == 0
    assert contents(out) == contents(straight)


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_stopped_by_a_signal_and_resumed(world, straight, tmp_path, capsys, name, code):
    out = tmp_path / "run"
    before = signal.getsignal(signal.SIGTERM)
    (world / "signal").write_text(f"{name} 3")
    assert main(flags(world, out)) == code
    assert f"stopped by {name}; go on with the same command and --resume" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before
    assert len(lines(out / "candidates.jsonl")) == 8
    assert main(flags(world, out, "--resume")) == 0
    assert contents(out) == contents(straight)


ROUNDS = ("--rounds", "2", "--sampling.seed", "5", "--train", "--sft.adapter.kind", "prefix", "--sft.train.steps", "2", "--sft.train.save-every", "1", "--sft.train.batch-size", "4", "--sft.train.learning-rate", "0.5", "--data.limit", "6")  # fmt: skip


@pytest.fixture(scope="module")
def rounds(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("rounds") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(best_of_n, "PROMPTS_PER_BLOCK", 4)
        assert main(flags(world, out, *ROUNDS)) == 0
    return out


def weights(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def test_a_round_samples_from_the_policy_of_the_round_before(world, rounds):
    assert weights(rounds / "round-1/sft") != weights(rounds / "round-2/sft")
    host = Host(load(world / "model"))
    chat = Chat(host.base.tokenizer)
    host.base.eos_ids = (*host.base.eos_ids, chat.end_of_turn)
    for k, policy in ((1, world / "policy"), (2, rounds / "round-1/sft")):
        host.load(f"policy{k}", policy)
        with host.use(f"policy{k}"):
            ids = [chat.prompt_ids([{"role": "user", "content": q}]) for q in ASKED[:6]]
            drawn = host.generate(ids, 4, Sampling(max_new_tokens=9, seed=4 + k))
        texts = [
            [c["completion"] for c in line["completions"]] for line in lines(rounds / f"round-{k}/candidates.jsonl")
        ]
        assert texts == [[host.base.tokenizer.decode(c.ids, skip_special_tokens=True) for c in cs] for cs in drawn]


def test_a_round_continues_training_the_weights_of_the_round_before(world, rounds, tmp_path):
    """With a learning rate that is 0 in fp32, two rounds return the policy they started from, bit for bit."""
    out = tmp_path / "still"
    assert main(flags(world, out, *ROUNDS, "--sft.train.learning-rate", "1e-300")) == 0
    before = Host(load(world / "model"))
    before.load("a", world / "policy")
    before.load("b", out / "round-2/sft")
    assert all(torch.equal(p, q) for p, q in zip(before.parameters("a"), before.parameters("b"), strict=True))


@pytest.mark.parametrize("calls", [1, 3, 4])
def test_rounds_stopped_and_resumed(world, rounds, tmp_path, calls):
    """In the first round, and in the second one before and after its first block."""
    out = tmp_path / "run"
    (world / "signal").write_text(f"SIGTERM {calls}")
    assert main(flags(world, out, *ROUNDS)) == 143
    assert main(flags(world, out, *ROUNDS, "--resume")) == 0
    for k in (1, 2):
        assert contents(out / f"round-{k}") == contents(rounds / f"round-{k}")
        assert weights(out / f"round-{k}/sft") == weights(rounds / f"round-{k}/sft")


def test_wrong_use(world, straight, tmp_path, capsys):
    def refused(*arguments) -> str:
        capsys.readouterr()
        assert main(list(arguments)) == 1
        message = capsys.readouterr().err
        assert "Traceback" not in message
        return message

    assert "holds results of an earlier run: go on with --resume" in refused(*flags(world, straight))
    assert "n: 4 -> 5" in refused(*flags(world, straight, "--resume", "--n", "5"))
    function = world / "vowels.py"
    text = function.read_text()
    function.write_text(text + "#")
    assert f"{function}: the content has changed" in refused(*flags(world, straight, "--resume"))
    function.write_text(text)
    out = tmp_path / "out"
    assert "--rounds goes with --train" in refused(*flags(world, out, "--rounds", "2"))
    assert "is PREFIX_TUNING, not LORA; set --sft.adapter.kind" in refused(*flags(world, out, "--train"))
    assert "no prompt" in refused(*flags(world, out, "--data.max-length", "1"))
    no_data = ["best-of-n", "--model", f"{world}/model", "--reward", f"{world}/reward", "--out", str(out)]
    assert "no prompts: give --data" in refused(*no_data)
    no_reward = ["best-of-n", "--model", f"{world}/model", "--data", f"{world}/rows.jsonl", "--out", str(out)]
    assert "no reward: give --reward" in refused(*no_reward)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "fine"}\n{"question": "?"}\n')
    assert f"{bad}:2: expected" in refused(*flags(world, out, "--data", str(bad)))
    assert not (out / "candidates.jsonl").exists()


def test_a_signal_in_the_middle_of_training(world, rounds, tmp_path, monkeypatch):
    """A signal after a step of the second round's training: it saves, and resumes from there."""
    out, sync_working_copy, steps = tmp_path / "run", FlatWeights.sync_working_copy, []

    def step(flat):
        steps.append(sync_working_copy(flat))
        if len(steps) == 3:  # two in the first round
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(FlatWeights, "sync_working_copy", step)
    assert main(flags(world, out, *ROUNDS)) == 143
    assert (out / "round-2/sft/checkpoints/step-000001").is_dir() and not (out / "round-2/sft/adapter").exists()
    monkeypatch.undo()
    assert main(flags(world, out, *ROUNDS, "--resume")) == 0
    assert weights(out / "round-2/sft") == weights(rounds / "round-2/sft")


def test_more_rounds_may_be_added(world, rounds, tmp_path):
    """With a third round added later, the first two stay the same."""
    out = shutil.copytree(rounds, tmp_path / "run")
    assert main(flags(world, out, *ROUNDS, "--resume", "--rounds", "3")) == 0
    assert contents(out / "round-2") == contents(rounds / "round-2")
    assert (out / "round-3/sft/adapter/adapter_model.safetensors").exists()
