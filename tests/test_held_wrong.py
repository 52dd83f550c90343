"""Ways of holding lowalign wrong: each has a message that names what was wrong, exit code 1, no traceback, and loses no file."""

import json
from pathlib import Path

import pytest

import lowalign as la
from lowalign.cli import main
from lowalign.errors import UserError
from lowalign.model.base.base import Base
from tests.commands.tiny_runs import FP32, make

SFT = "sft --model BASE --out OUT"
DPO = "dpo --model BASE --data W/pairs.jsonl --out OUT"
PPO = "ppo --model BASE --data W/prompts.jsonl --out OUT"
BEST = "best-of-n --model BASE --data W/prompts.jsonl --out OUT"
ASK = "generate --model BASE --prompt Who?"
COMPARE = "compare --a W/policy --b base --data W/prompts.jsonl --out OUT"
EVAL = "eval --data W/pairs.jsonl --adapter W/reward"
JUDGE = "judge --model BASE --data W/answers.jsonl --out OUT"

COMMAND_LINES = [
    # options
    ("sft --lr 3", "sft has no option --lr; did you mean --train.learning-rate?"),
    ("stf --model BASE", "there is no verb stf; did you mean sft?"),
    (f"{SFT} --data W/pairs.jsonl W/none.jsonl", "W/none.jsonl: no such file; did you mean W/answers.jsonl?"),
    (SFT, "no data: give --data FILE…"),
    (f"{SFT} --data W/prompts.jsonl --train.batch-size 0", "--train.batch-size is 0; it must be at least 1"),
    (f"{SFT} --data W/prompts.jsonl --train.learning-rate nan", "--train.learning-rate is nan; it must be above 0"),
    (f"{SFT} --data W/prompts.jsonl --train.learning-rate 2e-4x", "--train.learning-rate: expected a number, not '2e-4x'"),
    (f"{SFT} --data W/prompts.jsonl --base.device gpu", "--base.device gpu is no device; use auto, cpu, cuda or cuda:1"),
    (f"{SFT} --data W/prompts.jsonl --base.device cuda:9", "--base.device cuda:9: "),
    (f"{SFT} --data W/prompts.jsonl --base.dtype int8", "--base.dtype: expected one of bfloat16, float16, float32"),
    (f"{SFT} --data W/prompts.jsonl --train.result best", "--train.result best chooses by held-out rows"),
    (f"{SFT} --data W/prompts.jsonl --data.max-length 1", "--data.max-length 1 leaves no room"),
    (f"{SFT} --data W/prompts.jsonl --data.template W/none.jinja", "the chat template W/none.jinja cannot be read"),
    (f"{SFT} --data W/sft.jsonl --data.eval-rows 4", "leaves none to train on; hold out fewer"),
    (f"{SFT} --data W/sft.jsonl --init W/none", "W/none is not a folder"),
    (f"{SFT} --data W/sft.jsonl --init W/reward", "is a reward model: it scores answers"),
    ("sft lora/dpo --model BASE --out OUT", "lora/dpo is a recipe for dpo, not for sft; did you mean lora/sft?"),
    ("sft W/bad.yaml --model BASE --out OUT", "W/bad.yaml:2: there is no key train.learning_rat; did you mean train.learning_rate?"),
    ("sft W/zero.yaml --model BASE --out OUT", "W/zero.yaml:2: train.batch_size is 0; it must be at least 1"),
    ("sft W/none.yaml --model BASE --out OUT", "there is no recipe W/none.yaml"),
    # folders and files
    ("sft --model W/none --data W/sft.jsonl --out OUT", "W/none is not a folder"),
    ("sft --model BASE --data W/sft.jsonl --out W/sft.jsonl/run", "cannot be the folder of a run"),
    ("sft --model BASE --data W/sft.jsonl --out W/sft.jsonl", "cannot be the folder of a run"),
    ("sft --model W/policy --data W/sft.jsonl --out OUT", "the tokenizer of W/policy cannot be loaded"),
    ("sft --model BASE --data W/bad.jsonl --out OUT", "correct them, or skip them with --data.on-error skip"),
    ("sft --model BASE --data W/empty.jsonl --out OUT", "no row of W/empty.jsonl can be used: the files are empty"),
    # methods
    (f"{DPO} --adapter.dropout 0.1", "--adapter.dropout is 0.1: with dropout the policy is not its reference"),
    (f"{DPO} --dpo.loss ipo --dpo.label-smoothing 0.1", "belong to --dpo.loss sigmoid, not ipo"),
    (f"{DPO} --reference W/none", "W/none is not a folder"),
    ("dpo --model BASE --data W/sft.jsonl --out OUT", "correct them, or skip them with --data.on-error skip"),
    (PPO, "no reward: give --reward RUN or --reward FILE.py:NAME"),
    (f"{PPO} --reward W/broken.py:f", "W/broken.py:2: SyntaxError"),
    (f"{PPO} --reward W/imports.py:f", "W/imports.py:1: ModuleNotFoundError: No module named 'no_such_module'"),
    (f"{PPO} --reward W/good.py:reward", "W/good.py: there is no function reward; did you mean rewards?"),
    (f"{PPO} --reward W/one.py:f", "W/one.py:1: f takes no prompts and completions; expected def reward(prompts, completions"),
    (f"{PPO} --reward W/asks.py:f", "W/asks.py:1: f requires answr, which is no column of the prompts' rows (did you mean answer?)"),
    (f"{PPO} --reward W/policy", "W/policy is not a reward model: it has no scalar head (`lowalign reward` trains one)"),
    (f"{PPO} --reward W/good.py:rewards --rollout.prompts 7", "--rollout.prompts must be a multiple of --train.batch-size"),
    (f"{PPO} --reward W/good.py:rewards --sampling.temperature 0", "--sampling.temperature must be above 0"),
    (f"{BEST} --reward W/good.py:rewards --n 0", "--n is 0; it must be at least 1"),
    (f"{BEST} --reward W/good.py:rewards --rounds 3", "--rounds goes with --train"),
    # generate, score, merge, hub
    ("generate --model BASE", "generate takes either --prompt TEXT or --data FILE"),
    (f"{ASK} --sampling.top-p 1.5", "--sampling.top-p is 1.5; it must be above 0 and at most 1"),
    (f"{ASK} --adapter W/reward", "is a reward model: it scores answers and cannot write them"),
    (f"{ASK} --adapter W/cut", "W/cut/adapter_model.safetensors is damaged or incomplete"),
    (f"{ASK} --adapter W/pointer", "W/pointer/adapter_model.safetensors is a Git LFS pointer, not the weights; download it again"),
    (f"{ASK} --adapter W/nan", "W/nan/adapter_model.safetensors has NaN or infinity in"),
    (f"{ASK} --resume", "--resume goes on with a file: give it with --out FILE"),
    ("score --model BASE --adapter W/policy --data W/pairs.jsonl", "W/policy is not a reward model: it has no scalar head (`lowalign reward` trains one)"),
    ("merge W/none --out OUT", "W/none is not a folder"),
    ("checkpoint W/none --out OUT", "W/none"),
    ("data check W/none.jsonl --model BASE", "W/none.jsonl: no such file; did you mean W/answers.jsonl?"),
    # the newer verbs: chat, compare, eval, report, run, judge, plan, label
    ("chat", "nothing to talk to: lowalign chat RUN_OR_ADAPTER… or lowalign chat --model M"),
    ("chat W/none --model BASE", "W/none is not a folder"),
    ("chat W/reward --model BASE", "is a reward model: it scores answers and cannot write them"),
    ("chat W/policy --sampling.max-new-tokens 0", "--sampling.max-new-tokens is 0; it must be at least 1"),
    ("chat W/policy --temprature 1", "chat has no option --temprature; did you mean --sampling.temperature?"),
    ("compare --a W/policy --b base --out OUT", "no data: give --data FILE…"),
    ("compare --a base --b off --data W/prompts.jsonl --out OUT", "base and off name no base: give --model M"),
    (f"{COMPARE} --judge W/broken.py:f", "W/broken.py:2: SyntaxError"),
    (f"{COMPARE} --judge base", "--judge base: to ask the base itself, give --judge model"),
    (f"{COMPARE} --judge W/good.py:rewards --template W/t.jinja", "--template is the question to a judging model"),
    (f"{COMPARE} --margin -1", "--margin is -1.0; it must be at least 0"),
    ("eval --model BASE", "eval takes either --data FILE… or --tasks NAME,NAME…"),
    ("eval --data W/pairs.jsonl", "nothing to measure: give --adapter RUN, or --model M for the base alone"),
    (f"{EVAL} --fewshot 3", "--task-folder, --fewshot and --chat-template are options of --tasks"),
    (f"{EVAL} --out W/no/where.json", "there is no folder W/no"),
    (f"{EVAL} --data.limit 0", "--data.limit is 0; it must be at least 1"),
    (f"{EVAL} --beta inf", "--beta is inf; it must be above 0"),
    ("report", "no run to report: lowalign report RUN… --out FILE.html"),
    ("report W/none", "W/none"),
    ("report W/policy W/reward", "a report of several runs needs a place: give --out FILE.html"),
    ("report W/run --smooth 2", "--smooth is 2.0; it must be at least 0 and below 1"),
    ("report W/run --out W/sft.jsonl", "W/sft.jsonl is there, and no report of lowalign"),
    ("run W/none.yaml --out OUT", "there is no recipe W/none.yaml"),
    ("run lora/sft --out OUT", "is a recipe for sft, not a pipeline: it has no key `stages`"),
    ("run W/pipeline.yaml --out OUT", "W/pipeline.yaml:3: {rows} is no earlier stage; give it with --set rows=VALUE"),
    ("run W/pipeline.yaml --out OUT --set rows", "--set takes NAME=VALUE, found rows"),
    ("run W/zero_stage.yaml --model BASE --out OUT", "W/zero_stage.yaml:3: train.steps is 0; it must be at least 1"),
    (f"{JUDGE} --reward W/asks.py:f", "W/asks.py:1: f requires answr, which is no column"),
    ("judge --data W/answers.jsonl --out OUT", "no judge: give --model M, or --reward SPEC"),
    ("plan lora/sft --model BASE --vram much", "--vram much: expected a size such as 24GB or 22.5GiB"),
    ("plan lora/sft --model BASE --length 1", "--length is 1; it must be at least 2"),
    ("plan lora/sft --model BASE --card 4091", '--card "4091" is not in the table'),
    ("label --out W/x.jsonl", "no data: give --data FILE…"),
    ("label --data W/answers.jsonl --out W/x.jsonl --port 70000", "--port is 70000; it must be at least 0 and at most 65,535"),
]  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = make(tmp_path_factory.mktemp("world"))
    pair = {"prompt": "Who?", "chosen": "A fox.", "rejected": "The."}
    rows = {
        "sft": [{"prompt": f"Who {n}?", "completion": "A fox."} for n in range(4)],
        "pairs": [pair] * 4,
        "prompts": [{"prompt": f"Who {n}?", "answer": "a"} for n in range(4)],
        "answers": [{"prompt": "Who?", "answer": "a", "completions": ["A fox.", "The."]}],
        "bad": [{"prompt": 3, "completion": "x"}],
        "empty": [],
    }
    for name, content in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    texts = {
        "bad.yaml": "train:\n  learning_rat: 1\n",
        "zero.yaml": "train:\n  batch_size: 0\n",
        "pipeline.yaml": "stages:\n  sft:\n    data: '{rows}'\n    recipe: lora/sft\n",
        "zero_stage.yaml": "stages:\n  sft:\n    train: {steps: 0}\n    recipe: lora/sft\n",
        "broken.py": "def f(prompts, completions):\n    return [1 for\n",
        "imports.py": "import no_such_module\n",
        "good.py": "def rewards(prompts, completions):\n    return [0.0] * len(completions)\n",
        "one.py": "def f(completion):\n    return 0\n",
        "asks.py": "def f(prompts, completions, answr):\n    return [0.0] * len(completions)\n",
        "t.jinja": "{{ prompt }}{{ a }}{{ b }}",
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    (folder / "run").mkdir()
    (folder / "run/recipe.yaml").write_text("verb: sft\n")
    (folder / "run/metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    whole = (folder / "policy/adapter_model.safetensors").read_bytes()
    broken = {
        "cut": whole[:-100],
        "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "nan": None,
    }
    for name, content in broken.items():
        (folder / name).mkdir()
        (folder / name / "adapter_config.json").write_bytes((folder / "policy/adapter_config.json").read_bytes())
        file = folder / name / "adapter_model.safetensors"
        file.write_bytes(whole[: -4 * 8] + b"\xff\xff\xff\x7f" * 8 if content is None else content)
    return folder


@pytest.fixture
def no_base(monkeypatch):
    """These mistakes are found before a base is loaded."""

    def load(*args, **options):
        raise AssertionError("the base is loaded")

    monkeypatch.setattr(Base, "load", load)


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }


@pytest.mark.parametrize(("line", "message"), COMMAND_LINES, ids=[line for line, _ in COMMAND_LINES])
def test_a_command_line(world, tmp_path, capsys, monkeypatch, no_base, line, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = files(world)
    place = lambda text: text.replace("W/", f"{world}/").replace("BASE", f"{world}/model")  # noqa: E731
    words = [place(word).replace("OUT", str(tmp_path / "out")) for word in line.split()]
    assert main(words) == 1
    error = capsys.readouterr().err
    last = error.splitlines()[-1]
    assert place(message) in error, error
    assert last.startswith("lowalign: ") or "\n" in error.strip()
    assert "Traceback" not in error and "bug" not in error
    assert files(world) == before
    assert not (tmp_path / "out/adapter").exists() and not (tmp_path / "out/checkpoints").exists()


CALLS = [
    (lambda w, out: la.sft(w.base, data=str(w.folder / "sft.jsonl"), out=out, stepz=3), "sft has no option stepz; did you mean steps?"),
    (lambda w, out: la.sft(w.base, data=str(w.folder / "sft.jsonl"), out=out, steps=0), "--train.steps is 0; it must be at least 1"),
    (lambda w, out: la.sft(w.base, data=str(w.folder / "sft.jsonl"), out=out, train={"betas": (0.9, 2)}), "--train.betas is 2.0; it must be at least 0 and below 1"),
    (lambda w, out: la.sft(w.base, data=3 * [1], out=out), "data is a file, several files, or rows"),
    (lambda w, out: la.sft(w.base, data=[], out=out), "no data: give --data FILE…"),
    (lambda w, out: la.sft(w.base, data=[{"prompt": 3}], out=out), "correct them, or skip them"),
    (lambda w, out: la.dpo(w.base, data=str(w.folder / "pairs.jsonl"), out=out, beta=-1), "--dpo.beta is -1.0; it must be above 0"),
    (lambda w, out: la.ppo(w.base, data=str(w.folder / "prompts.jsonl"), out=out, reward=lambda completion: 0), "takes no prompts and completions; expected"),
    (lambda w, out: la.best_of_n(w.base, data=str(w.folder / "prompts.jsonl"), out=out, reward=f"{w.folder}/none.py:f"), "none.py"),
    (lambda w, out: la.sft(w.base, data=str(w.folder / "sft.jsonl"), out=out, recipe="lora/sfd"), "there is no recipe lora/sfd; did you mean lora/sft?"),
    (lambda w, out: la.Sampling(temperature=-1), "--sampling.temperature is -1; it must be at least 0"),
    (lambda w, out: la.Base.load(w.folder / "none"), "is not a folder"),
]  # fmt: skip


class Loaded:
    """The world, with its base loaded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base = Base.load(folder / "model", quantization="none", dtype="float32", device="cpu", quiet=True)


@pytest.fixture(scope="module")
def loaded(world) -> Loaded:
    return Loaded(world)


@pytest.mark.parametrize("number", range(len(CALLS)))
def test_a_call_from_python(loaded, tmp_path, number):
    call, message = CALLS[number]
    before = files(loaded.folder)
    with pytest.raises(UserError) as refused:
        call(loaded, tmp_path / "out")
    assert message in str(refused.value)
    assert files(loaded.folder) == before


def test_there_are_more_than_sixty_ways_and_25_of_the_newer_verbs():
    newer = [line for line, _ in COMMAND_LINES if line.split()[0] in ("chat", "compare", "eval", "report", "run")]
    assert len(COMMAND_LINES) + len(CALLS) >= 60 and len(newer) + len(CALLS) >= 25


@pytest.mark.parametrize("verb", ["sft", "generate", "best-of-n", "judge", "compare"])
def test_resume_without_a_run_starts_one_and_says_so_first(world, tmp_path, capsys, verb):
    out, model = tmp_path / "out", ("--model", f"{world}/model", *FP32)
    short = ("--sampling.max-new-tokens", "2")
    reward = f"{world}/good.py:rewards"
    commands = {
        "sft": [
            *model,
            "--data",
            f"{world}/sft.jsonl",
            "--train.steps",
            "1",
            "--train.optimizer",
            "adamw",
            "--data.no-cache",
        ],
        "generate": [*model, "--data", f"{world}/prompts.jsonl", *short],
        "best-of-n": [*model, "--data", f"{world}/prompts.jsonl", "--reward", reward, "--n", "2", *short],
        "judge": ["--data", f"{world}/answers.jsonl", "--reward", reward],
        "compare": [*model, "--a", "base", "--b", "off", "--data", f"{world}/prompts.jsonl", "--judge", reward, *short],
    }
    assert main([verb, *commands[verb], "--out", str(out), "--resume"]) == 0
    first = next(line for line in capsys.readouterr().err.splitlines() if line)
    assert first == (
        f"--resume: there is no {out} yet; this starts it"
        if verb == "generate"
        else f"--resume: {out} has no run yet; this starts one"
    )
    assert main([verb, *commands[verb], "--out", str(out), "--resume"]) == 0
    assert "yet; this starts" not in capsys.readouterr().err


def test_a_longer_run_by_steps_or_epochs(world, tmp_path, capsys):
    """With a constant schedule, 2 steps and then 2 more are the same bytes as 4; and by epochs as by steps."""
    from safetensors.torch import load_file

    def run(out, *more):
        fixed = [
            "--train.batch-size",
            "2",
            "--train.schedule",
            "constant",
            "--train.warmup",
            "0",
            "--train.optimizer",
            "adamw",
        ]
        command = ["sft", "--model", f"{world}/model", *FP32, "--data", f"{world}/sft.jsonl", "--data.no-cache", *fixed]
        assert main([*command, "--out", str(tmp_path / out), *more]) == 0
        return load_file(tmp_path / out / "adapter/adapter_model.safetensors")

    whole = run("whole", "--train.steps", "4")
    run("parts", "--train.epochs", "1")
    assert "2 steps in " in capsys.readouterr().err
    longer = run("parts", "--train.epochs", "2", "--resume")
    assert all((whole[name] == longer[name]).all() for name in whole)
    command = [
        "sft",
        "--model",
        f"{world}/model",
        *FP32,
        "--data",
        f"{world}/sft.jsonl",
        "--out",
        str(tmp_path / "parts"),
    ]
    assert main([*command, "--data.no-cache", "--resume", "--train.epochs", "3"]) == 1
    assert "for a longer run change only --train.steps or --train.epochs" in capsys.readouterr().err


def test_ctrl_c_before_the_first_step_says_what_is_kept(world, tmp_path, capsys, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(Base, "load", interrupted)
    out = tmp_path / "out"
    assert (
        main(["sft", "--model", f"{world}/model", "--data", f"{world}/sft.jsonl", "--out", str(out), "--data.no-cache"])
        == 130
    )
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("stopped by SIGINT before the first step. Kept: ") and last.endswith(
        "same command and --resume"
    )
    assert (out / "recipe.yaml").exists()


def test_a_full_disk_is_said_before_the_base_is_loaded(world, tmp_path, capsys, monkeypatch, no_base):
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 0))
    for words in (["sft", "--data", f"{world}/sft.jsonl"], ["best-of-n", "--data", f"{world}/prompts.jsonl", "--reward", f"{world}/good.py:rewards"]):  # fmt: skip
        assert main([*words, "--model", f"{world}/model", "--out", str(tmp_path / "out")]) == 1
        assert "results take at least 0.1 GB and 0.0 GB are free in" in capsys.readouterr().err
