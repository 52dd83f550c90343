"""`lowalign compare`: on one load of the base, answers that equal `generate`'s, figures that equal hand-worked ones, and resuming."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig

import lowalign.commands.compare
from lowalign import Host, Sampling
from lowalign.cli import main
from lowalign.commands.compare import compare
from lowalign.config.evaluation import CompareConfig
from lowalign.config.rows import ShortPromptsConfig
from lowalign.config.sections import BaseConfig, PreferenceConfig
from lowalign.data.chat import Chat
from lowalign.data.preferences import load_preferences
from lowalign.data.rows.answers import read_answers
from lowalign.demo.configs import BASE
from lowalign.demo.world import prompts
from lowalign.durable import write_jsonl
from lowalign.errors import UserError
from lowalign.model.base.base import Base
from lowalign.model.policy import load_stack
from lowalign.rewards.comparison import outcome_of
from tests.commands.tiny_runs import FP32, load, make

TOPICS = ("capital", "lazy", "quick")
QUESTIONS = [f"What is the {word} of France {i}?" for i in range(20) for word in TOPICS]
PROMPTS = [[{"role": "user", "content": question}] for question in QUESTIONS]
REWARDS = """
import zlib

def noise(prompts, completions):
    return [zlib.crc32(c.encode()) % 1000 for c in completions]

def length(prompts, completions):
    return [len(c) for c in completions]

def vowels(prompts, completions):
    return [sum(c.count(v) for v in "aeiou") for c in completions]

def asked(prompts, completions, topic, stopped, completion_ids):
    assert all(topic in p[0]["content"] for p, topic in zip(prompts, topic))
    assert all(len(ids) > 0 for ids in completion_ids)
    return [1000 * ("lazy" == t) * s + len(i) for t, s, i in zip(topic, stopped, completion_ids)]

def broken(prompts, completions):
    return [1 / 0 for _ in completions]
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = make(tmp_path_factory.mktemp("compare"))
    write_jsonl(
        folder / "prompts.jsonl", [{"prompt": prompt, "topic": TOPICS[i % 3]} for i, prompt in enumerate(PROMPTS)]
    )
    write_jsonl(folder / "texts.jsonl", [{"prompt": question} for question in QUESTIONS])
    host = Host(load(folder / "model"))
    torch.manual_seed(5)
    host.add("second", PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    host.save("second", folder / "second", prompt_format="text")
    (folder / "rewards.py").write_text(REWARDS)
    return folder


@pytest.fixture(scope="module")
def base(world) -> Base:
    return load(world / "model")


@pytest.fixture
def config(world, tmp_path) -> CompareConfig:
    return CompareConfig(
        str(world / "policy"),
        "base",
        tmp_path / "out",
        ShortPromptsConfig((str(world / "prompts.jsonl"),), limit=12),
        judge=f"{world / 'rewards.py'}:noise",
        model=str(world / "model"),
        sampling=Sampling(max_new_tokens=8),
        base=BaseConfig(quantization="none", dtype="float32", device="cpu"),
    )


def result(config: CompareConfig) -> dict:
    return json.loads((config.out / "result.json").read_text())


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def files(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in out.iterdir() if not p.name.startswith(".") and p.name != "recipe.yaml"}


def test_the_answers_are_those_of_each_policy_alone(config, world, base):
    """Greedy, so that the random numbers do not matter."""
    config = replace(config, sampling=Sampling(max_new_tokens=8, temperature=0))
    assert compare(config, base) == 0
    assert Host(base).adapters == {} and not [n for n, _ in base.model.named_parameters() if "lora_" in n]
    host = Host(load(world / "model"))
    chat = Chat(host.base.tokenizer)
    host.base.end_at(chat.end_of_turn)
    ids = [chat.prompt_ids(prompt) for prompt in PROMPTS[:12]]
    stacks = [load_stack(host, "alone", str(world / "policy")), ()]
    for k, stack in enumerate(stacks):
        with host.use(*stack):
            expected = [host.base.tokenizer.decode(g[0].ids, skip_special_tokens=True) for g in host.generate(ids, 1, config.sampling)]  # fmt: skip
        assert [line["completions"][k]["completion"] for line in read(config.out / "answers.jsonl")] == expected
    answers = read_answers([str(config.out / "answers.jsonl")])  # `lowalign judge --data` takes them
    assert [row.completions[1] for row in answers] == expected
    names = {(c["policy"]) for line in read(config.out / "answers.jsonl") for c in line["completions"]}
    assert names == {str(world / "policy"), "base"}


def test_the_figures_are_those_of_the_scores(config, base):
    config = replace(config, n=2)
    assert compare(config, base) == 0
    scope: dict = {}
    exec(REWARDS, scope)
    wins = ties = losses = 0
    rates, chosen = [], []
    for line in read(config.out / "answers.jsonl"):
        texts = [c["completion"] for c in line["completions"]]
        for a, b in ((texts[0], texts[2]), (texts[1], texts[3])):
            x, y = (scope["noise"](None, [text])[0] if text.strip() else -1 for text in (a, b))
            wins, ties, losses = wins + (x > y), ties + (x == y), losses + (x < y)
            rates.append(1.0 if x > y else 0.5 if x == y else 0.0)
            if x != y and a.strip() and b.strip():
                chosen.append(a if x > y else b)
    found = result(config)
    assert (found["wins"], found["ties"], found["losses"]) == (wins, ties, losses) and wins + losses > 12
    assert found["win_rate"] == pytest.approx(sum(rates) / 24)
    low, high = found["interval"]
    assert 0 <= low < found["win_rate"] < high <= 1
    assert {"length_controlled", "length_controlled_interval", "p_value", "left_out"} <= found.keys()
    assert [row["chosen"][0]["content"] for row in read(config.out / "pairs.jsonl")] == chosen
    examples = load_preferences([str(config.out / "pairs.jsonl")], Chat(base.tokenizer), PreferenceConfig(cache=False))
    assert len(examples.examples) == len(chosen)
    assert f"{found['win_rate']:.1%}" in (config.out / "result.md").read_text()


def test_text_is_plain_text_where_the_policy_was_trained_on_it(config, world, base):
    """A string is a turn only with --data.prompt-format chat; the pairs are of the same format."""
    texts = ShortPromptsConfig((str(world / "texts.jsonl"),), limit=12)
    mine = replace(config, a=str(world / "second"), data=texts, sampling=Sampling(max_new_tokens=8, temperature=0))
    for option, seen in ((None, "text"), ("text", "text"), ("chat", "chat")):
        run = replace(mine, data=replace(texts, prompt_format=option), out=config.out / str(option))
        assert compare(run, base) == 0
        chat = Chat(base.tokenizer)
        encode = chat.text_ids if seen == "text" else lambda q: chat.prompt_ids([{"role": "user", "content": q}])  # noqa: B023
        base.end_at(chat.end_of_turn)
        completions = Host(base).generate([encode(q) for q in QUESTIONS[:12]], 1, run.sampling)
        expected = [base.tokenizer.decode(c.ids, skip_special_tokens=True) for (c,) in completions]
        assert [line["completions"][1]["completion"] for line in read(run.out / "answers.jsonl")] == expected
        kind = str if seen == "text" else list
        assert all(isinstance(row["prompt"], kind) for row in read(run.out / "pairs.jsonl"))
    with pytest.raises(UserError, match="was trained on plain text, and these prompts are turns of a chat"):
        compare(replace(mine, data=config.data, out=config.out / "messages"), base)


def test_a_model_against_itself(config, base):
    """With other random numbers for each side: of 20 intervals of 95 % at least 18 contain one half."""
    contained = 0
    for seed in range(20):
        sampling = replace(config.sampling, seed=seed, max_new_tokens=4)
        data = replace(config.data, limit=40)
        mine = replace(config, a="base", data=data, out=config.out / str(seed), sampling=sampling)
        assert compare(mine, base) == 0
        low, high = result(mine)["interval"]
        contained += low <= 0.5 <= high
        assert result(mine)["ties"] < 10  # the answers differ
    assert contained >= 18


def test_a_clearly_worse_model_loses(config, tmp_path):
    """The demo's base, and the same with large random LoRAs, by the exact score of its world of postcards."""
    demo = Base.load(BASE, quantization="none", dtype="float32", device="cpu", quiet=True)
    host = Host(demo)
    torch.manual_seed(0)
    host.add("noise", LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"))
    for parameter in host.parameters("noise"):
        parameter.data.mul_(10)
    host.save("noise", tmp_path / "noise")
    host.delete("noise")
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": p} for p in prompts(40, 0, "held_out")])
    (tmp_path / "world.py").write_text(
        "from lowalign.demo.world import score\n\n"
        "def total(prompts, completions):\n"
        "    return [score(p, c, stopped=True).total for p, c in zip(prompts, completions)]\n"
    )
    sides = {"a": str(tmp_path / "noise"), "b": "base", "judge": f"{tmp_path / 'world.py'}:total"}
    data, sampling = ShortPromptsConfig((str(tmp_path / "prompts.jsonl"),)), Sampling(max_new_tokens=32)
    assert compare(replace(config, **sides, data=data, model=str(BASE), sampling=sampling), demo) == 0
    found = result(config)
    assert found["interval"][1] < 0.5 and found["p_value"] < 0.01 and found["wins"] < found["losses"]


def test_a_reward_run_judges_on_the_same_base(config, world, monkeypatch):
    """The winner is the answer with the higher score, as `lowalign score` gives it; the base is loaded once."""
    loads, real = [], Base.load.__func__
    monkeypatch.setattr(Base, "load", classmethod(lambda cls, *a, **k: loads.append(a) or real(cls, *a, **k)))
    config = replace(config, judge=str(world / "reward"))
    assert compare(config) == 0
    assert len(loads) == 1
    rows = [
        {"prompt": line["prompt"], "completion": c["completion"]}
        for line in read(config.out / "answers.jsonl")
        for c in line["completions"]
    ]
    messages = [{"messages": [*r["prompt"], {"role": "assistant", "content": r["completion"]}]} for r in rows]
    write_jsonl(config.out / "rows.jsonl", messages)
    out = config.out / "scores.jsonl"
    command = ["score", "--model", str(world / "model"), "--adapter", str(world / "reward"), "--out", str(out)]
    assert main([*command, "--data", str(config.out / "rows.jsonl"), *FP32]) == 0
    scores = iter([line["score"] for line in read(out)])
    for line in read(config.out / "verdicts.jsonl"):
        a, b = next(scores), next(scores)
        assert line["scores"] == pytest.approx([a, b], abs=1e-4)
        assert line["verdict"] == ("a" if line["scores"][0] > line["scores"][1] else "b")


def test_a_function_may_ask_for_columns_and_more(config, world, base):
    """Of the row of each answer; one that asks for a column that is not there is refused before anything is sampled."""
    mine = replace(config, judge=f"{world / 'rewards.py'}:asked", n=2)
    assert compare(mine, base) == 0
    for line, row in zip(read(config.out / "verdicts.jsonl"), [i for i in range(12) for _ in "ab"], strict=True):
        answers = read(config.out / "answers.jsonl")[row]["completions"]
        chosen = [answers[line[side]] for side in "ab"]
        if line["verdict"] != "skipped":
            bonus = [1000 * (row % 3 == 1) * c["stopped"] for c in chosen]
            assert [score >= least for score, least in zip(line["scores"], bonus, strict=True)] == [True, True]
            assert all(score < 1000 for score, least in zip(line["scores"], bonus, strict=True) if not least)
    texts = replace(mine, data=ShortPromptsConfig((str(world / "texts.jsonl"),)), out=config.out / "texts")
    with pytest.raises(UserError, match="asked requires topic, which is no column of the prompts' rows"):
        compare(texts, base)


def test_a_model_judge_is_asked_in_both_orders(config, base):
    config = replace(config, judge="model")
    assert compare(config, base) == 0
    lines = read(config.out / "verdicts.jsonl")
    judged = [line for line in lines if line["verdict"] != "skipped"]
    assert judged and all({"first", "swapped"} <= line.keys() for line in judged)
    found = result(config)
    changed = sum(line["verdict"] == "changed" for line in lines)
    assert found["changed"] == changed and found["ties"] >= changed  # a verdict that changes with the order is a tie
    assert found["wins"] == sum(outcome_of(line, "a", "b") == 1 for line in judged)


@pytest.mark.parametrize(
    ("verdict", "why", "a", "b", "outcome"),
    [
        ("a", None, "x", "y", 1),
        ("changed", None, "x", "y", 0.5),
        ("skipped", "both answers are the same", "x", "x", 0.5),
        ("skipped", "an answer is empty", "", "y", 0),
        ("skipped", "an answer is empty", "x", " ", 1),
        ("skipped", "an answer is empty", "", "\n", 0.5),
        ("skipped", "longer than --max-length", "x", "y", None),
    ],
)
def test_what_a_pair_counts(verdict, why, a, b, outcome):
    assert outcome_of({"verdict": verdict, "why": why}, a, b) == outcome


def test_a_round_robin_has_ratings(config, world, base):
    judge = f"{world / 'rewards.py'}:vowels"
    data = replace(config.data, prompt_format="chat", limit=30)
    config = replace(config, b=str(world / "second"), data=data, others=("base", "off"), judge=judge)
    assert compare(config, base) == 0
    found = result(config)
    names = [config.a, config.b, "base", "off"]
    assert [(m["a"], m["b"]) for m in found["matches"]] == [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    assert found["win_rate"] == found["matches"][0]["win_rate"]
    ratings = {r["policy"]: r["rating"] for r in found["ratings"]}
    assert set(ratings) == set(names) and sum(ratings.values()) == pytest.approx(4000)
    assert all(r["interval"][0] < r["rating"] < r["interval"][1] for r in found["ratings"])
    beaten = {name: sum(m["win_rate"] if m["a"] == name else 1 - m["win_rate"] for m in found["matches"] if name in (m["a"], m["b"])) for name in names}  # fmt: skip
    for x in names:  # all played equally often, so that more wins are a higher rating
        assert all(ratings[x] > ratings[y] for y in names if beaten[x] > beaten[y] + 1e-9)
    assert len(read(config.out / "verdicts.jsonl")) == 30 * 6


@pytest.mark.parametrize("stage", ["answers", "verdicts"])
def test_a_stopped_comparison_goes_on_to_the_same_files(config, base, stage, monkeypatch):
    config = replace(config, n=2)
    monkeypatch.setattr(lowalign.commands.compare, "PROMPTS_PER_BLOCK", 5)
    monkeypatch.setattr(lowalign.commands.compare, "PAIRS_PER_BLOCK", 4)
    assert compare(config, base) == 0
    expected = files(config.out)
    for name in ("result.json", "result.md", "pairs.jsonl"):
        (config.out / name).unlink()
    if stage == "answers":
        (config.out / "verdicts.jsonl").unlink()
    lines = (config.out / f"{stage}.jsonl").read_bytes()
    (config.out / f"{stage}.jsonl").write_bytes(lines[: len(lines) * 2 // 3])
    assert compare(replace(config, resume=True), base) == 0
    assert files(config.out) == expected
    monkeypatch.setattr(Base, "load", lambda *_, **__: pytest.fail("nothing is left to compute"))
    assert compare(replace(config, resume=True)) == 0
    assert files(config.out) == expected


def test_the_run_names_its_base(config, world, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "adapter").symlink_to(world / "policy")
    (run / "recipe.yaml").write_text(f"model: {world / 'model'}\n")
    command = ["compare", "--a", str(run), "--b", "off", "--data", *config.data.files, "--out", str(config.out)]
    assert main([*command, "--judge", config.judge, "--data.limit", "3", "--sampling.max-new-tokens", "4", *FP32]) == 0
    assert math.isfinite(result(config)["win_rate"]) and result(config)["prompts"] == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--judge", "nowhere/run"], "neither a folder here nor reachable on the Hub"),
        (["--judge", "POLICY"], "is not a reward model: it has no scalar head"),
        (["--a", "REWARD"], "is a reward model: it scores answers and cannot write them"),
        (["--judge", "gone.py:f"], "--judge gone.py:f: there is no file gone.py"),
        (["--judge", "REWARDS"], "name the function after the file"),
        (["--judge", "REWARDS:vowel"], "there is no function vowel; did you mean vowels?"),
        (["--judge", "REWARDS:broken"], "rewards.py:19: broken: ZeroDivisionError"),
        (["--judge", "base"], "to ask the base itself, give --judge model"),
        (["--judge", "REWARDS:noise", "--template", "q.jinja"], "--template is the question to a judging model"),
        (["--a", "missing/folder/x"], "missing/folder/x is not a folder"),
        (["--a", "base"], "base and base name no base: give --model M"),
        (["--n", "0"], "--n is 0; it must be at least 1"),
        (["--margin", "-1"], "--margin is -1.0; it must be at least 0"),
        (["--sampling.temperature", "-1"], "temperature is -1.0"),
        (["--data.max-length", "1"], "longer than 1 tokens and left out); see --data.max-length"),
        (["--judge", "REWARD", "--max-length", "5"], "no pair of answers could be judged: longer than --max-length"),
        (["--data", "nothing.jsonl"], "nothing.jsonl"),
    ],
)
def test_each_mistake_has_its_message(changes, message, config, world, capsys):
    words = {"POLICY": world / "policy", "REWARDS": world / "rewards.py", "REWARD": world / "reward"}
    for word, path in words.items():
        changes = [str(path) + c.removeprefix(word) if c == word or c.startswith(f"{word}:") else c for c in changes]
    options = {
        "--a": config.a,
        "--b": "base",
        "--data": config.data.files[0],
        "--out": str(config.out),
        "--data.limit": "2",
    }
    options |= {"--judge": config.judge, "--model": config.model, "--sampling.max-new-tokens": "4"}
    options |= dict(zip(changes[::2], changes[1::2], strict=True))
    if "no base" in message:
        del options["--model"]
    assert main(["compare", *(word for pair in options.items() for word in pair), *FP32]) == 1
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (config.out / "result.json").exists()


def test_results_are_not_overwritten(config, base):
    assert compare(config, base) == 0
    with pytest.raises(UserError, match="holds results of an earlier run: go on with --resume"):
        compare(config, base)
    with pytest.raises(UserError, match="these differ from what it was started with:\n  n: 1 -> 2"):
        compare(replace(config, n=2, resume=True), base)
