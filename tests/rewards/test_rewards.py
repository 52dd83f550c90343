"""Rewards: scores against `host.scores` one completion at a time, weighted sums by hand, and error messages."""

import json
import shutil

import pytest
import torch

from lowalign import Example, Host
from lowalign.data.chat import Chat
from lowalign.errors import UserError
from lowalign.rewards.function import Samples, same_columns
from lowalign.rewards.reward_run import TRAINING, load_reward_run, score_examples
from lowalign.rewards.rewards import RewardOptions, load_functions, load_rewards
from lowalign.rewards.spec import files_and_runs, parse_spec
from tests.commands.tiny_runs import load, make

PROMPTS = [[{"role": "user", "content": "one"}], "two"]
IDS = [[5, 6, 7, 8, 9, 10], [11, 12]]
TEXTS = [["a", "bb", "ccc"], ["dddd"]]
COMPLETIONS = [[[20, 21, 22], [23], [24, 25, 26, 27]], [[28, 29]]]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def base(world):
    return load(world / "model")


@pytest.fixture
def host(base):
    host = Host(base)
    yield host
    for name in tuple(host.adapters):
        host.delete(name)


def rewards(host, *specs):
    return load_rewards(specs, host, Chat(host.base.tokenizer))


def alone(host, stack) -> list[list[float]]:
    with host.use(*stack), torch.no_grad():
        one = lambda p, c: host.scores([Example(p, [c])], stack[-1])[0].item()  # noqa: E731
        return [[one(p, c) for c in group] for p, group in zip(IDS, COMPLETIONS, strict=True)]


def test_a_single_run_gives_its_raw_scores(world, host):
    actual = rewards(host, f"{world}/reward")(PROMPTS, IDS, TEXTS, COMPLETIONS)
    expected = alone(host, ("reward0",))
    assert [[s.total for s in group] for group in actual] == [pytest.approx(group, abs=1e-5) for group in expected]
    assert len({round(s.total, 3) for group in actual for s in group}) == 4
    assert all(s.parts == {f"{world}/reward": s.total} for group in actual for s in group)


@pytest.mark.parametrize("plain_text", [False, True])
def test_a_completion_that_ends_with_another_end_token_is_scored_at_the_one_the_reward_model_knows(
    world, host, monkeypatch, tmp_path, plain_text
):
    """The policy may end with any end token of the base; the reward model learned the template's, in plain text eos."""
    chat = Chat(host.base.tokenizer, "{% for m in messages %}<pad>{{ m.content }}<unk>{% endfor %}"
                "{% if add_generation_prompt %}<pad>{% endif %}")  # fmt: skip
    end = chat.end_of_text if plain_text else chat.end_of_turn
    assert (chat.end_of_turn, chat.end_of_text) == (3, 2)  # <unk>, </s>
    monkeypatch.setattr(host.base, "eos_ids", (2, 3, 40))
    run = shutil.copytree(world / "reward", tmp_path / "reward")
    (run / "chat_template.jinja").write_text(chat.template)
    score = load_rewards([str(run)], host, chat)
    prompt = [5, 6, 7]
    with host.use("reward0"), torch.no_grad():
        known = host.scores([Example(prompt, [[20, 40, 21, end]])], "reward0")[0].item()
        other = host.scores([Example(prompt, [[20, 40, 21, 40]])], "reward0")[0].item()
        cut = host.scores([Example(prompt, [[20, 40, 21]])], "reward0")[0].item()
    assert abs(known - other) > 0.01
    asked = "p" if plain_text else [{"role": "user", "content": "p"}]
    ((*ended, unfinished),) = score(
        [asked], [prompt], [["x"] * 4], [[[20, 40, 21, e] for e in (2, 3, 40)] + [[20, 40, 21]]]
    )
    assert [s.total for s in ended] == pytest.approx([known] * 3, abs=1e-5)
    assert unfinished.total == pytest.approx(cut, abs=1e-5)


@pytest.mark.parametrize("budget", [1, 7, 9, 10, 14, 1000])
def test_any_token_budget_gives_the_same_scores_in_order(world, host, budget, monkeypatch):
    """No forward has more tokens than the budget, unless it is a single completion."""
    stack = load_reward_run(host, "r", f"{world}/reward")
    expected = alone(host, stack)
    seen, scores = [], host.scores
    monkeypatch.setattr(host, "scores", lambda batch, name: seen.append(batch) or scores(batch, name))
    examples = [Example(p, cs) for p, cs in zip(IDS, COMPLETIONS, strict=True)]
    actual = score_examples(host, stack, examples, budget)
    assert all(sum(e.length for e in b) <= budget or (len(b) == 1 and len(b[0].completions) == 1) for b in seen)
    assert actual == [pytest.approx(group, abs=1e-5) for group in expected]
    assert budget < 1000 or len(seen) == 1


@pytest.mark.parametrize(("room", "fits"), [(10, True), (13, True), (17, True), (9, False)])
def test_out_of_memory_changes_no_score(world, host, monkeypatch, capsys, room, fits):
    """Packs become smaller, then the completions of a prompt are divided; the longest takes 10 tokens with its prompt."""
    stack = load_reward_run(host, "r", f"{world}/reward")
    expected = alone(host, stack)
    scores = host.scores

    def small(batch, name):
        if sum(e.length for e in batch) > room:
            raise torch.OutOfMemoryError("tried to allocate 20.00 GiB")
        return scores(batch, name)

    monkeypatch.setattr(host, "scores", small)
    examples = [Example(p, cs, source="rows.jsonl:1") for p, cs in zip(IDS, COMPLETIONS, strict=True)]
    if not fits:
        with pytest.raises(UserError, match="a single example of 10 tokens, rows"):
            score_examples(host, stack, examples)
        return
    assert score_examples(host, stack, examples) == [pytest.approx(group, abs=1e-5) for group in expected]
    assert "out of memory with 18 tokens: the token budget is now 9" in capsys.readouterr().err


def test_a_weighted_sum(world, host, tmp_path):
    """Scores of runs are standardized with mean and spread from their folders; a function is used as it is."""
    file = tmp_path / "length.py"
    file.write_text("def letters(prompts, completions):\n    return [len(c) for c in completions]\n")
    specs = (f"2*{world}/reward", f"{world}/other", f"-0.5*{file}:letters")
    actual = rewards(host, *specs)(PROMPTS, IDS, TEXTS, COMPLETIONS)
    first, second = alone(host, ("reward0",)), alone(host, ("reward1",))
    for i, group in enumerate(actual):
        for j, score in enumerate(group):
            a, b, c = (first[i][j] - 0.25) / 2.0, (second[i][j] + 1.0) / 0.5, len(TEXTS[i][j])
            assert list(score.parts.values()) == pytest.approx([a, b, c], abs=1e-4)
            assert score.total == pytest.approx(2 * a + b - 0.5 * c, abs=1e-4)


def test_a_sum_refuses_a_spread_that_was_measured_on_training_rows(world, host, tmp_path):
    run = shutil.copytree(world / "reward", tmp_path / "reward")
    meta = json.loads((run / "lowalign.json").read_text())
    (run / "lowalign.json").write_text(
        json.dumps(meta | {"reward": {"mean": 1.0, "std": 2.0, "measured_on": TRAINING}})
    )
    specs, chat = (str(run), f"{world}/other"), Chat(host.base.tokenizer)
    with pytest.raises(
        UserError, match=r"on the rows it was trained on.*--data\.eval-rows 200.*--allow-training-spread"
    ):
        load_rewards(specs, host, chat)
    for name in tuple(host.adapters):
        host.delete(name)
    allowed = load_rewards(specs, host, chat, RewardOptions(allow_training_spread=True))
    assert allowed.parts[str(run)][1].std == 2.0
    for name in tuple(host.adapters):
        host.delete(name)
    load_rewards(specs[:1], host, chat)  # alone it needs no spread


def test_a_function_gets_copies_of_the_prompts_one_for_each_completion(host, tmp_path):
    file = tmp_path / "f.py"
    file.write_text(
        "import json, pathlib, torch\n"
        "def f(prompts, completions):\n"
        f"    pathlib.Path({str(tmp_path / 'given')!r}).write_text(json.dumps([prompts, completions]))\n"
        "    for prompt in prompts:\n        if isinstance(prompt, list): prompt.clear()\n"
        "    return torch.arange(4) / 2\n"
    )
    prompts = [[{"role": "user", "content": "one"}], "two"]
    actual = rewards(host, f"{file}:f")(prompts, IDS, TEXTS, COMPLETIONS)
    assert [[s.total for s in group] for group in actual] == [[0, 0.5, 1], [1.5]]
    assert prompts == PROMPTS
    inputs = [*[PROMPTS[0]] * 3, "two"], ["a", "bb", "ccc", "dddd"]
    assert json.loads((tmp_path / "given").read_text()) == list(inputs)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (
            "return [1, 2, 3]",
            "f.py:1: f returned 3 numbers for 4 completions. Expected def reward(prompts, completions, **columns), which",
        ),
        ("return 7", "'int' object is not iterable"),
        ("return [1, 2, 'x', 4]", "f.py:1: f returned 'x', which is not a finite number, for the completion 'ccc'"),
        ("return [1, 2, '3', 4]", "returned '3', which is not a finite number"),
        ("return [1, None, 3, 4]", "returned None"),
        ("return [1, float('nan'), 3, 4]", "returned nan, which is not a finite number, for the completion 'bb'"),
        ("return [1, 2, 3, -float('inf')]", "returned -inf"),
        (
            "pass\n    return [1 / len(completions[9]) for _ in completions]",
            "f.py:3: f: IndexError: list index out of range. Expected def reward(prompts, completions, **columns)",
        ),
        ("return {}['key'],", "f.py:2: f: KeyError: 'key'"),
    ],
)
def test_errors_of_a_function(host, tmp_path, body, says):
    file = tmp_path / "f.py"
    file.write_text(f"def f(prompts, completions):\n    {body}\n")
    with pytest.raises(UserError) as error:
        rewards(host, f"{file}:f")(PROMPTS, IDS, TEXTS, COMPLETIONS)
    assert says in str(error.value)
    assert str(file) in str(error.value)


# -- what else a function may ask for ----------------------------------------------------------------------------------

ROWS = [{"prompt": "one", "answer": ["1"], "level": 3}, {"prompt": "two", "answer": ["2"], "level": None}]
STOPPED = [[True, False, True], [False]]
EVERYTHING = {
    "prompts": [*[PROMPTS[0]] * 3, "two"],
    "completions": ["a", "bb", "ccc", "dddd"],
    "answer": [["1"], ["1"], ["1"], ["2"]],
    "level": [3, 3, 3, None],
    "stopped": [True, False, True, False],
    "completion_ids": [[20, 21, 22], [23], [24, 25, 26, 27], [28, 29]],
    "prompt": ["one", "one", "one", "two"],
}


@pytest.mark.parametrize(
    ("parameters", "gets"),
    [
        ("prompts, completions", "prompts completions"),
        ("prompts, completions, answer", "prompts completions answer"),
        ("prompts, completions, *, level, stopped, completion_ids", "prompts completions level stopped completion_ids"),
        ("prompts, completions, answer=None, other=7", "prompts completions answer"),
        ("prompts, completions, **columns", "prompts completions answer level stopped completion_ids prompt"),
        ("completions, answer", "completions answer"),
        ("completions, **columns", " ".join(EVERYTHING)),
        ("*, stopped, completions, prompts", "prompts completions stopped"),
        ("**everything", " ".join(EVERYTHING)),
    ],
)
def test_a_function_gets_what_it_names(host, tmp_path, parameters, gets):
    file = tmp_path / "f.py"
    file.write_text(
        "import json, pathlib\n"
        f"def f({parameters}):\n"
        "    given = dict(locals())\n"
        "    given.update(given.pop('columns', None) or given.pop('everything', None) or {})\n"
        f"    pathlib.Path({str(tmp_path / 'given')!r}).write_text(json.dumps(given))\n"
        "    for answer in given.get('answer') or []: answer.append('changed')\n"
        "    return range(4)\n"
    )
    rows = [{"prompt": "one", "answer": ["1"], "level": 3}, {"prompt": "two", "answer": ["2"]}]
    samples = Samples(same_columns(rows), STOPPED)
    assert samples.columns == ROWS  # a column that a row lacks is None there
    actual = rewards(host, f"{file}:f")(PROMPTS, IDS, TEXTS, COMPLETIONS, samples)
    assert [[s.total for s in group] for group in actual] == [[0, 1, 2], [3]]
    given = json.loads((tmp_path / "given").read_text())
    assert {k: v for k, v in given.items() if k != "other"} == {name: EVERYTHING[name] for name in gets.split()}
    assert given.get("other", 7) == 7
    assert samples.columns == ROWS  # it got copies


def test_two_parameters_of_any_name_are_prompts_and_completions(host, tmp_path):
    file = tmp_path / "f.py"
    file.write_text("def f(questions, texts, level):\n    assert questions[3] == 'two'\n    return map(len, texts)\n")
    actual = rewards(host, f"{file}:f")(PROMPTS, IDS, TEXTS, COMPLETIONS, Samples(ROWS, STOPPED))
    assert [[s.total for s in group] for group in actual] == [[1, 2, 3], [4]]


def test_a_function_that_requires_what_the_rows_do_not_have(tmp_path):
    file = tmp_path / "f.py"
    file.write_text("\n\ndef f(prompts, completions, anwser):\n    return 0\n")
    with pytest.raises(UserError) as error:
        load_functions([f"{file}:f"], ["prompt", "answer"])
    assert str(error.value) == (
        f"{file}:3: f requires anwser, which is no column of the prompts' rows (did you mean answer?). Their columns: "
        "answer, prompt. Expected def reward(prompts, completions, **columns), where stopped and completion_ids may be "
        "named too"
    )
    file.write_text("def f(texts):\n    return 0\n")
    with pytest.raises(UserError) as error:
        load_functions([f"{file}:f"])
    assert str(error.value) == (
        f"{file}:1: f takes no prompts and completions; expected def reward(prompts, completions, **columns)"
    )


def test_where_no_row_is_known_a_function_with_columns_is_refused(host, tmp_path):
    """As in `lowalign judge`, whose answers come from a file."""
    file = tmp_path / "f.py"
    file.write_text("def f(prompts, completions, answer):\n    return 0\n")
    with pytest.raises(
        UserError, match=r"f\.py:1: f requires answer, which is known only of prompts that were sampled"
    ):
        rewards(host, f"{file}:f")(PROMPTS, IDS, TEXTS, COMPLETIONS)


def test_what_cannot_be_loaded(world, host, tmp_path):
    file = tmp_path / "f.py"
    file.write_text("def brevity(prompts, completions):\n    return 0\n\nLIMIT = 3\n")
    (tmp_path / "broken.py").write_text("x = 1\ny = (\n")
    (tmp_path / "raises.py").write_text("x = 1\nimport nothing_of_that_name\n")
    bare = shutil.copytree(world / "reward", tmp_path / "bare")
    meta = json.loads((bare / "lowalign.json").read_text())
    (bare / "lowalign.json").write_text(json.dumps(meta | {"reward": {"mean": 1.0, "std": 0.0}}))
    other = shutil.copytree(world / "reward", tmp_path / "template")
    (other / "chat_template.jinja").write_text("{{ messages }}")
    for specs, says in {
        (f"{tmp_path}/no.py:f",): f"there is no file {tmp_path}/no.py",
        (f"{file}",): "name the function after the file",
        (f"{file}:brevty",): "there is no function brevty; did you mean brevity?",
        (f"{file}:LIMIT",): "LIMIT is not a function",
        (f"{tmp_path}/broken.py:f",): f"{tmp_path}/broken.py:2: SyntaxError",
        (f"{tmp_path}/raises.py:f",): f"{tmp_path}/raises.py:2: ModuleNotFoundError",
        (f"{file}:brevity", f"2*{file}:brevity"): "more than once",
        (f"half*{file}:brevity",): "expected [WEIGHT*]RUN",
        (f"nan*{file}:brevity",): "expected [WEIGHT*]RUN",
        (f"{world}/policy",): "is not a reward model",
        (str(bare), f"{file}:brevity"): "has no mean and spread of its scores",
        (str(other),): "another chat template",
    }.items():
        with pytest.raises(UserError) as error:
            rewards(host, *specs)
        assert says in str(error.value)
        for name in tuple(host.adapters):
            host.delete(name)


def test_a_relative_path_and_the_environment_of_a_function(host, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "deep/f.py"
    file.parent.mkdir()
    file.write_text(
        "import pathlib\nfrom dataclasses import dataclass\n\n@dataclass\nclass Word:\n    text: 'str'\n\n"
        "def f(prompts, completions):\n    return [float(pathlib.Path(__file__).with_name('n').read_text())] * 4\n"
    )
    with pytest.raises(UserError, match=r"^deep/f\.py:9: f: FileNotFoundError"):
        rewards(host, "deep/f.py:f")(PROMPTS, IDS, TEXTS, COMPLETIONS)
    (tmp_path / "deep/n").write_text("3")
    assert rewards(host, "2*deep/f.py:f")(PROMPTS, IDS, TEXTS, COMPLETIONS)[1][0].total == 6
    assert not (file.parent / "__pycache__").exists()


def test_specs(tmp_path):
    assert parse_spec("runs/reward")[:2] == (1.0, "runs/reward")
    assert parse_spec("-0.5*f.py:g")[:2] == (-0.5, "f.py:g")
    assert parse_spec("1e-2*me/reward")[:2] == (0.01, "me/reward")
    (tmp_path / "f.py").write_text("")
    assert files_and_runs([f"2*{tmp_path}/f.py:g", "0.5*runs/reward", "me/reward"]) == (
        [f"{tmp_path}/f.py"],
        ["runs/reward", "me/reward"],
    )
