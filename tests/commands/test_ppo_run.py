"""`lowalign ppo` end to end on a tiny 4-bit base: files of a run, kill and resume, and error messages."""

import hashlib
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoTokenizer, GenerationConfig

from lowalign import Base, Example, Host
from lowalign.cli import main
from lowalign.commands.ppo import VALUE, add_value, short_names
from lowalign.config.sections import AdapterConfig, Sampling
from lowalign.config.training import PPOConfig, RolloutConfig, ValueConfig
from lowalign.data.chat import Chat
from lowalign.methods.ppo import PPO
from lowalign.model.policy import load_stack
from lowalign.train import checkpoint
from tests.commands import child, tiny_runs
from tests.tiny import tiny_folder

REWARD = """
import os, pathlib
calls = 0

def vowels(prompts, completions):
    global calls
    calls += 1
    here = pathlib.Path(__file__).parent
    if calls == 2 and (here / "trouble").exists():
        trouble = (here / "trouble").read_text()
        (here / "trouble").unlink()
        exec(trouble)
    return [sum(c in "aeiou" for c in text) - 0.1 * len(text) for text in completions]
"""
ROUND = (
    "--rollout.prompts", "4", "--rollout.samples", "2", "--sampling.max-new-tokens", "8", "--train.batch-size", "2",
    "--ppo.epochs", "2", "--adapter.virtual-tokens", "3", "--value.adapter.virtual-tokens", "3", "--adapter.r", "4",
    "--value.adapter.r", "4", "--train.learning-rate", "1e-2", "--data.no-cache",
)  # fmt: skip
MODES = {
    "gae": (
        "--value.adapter.kind", "prefix", "--ppo.kl-target", "1.5", "--ppo.kl-horizon", "50", "--rollout.normalise",
        "running", "--ppo.target-kl", "0.02", "--train.save-every", "3",
    ),
    "group": (
        "--adapter.kind", "prefix", "--ppo.advantage", "group", "--ppo.kl-in", "loss", "--train.save-every", "2",
        "--rollout.missing-eos", "mask",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model folder with many end tokens, so that random weights sample some; prompts (with line breaks that JSON does not
    escape), rows and a reward function."""
    folder = tmp_path_factory.mktemp("world")
    tiny_folder(folder / "model", "llama")
    GenerationConfig(eos_token_id=list(range(2, 60))).save_pretrained(folder / "model")
    prompts = [
        {"prompt": f"What is the capital of\u2028{name}?"}
        for name in ("France", "Spain", "Peru", "Chad", "Togo", "Oman")
    ]
    rows = [{"prompt": "the quick brown fox", "completion": f"jumps over {n} dogs"} for n in ("two", "three", "four")]
    for name, lines in (("prompts", prompts), ("rows", rows)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "reward.py").write_text(REWARD)
    return folder


def flags(world, out, *more, mode="gae", steps=8, reward=None) -> list[str]:
    return [
        "ppo", "--model", f"{world}/model", "--data", f"{world}/prompts.jsonl", "--out", str(out), "--train.steps",
        str(steps), "--reward", f"{reward or world / 'reward.py'}:vowels", *ROUND, *MODES[mode], *more,
    ]  # fmt: skip


def digest(out) -> str:
    return hashlib.sha256((out / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def lines(out) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def assert_same(out, straight) -> None:
    """The adapter, the metrics without the times, and the samples."""
    timeless = lambda key: not any(word in key for word in ("second", "memory"))  # noqa: E731
    strip = lambda log: [{k: v for k, v in line.items() if timeless(k)} for line in log]  # noqa: E731
    assert strip(lines(out)) == strip(lines(straight))
    assert (out / "samples.jsonl").read_bytes() == (straight / "samples.jsonl").read_bytes()
    assert digest(out) == digest(straight)


@pytest.fixture(scope="module")
def straight(world, tmp_path_factory):
    """Uninterrupted runs."""
    runs = {}
    for mode in MODES:
        runs[mode] = tmp_path_factory.mktemp("straight") / mode
        assert main(flags(world, runs[mode], mode=mode)) == 0
    return runs


@pytest.fixture
def own_reward(world, tmp_path) -> Path:
    """A copy of the reward function. It runs the code in the file `trouble` beside it once, in the second round."""
    file = tmp_path / "reward" / "reward.py"
    file.parent.mkdir()
    file.write_text(REWARD)
    return file


# -- what a run writes ------------------------------------------------------------------------------------------------

TOLD = {"reward", "reward_earned", "kl", "kl_coef", "entropy", "length", "eos_share", "truncated_share"}
TOLD |= {"loss", "policy_loss", "approx_kl", "clipfrac", "grad_norm", "lr", "tokens_per_second"}


def test_what_a_run_writes(world, straight):
    out, log = straight["gae"], lines(straight["gae"])
    assert [line["step"] for line in log] == list(range(1, 9))
    assert all(line.keys() >= TOLD | {"value_loss", "explained_variance"} for line in log)
    assert all(line.keys() >= TOLD and "value_loss" not in line for line in lines(straight["group"]))
    assert all(line["eos_share"] + line["truncated_share"] == pytest.approx(1) for line in log)
    rounds = [k for k, line in enumerate(log) if k == 0 or line["reward"] != log[k - 1]["reward"]]
    assert all(log[k]["approx_kl"] == 0 == log[k]["clipfrac"] for k in rounds)  # the policy that sampled
    assert log[0]["kl"] == 0  # at the start the policy equals its reference
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().split("\n")[:-1]]
    assert [s["round"] for s in samples] == [k for k in range(len(rounds)) for _ in range(2)] and len(rounds) >= 2
    assert all(
        s["prompt"].startswith("What is the capital of") and s.keys() >= {"completion", "reward"} for s in samples
    )
    meta = json.loads((out / "adapter" / "lowalign.json").read_text())
    assert meta["method"] == "ppo" and meta["parents"] == 0 and meta["step"] == 8
    assert "reward.py:vowels" in meta["recipe"] and str(world) not in meta["recipe"]
    assert not any("score" in key for key in load_file(out / "adapter" / "adapter_model.safetensors"))  # no value head


def test_the_coefficient_and_the_end_of_rounds(straight):
    """kl_coef follows the rounds' KL, and a round ends with the step that exceeds the KL limit."""
    log = lines(straight["gae"])
    rounds = []
    for line in log:
        if not rounds or line["reward"] != rounds[-1][-1]["reward"]:
            rounds.append([])
        rounds[-1].append(line)
    beta, early = 0.05, 0
    for k, steps in enumerate(rounds):
        assert all(s["kl_coef"] == pytest.approx(beta, rel=1e-6) for s in steps)
        beta *= 1 + min(0.2, max(-0.2, steps[0]["kl"] / 1.5 - 1)) * 8 / 50
        assert all(s["approx_kl"] <= 0.02 for s in steps[:-1])
        if k < len(rounds) - 1 and len(steps) < 4:
            assert steps[-1]["approx_kl"] > 0.02
            early += 1
    assert early


@pytest.mark.parametrize("mode", MODES)
def test_stock_peft_gives_the_same_log_probs(world, straight, mode):
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])
    stock = Base.load(world / "model", dtype="float32", device="cpu", quiet=True).model
    stock = PeftModel.from_pretrained(stock, str(straight[mode] / "adapter")).eval()
    with torch.no_grad():
        want = stock(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -7:-1].float().log_softmax(-1)
    want = want.gather(1, ids[0, 2:, None])[:, 0]
    host = Host(Base.load(world / "model", dtype="float32", device="cpu", quiet=True))
    with host.use(*load_stack(host, "a", str(straight[mode]))), torch.no_grad():
        ((got,),) = host.logprobs([Example([5, 6], [ids[0, 2:].tolist()])])
    assert (want - got).abs().max() <= 1e-4  # 1e-6 seen


COLUMNS = """
import json, pathlib

def f(prompts, completions, *, name, stopped, completion_ids, **others):
    assert all(p == f"What is the capital of {n}?" for p, n in zip(prompts, name)) and others["prompt"] == prompts
    ends = [ids[-1] < 60 for ids in completion_ids]
    assert ends == stopped and len(set(ends)) == 2
    return map(len, completion_ids)
"""


def test_a_reward_function_with_the_columns_of_the_rows(world, tmp_path, capfd):
    """It gets them for its prompts in any order of the rounds; one that requires another is refused before the base is loaded."""
    names = ("France", "Spain", "Peru", "Chad", "Togo", "Oman")
    rows = [{"prompt": f"What is the capital of {name}?", "name": name} for name in names]
    data, file = tmp_path / "rows.jsonl", tmp_path / "f.py"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    file.write_text(COLUMNS)
    more = ("--data", str(data), "--reward", f"{file}:f")
    assert main(flags(world, tmp_path / "run", *more, mode="group", steps=5)) == 0
    assert all(line["reward"] == pytest.approx(line["length"]) for line in lines(tmp_path / "run"))
    file.write_text(COLUMNS.replace("name, stopped", "capital, stopped"))
    message = refused(flags(world, tmp_path / "other", *more), capfd)
    assert message == (
        f"lowalign: {file}:4: f requires capital, which is no column of the prompts' rows. Their columns: name, prompt. "
        "Expected def reward(prompts, completions, **columns), where stopped and completion_ids may be named too"
    )


SUM = """
def vowels(prompts, completions):
    return [sum(c in "aeiou" for c in text) - 0.1 * len(text) for text in completions]

def length(prompts, completions):
    return [len(text) for text in completions]
"""


def test_each_reward_is_logged_by_its_name(world, tmp_path, capfd):
    """Before its weight; what is sampled with top-k is said to have log-probs of the full vocabulary."""
    file, out = tmp_path / "f.py", tmp_path / "run"
    file.write_text(SUM)
    more = ("--reward", f"{file}:vowels", f"2*{file}:length", "--sampling.top-k", "50")
    assert main(flags(world, out, *more, mode="group", steps=4)) == 0
    said = capfd.readouterr().err
    assert "top-k or top-p, but old log-probs, ratios and KL are those of the full vocabulary" in said
    for line in lines(out):
        assert line["reward"] == pytest.approx(line["rewards/f:vowels/mean"] + 2 * line["rewards/f:length/mean"])
        assert line["rewards/f:vowels/std"] > 0 and line["rewards/f:length/std"] > 0
        assert f"reward {line['reward']:.4g}  KL {line['kl']:.4g}  length {line['length']:.4g}  grad_norm" in said
        assert line["sampler_difference_max"] < 1  # in bfloat16; log-probs after top-k would be some nats higher
    assert short_names(["a/f.py:g", "b/f.py:g", "runs/reward"]) == {
        "a/f.py:g": "a/f.py:g", "b/f.py:g": "b/f.py:g", "runs/reward": "reward",
    }  # fmt: skip


@pytest.fixture(scope="module")
def evaluated(world, tmp_path_factory):
    """A run with held-out prompts, evaluated after every round (of two steps)."""
    out = tmp_path_factory.mktemp("evaluated") / "run"
    (world / "eval.jsonl").write_text("".join(json.dumps({"prompt": f"Where is {n}?"}) + "\n" for n in "ABCDEFGH"))
    assert main(flags(world, out, *HELDOUT(world), mode="group")) == 0
    return out


HELDOUT = lambda world: ("--data.eval", f"{world}/eval.jsonl", "--rollout.eval-every", "1", "--ppo.epochs", "1")  # noqa: E731


def test_held_out_prompts_choose_the_weights_by_reward(world, evaluated, capfd):
    """The adapter is that of the step with the highest mean reward of the held-out prompts, and has that reward."""
    rewards = {line["step"]: line["eval/reward"] for line in lines(evaluated) if "eval/reward" in line}
    assert list(rewards) == [0, 2, 4, 6, 8] and len(set(rewards.values())) > 2
    best = max(rewards, key=rewards.get)
    assert checkpoint.read_best(evaluated)[0] == best
    meta = json.loads((evaluated / "adapter" / "lowalign.json").read_text())
    assert meta["step"] == best and meta["metrics"]["eval/reward"] == rewards[best]
    base = Base.load(world / "model", device="cpu", quiet=True)
    host, chat = Host(base), Chat(base.tokenizer)
    base.end_at(chat.end_of_turn)
    prompts = [chat.text_ids(f"Where is {n}?") for n in "ABCDEFGH"]
    with host.use(*load_stack(host, "a", str(evaluated))):
        samples = host.generate(prompts, 1, Sampling(max_new_tokens=8), seeds=range(8))
    texts = [base.tokenizer.decode(group[0].ids, skip_special_tokens=True) for group in samples]
    want = sum(sum(c in "aeiou" for c in text) - 0.1 * len(text) for text in texts) / 8
    assert rewards[best] == pytest.approx(want, abs=1e-9)


def test_killed_with_held_out_prompts(world, evaluated, tmp_path):
    out = tmp_path / "run"
    arguments = flags(world, out, *HELDOUT(world), mode="group")
    assert child.run(arguments, LOWALIGN_KILL_AT="metrics-line:7") == -signal.SIGKILL
    assert main([*arguments, "--resume"]) == 0
    assert_same(out, evaluated)
    assert checkpoint.read_best(out)[0] == checkpoint.read_best(evaluated)[0]


def test_rows_held_out_of_the_prompts(world, tmp_path):
    """No prompt is on both sides."""
    out = tmp_path / "run"
    arguments = flags(world, out, "--data.eval-rows", "2", "--rollout.log-samples", "4", mode="group", steps=6)
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PPO, "evaluate", lambda self, prompts: seen.append(list(map(tuple, prompts))) or {"reward": 0.0})
        assert main(arguments) == 0
    assert len(seen[0]) == 2 and all(prompts == seen[0] for prompts in seen)
    trained = {json.loads(line)["prompt"] for line in (out / "samples.jsonl").read_text().split("\n")[:-1]}
    chat = Chat(AutoTokenizer.from_pretrained(world / "model"))
    assert len(trained) == 4 and not {tuple(chat.text_ids(prompt)) for prompt in trained} & set(seen[0])


# -- interrupted ------------------------------------------------------------------------------------------------------


def test_killed_while_it_scores(world, straight, tmp_path, own_reward):
    out = tmp_path / "run"
    own_reward.with_name("trouble").write_text("os.kill(os.getpid(), 9)")
    assert child.run(flags(world, out, reward=own_reward)) == -signal.SIGKILL
    assert main(flags(world, out, "--resume", reward=own_reward)) == 0
    assert_same(out, straight["gae"])


@pytest.mark.parametrize(
    ("mode", "point", "left"),
    [
        ("gae", "metrics-line:5", [3]),  # within a round; the checkpoint holds the round
        ("gae", "save-optimizer:2", [3]),
        ("group", "save-renamed:2", [2, 4]),
    ],
)
def test_killed_in_the_update_and_in_a_save(world, straight, tmp_path, mode, point, left):
    out = tmp_path / "run"
    assert child.run(flags(world, out, mode=mode), LOWALIGN_KILL_AT=point) == -signal.SIGKILL
    assert checkpoint.steps(out) == left
    assert main(flags(world, out, "--resume", mode=mode)) == 0
    assert_same(out, straight[mode])


def test_sigterm_saves_the_round_and_leaves(world, straight, tmp_path, own_reward):
    """The signal arrives while the second round is sampled and scored; on --resume this is not repeated."""
    out = tmp_path / "run"
    own_reward.with_name("trouble").write_text("os.kill(os.getpid(), 15)")
    assert child.run(flags(world, out, reward=own_reward), tmp_path / "said") == 128 + signal.SIGTERM
    kept = checkpoint.newest_valid(out)
    assert kept.state["method"]["round"] == 1 and kept.state["method"]["began"] == kept.step
    words = f"stopped by SIGTERM after step {kept.step}; go on with the same command and --resume"
    assert words in (tmp_path / "said").read_text()
    assert main(flags(world, out, "--resume", reward=own_reward)) == 0
    assert_same(out, straight["gae"])


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("point", ["save-begin", "save-method:2", "save-state:2", "metrics-line:2", "metrics-line:7"])
def test_killed_at_other_points(world, straight, tmp_path, mode, point):
    out = tmp_path / "run"
    assert child.run(flags(world, out, mode=mode), LOWALIGN_KILL_AT=point) == -signal.SIGKILL
    assert main(flags(world, out, "--resume", mode=mode)) == 0
    assert_same(out, straight[mode])


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_killed_at_random_times(world, straight, tmp_path, mode):
    """Killed at random times and resumed, until it ends by itself."""
    duration = child.seconds(flags(world, tmp_path / "whole", mode=mode))  # of a run that is not killed
    out, kills = tmp_path / "run", 0
    chance = torch.Generator().manual_seed(0)
    for attempt in range(40):
        command = flags(world, out, *(["--resume"] if attempt else []), mode=mode)
        process = child.start(command)
        process.join(duration * (0.05 + 0.45 * float(torch.rand((), generator=chance))) if kills < 8 else None)
        if process.exitcode is not None:
            break
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        kills += 1
    assert process.exitcode == 0 and kills
    assert_same(out, straight[mode])


# -- wrong ------------------------------------------------------------------------------------------------------------


def refused(arguments, capfd) -> str:
    """The error message of a run that ends with exit code 1."""
    capfd.readouterr()
    assert main(arguments) == 1
    stderr = capfd.readouterr().err
    assert "Traceback" not in stderr
    return stderr[stderr.index("lowalign: ") :].strip()


@pytest.mark.parametrize(
    ("line", "wrong", "says"),
    [
        ("1 / 0", None, "{file}:12: vowels: ZeroDivisionError: division by zero"),
        ("completions.pop()", None, "{file}:5: vowels returned 7 numbers for 8 completions"),
        ("", "float('nan')", "{file}:5: vowels returned nan, which is not a finite number, for the completion "),
    ],
)
def test_a_reward_function_that_fails_in_a_later_round(world, straight, tmp_path, own_reward, capfd, line, wrong, says):
    """The steps so far are saved; with a corrected function the resumed run equals an uninterrupted one."""
    out = tmp_path / "run"
    own_reward.with_name("trouble").write_text(line)
    if wrong:
        own_reward.write_text(REWARD.replace("return [", f"return [{wrong} if calls == 2 else "))
    message = refused(flags(world, out, reward=own_reward), capfd)
    assert message.startswith("lowalign: " + says.format(file=own_reward))
    state = checkpoint.newest_valid(out)
    log = lines(straight["gae"])
    second = next(k for k, entry in enumerate(log) if entry["reward"] != log[0]["reward"])
    assert state.step == second == len(lines(out)) and state.state["method"]["round"] == 0
    assert not (out / "adapter").exists()
    own_reward.write_text(REWARD)
    assert main(flags(world, out, "--resume", reward=own_reward)) == 0
    assert_same(out, straight["gae"])


def test_a_reward_function_that_fails_at_once(world, tmp_path, own_reward, capfd):
    """Nothing was trained, so nothing is saved, and the same command starts from the beginning."""
    out = tmp_path / "run"
    own_reward.write_text(REWARD.replace("return [", "return 1 / 0, ["))
    message = refused(flags(world, out, reward=own_reward, steps=1), capfd)
    assert message.startswith(
        f"lowalign: {own_reward}:13: vowels: ZeroDivisionError: division by zero. Expected def reward("
    )
    assert checkpoint.steps(out) == []
    own_reward.write_text(REWARD)
    assert main(flags(world, out, reward=own_reward, steps=1)) == 0


def test_no_completion_ends(world, tmp_path, capfd):
    message = refused(flags(world, tmp_path / "a", "--sampling.min-new-tokens", "8"), capfd)
    assert message == (
        "lowalign: none of the 8 completions of this round ended within 8 tokens; raise --sampling.max-new-tokens, start "
        "from an SFT run that ends its answers (--init), or allow it with --rollout.missing-eos keep"
    )


WRONG = {
    ("--adapter.dropout", "0.1"): "--adapter.dropout must be 0: with dropout the ratio to the sampling policy is noise",
    ("--train.batch-size", "3"): "--rollout.prompts must be a multiple of --train.batch-size",
    (
        "--ppo.advantage",
        "rloo",
        "--rollout.samples",
        "1",
    ): "--rollout.samples must be 2 or more: group and rloo compare",
    (
        "--sampling.temperature",
        "0",
    ): "--sampling.temperature must be above 0: a policy that never varies learns nothing",
    ("--ppo.kl-target", "0"): "--ppo.kl-target is 0.0; it must be above 0",
    ("--ppo.dual-clip", "0.9"): "--ppo.dual-clip is 0.9; it must be above 1, or 0 (off)",
    ("--ppo.advantage", "group", "--value.share"): "--value.share must be off: only gae has a value function",
    ("--ppo.kl", "0"): "--ppo.kl-target with --ppo.kl must be a coefficient to begin with, above 0",
    ("--data.eval-rows", "6"): "--data.eval-rows 6 of 6 rows leaves none to train on; hold out fewer",
    ("--data.eval", "nowhere.jsonl"): "nowhere.jsonl: no such file",
    ("--ppo.clip-high", "-0.1"): "--ppo.clip-high is -0.1; it must be above 0",
    ("--rollout.eval-every", "-1"): "--rollout.eval-every is -1; it must be at least 0",
    ("--rollout.eos-score", "nan"): "--rollout.eos-score is nan; it must be a finite number",
    ("--train.eps", "0"): "--train.eps is 0.0; it must be above 0",
    ("--data.max-length", "3"): "no prompt of {world}/prompts.jsonl is left (6 prompts, 6 of them longer than 3 tokens "
    "and left out); see --data.max-length",
}


@pytest.mark.parametrize("more", WRONG, ids=" ".join)
def test_options_that_do_not_go_together(world, tmp_path, capfd, more):
    assert refused(flags(world, tmp_path / "a", *more), capfd) == "lowalign: " + WRONG[more].format(world=world)


def test_without_rewards_or_prompts(world, tmp_path, capfd):
    bare = ["ppo", "--model", f"{world}/model", "--out", str(tmp_path / "a")]
    assert refused(bare, capfd) == "lowalign: no prompts: give --data FILE…"
    with_data = [*bare, "--data", f"{world}/prompts.jsonl"]
    assert refused(with_data, capfd) == "lowalign: no reward: give --reward RUN or --reward FILE.py:NAME"


# -- what it starts from ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sft(world, tmp_path_factory):
    """An SFT run that was trained with dropout."""
    out = tmp_path_factory.mktemp("sft") / "sft"
    command = [
        "sft",
        "--model",
        f"{world}/model",
        "--data",
        f"{world}/rows.jsonl",
        "--out",
        str(out),
        "--train.steps",
        "2",
    ]
    assert main([*command, "--adapter.r", "4", "--adapter.dropout", "0.3", "--data.no-cache"]) == 0
    return out


@pytest.mark.parametrize("mode", ["stack", "copy"])
def test_dropout_of_the_init_run_is_off(world, sft, tmp_path, mode):
    """In every role: with noise, the ratio of the first step would not be 1, and the first KL not 0."""
    out = tmp_path / "run"
    more = ("--init", str(sft), "--init-mode", mode, "--train.token-budget", "40", "--base.dtype", "float32")
    assert main(flags(world, out, *more, steps=1)) == 0
    first = lines(out)[0]
    assert first["approx_kl"] == 0
    assert first["kl"] == 0 if mode == "stack" else abs(first["kl"]) < 1e-4  # 1e-6 seen


def test_pretraining_mix_and_a_shared_value(world, sft, tmp_path):
    out = tmp_path / "run"
    more = ("--init", str(sft), "--value.share", "--ppo.ptx-data", f"{world}/rows.jsonl", "--rollout.log-samples", "0")
    assert main(flags(world, out, *more, steps=3)) == 0
    assert all(line["ptx_loss"] > 0 and line["value_loss"] > 0 for line in lines(out))
    assert (out / "samples.jsonl").read_bytes() == b""
    host = Host(Base.load(world / "model", device="cpu", quiet=True))
    assert len(load_stack(host, "both", str(out))) == 2


def test_where_the_value_function_comes_from(tmp_path):
    world = tiny_runs.make(tmp_path)
    base = tiny_runs.load(world / "model")
    host = Host(base)
    host.add("init", LoraConfig(r=2, target_modules=["q_proj"]))
    host.add("policy", LoraConfig(r=2, target_modules=["q_proj"]))

    def added(*reward, kind="lora", share=False, normalise="none"):
        rollout = RolloutConfig(normalise=normalise)
        config = PPOConfig(
            "", Path(), reward=reward, rollout=rollout, value=ValueConfig(AdapterConfig(kind, r=4), share)
        )
        stack = add_value(host, config, ("init", "policy"), ("init",))
        weights = {k: v.clone() for k, v in host.weights(stack[-1]).items()}
        if not share:
            host.delete(VALUE)
        return stack, weights

    stack, weights = added(f"0.5*{world}/reward")  # the reward model, head and all
    expected = load_file(world / "reward" / "adapter_model.safetensors")
    assert stack == (VALUE,)
    rest = {f"base_model.model.{k}": v.tolist() for k, v in weights.items() if k != "score.weight"}
    assert rest == {k: v.tolist() for k, v in expected.items() if "score" not in k}
    head = expected["base_model.model.score.weight"]
    assert torch.equal(weights["score.weight"], 0.5 * head)  # weight 0.5: the value function predicts half the scores
    _, weights = added(
        f"0.5*{world}/reward", normalise="running"
    )  # … or the scores divided by their spread, which is 2
    assert torch.equal(weights["score.weight"], head / 2.0)
    _, weights = added(f"-1*{world}/reward", normalise="running")
    assert torch.equal(weights["score.weight"], head / -2.0)  # dividing by the spread keeps the sign of the weight
    for reward, kind in (((f"{world}/reward",), "prefix"), ((f"{world}/reward", f"{world}/other"), "lora")):
        stack, weights = added(
            *reward, kind=kind
        )  # of another kind, or one of several rewards: a fresh adapter, starting at zero
        assert stack == ("init", VALUE) and not weights["score.weight"].any()
    stack, weights = added(f"{world}/reward", share=True)
    assert stack == ("init", "policy") and not weights["score.weight"].any()
