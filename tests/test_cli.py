"""The command line: what each verb is handed, its exit codes, and what it prints when something is wrong."""

import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

from lowalign import cli
from lowalign.config.commands import AnyDataConfig, DataCheckConfig
from lowalign.config.sections import DataConfig, TrainConfig
from lowalign.config.training import SFTConfig
from lowalign.config.verbs import VERBS, Verb, verbs
from lowalign.errors import UserError

HEAVY = ("torch", "transformers", "peft", "bitsandbytes", "datasets", "accelerate", "numpy")
MINIMAL = ["sft", "--model", "m", "--out", "o"]


@pytest.fixture
def called(monkeypatch):
    """Stands in for the functions of all verbs but recipes; collects their arguments, and returns 0."""
    calls = []

    def note(*arguments):
        calls.append(arguments[0] if len(arguments) == 1 else arguments)
        return 0

    for verb in verbs():
        module, _, function = verb.function.partition(":")
        if module != "commands.recipes":
            stand_in = types.SimpleNamespace(**{function: note})
            monkeypatch.setitem(sys.modules, f"lowalign.{module}", stand_in)
    return calls


def in_process(monkeypatch, work):
    monkeypatch.setitem(sys.modules, "lowalign.commands.sft", types.SimpleNamespace(sft=work))
    return cli.main(MINIMAL)


def test_sft_gets_the_config(called):
    assert cli.main(["sft", "--model", "m", "--out", "o", "--data", "a", "b", "--train.seed=3", "--resume"]) == 0
    assert called == [
        SFTConfig("m", Path("o"), DataConfig(files=("a", "b")), train=TrainConfig(seed=3), resume=True),
    ]


def test_sft_takes_a_recipe_by_name_or_path(called, tmp_path):
    assert cli.main(["recipes", "copy", "prefix/sft", str(tmp_path / "mine.yaml")]) == 0
    for recipe in ("prefix/sft", "prefix/sft.yaml", str(tmp_path / "mine.yaml")):
        assert cli.main(["sft", recipe, "--model", "m", "--out", "o", "--train.steps", "2"]) == 0
    assert called[0].adapter.kind == "prefix"
    assert (called[0].model, called[0].train.steps) == ("m", 2)
    assert called[0] == called[1] == called[2]


def test_generate_repeats_adapters_and_takes_one_kind_of_prompt(called, capsys):
    ask = ["generate", "--model", "m", "--adapter", "a", "--adapter", "b", "--prompt", "hi", "--n", "3"]
    assert cli.main([*ask, "--sampling.temperature", "0.5", "--data.prompt-format", "text"]) == 0
    config = called[0]
    assert (config.adapter, config.prompt, config.n, config.data.prompt_format) == (("a", "b"), "hi", 3, "text")
    assert config.sampling.temperature == 0.5
    for wrong in ([*ask, "--data", "file"], ["generate", "--model", "m"]):
        assert cli.main(wrong) == 1
        assert "either --prompt TEXT or --data FILE" in capsys.readouterr().err


def test_data_check_takes_files_before_the_flags(called, capsys):
    assert cli.main(["data", "check", "a", "b", "--model", "m", "--data.shape", "text", "--rows", "9"]) == 0
    assert called == [DataCheckConfig("m", rows=9, files=("a", "b"), data=AnyDataConfig(shape="text"))]
    assert cli.main(["data", "check", "--model", "m"]) == 1
    assert capsys.readouterr().err == "lowalign: no FILE to check: lowalign data check FILE… --model M\n"


def test_data_check_exits_with_1_when_rows_are_bad(monkeypatch):
    from lowalign.commands import data_check

    calls = []
    monkeypatch.setattr(data_check, "check", lambda *arguments: calls.append(arguments) or len(calls) - 1)
    command = ["data", "check", "a", "--model", "m", "--data", "b", "--data.shape", "text"]
    assert [cli.main(command), cli.main(command)] == [0, 1]
    assert calls == [(AnyDataConfig(files=("a", "b"), shape="text"), "m", None, 3, None, False)] * 2


def test_a_verb_is_one_entry_of_the_table(called, monkeypatch, capsys):
    merge = Verb("fuse adapters", "commands.fuse:fuse", SFTConfig, "[RECIPE] --model M --out DIR", "many into one")
    monkeypatch.setitem(VERBS, "export", (merge,))
    configs = []
    stand_in = types.SimpleNamespace(fuse=lambda config: configs.append(config))
    monkeypatch.setitem(sys.modules, "lowalign.commands.fuse", stand_in)
    assert cli.main(["fuse", "adapters", "--model", "m", "--out", "o"]) == 0
    assert configs == [SFTConfig("m", Path("o"))]
    assert cli.main(["fuse", "--help"]) == cli.main(["--help"]) == 0
    usage, _, text = capsys.readouterr().out.partition("\n")
    assert usage == "usage: lowalign fuse adapters [RECIPE] --model M --out DIR"
    assert re.search(r"^export\n  fuse adapters \[RECIPE\] --model M --out DIR +many into one$", text, re.MULTILINE)


def test_every_verb_names_a_function():
    for verb in verbs():
        module, _, function = verb.function.partition(":")
        path = Path(cli.__file__).parent.joinpath(*module.split(".")).with_suffix(".py")
        assert f"def {function}(" in path.read_text(), verb


def test_old_names_of_options_work_with_a_notice(called, capsys):
    command = ["ppo", "--model", "m", "--out", "o", "--ppo.lam", "0.5", "--rollout.show=7", "--ppo.stop_at_kl", "0.3"]
    assert cli.main(command) == 0
    ppo = called[0].ppo
    assert (ppo.gae_lambda, called[0].rollout.log_samples, ppo.target_kl) == (0.5, 7, 0.3)
    assert capsys.readouterr().err.splitlines() == [
        f"--{old} is now --{new}; the old name will stop working in the next release"
        for old, new in [
            ("ppo.lam", "ppo.gae-lambda"),
            ("rollout.show", "rollout.log-samples"),
            ("ppo.stop-at-kl", "ppo.target-kl"),
        ]
    ]


@pytest.mark.parametrize("code", [0, 1, 130, 143])
def test_the_exit_code_is_the_works(monkeypatch, code):
    assert in_process(monkeypatch, lambda config: code) == code


def test_a_mistake_of_the_user_has_no_traceback(monkeypatch, capsys):
    def work(config):
        raise UserError("rows.jsonl:3: no completion")

    assert in_process(monkeypatch, work) == 1
    assert capsys.readouterr().err == "lowalign: rows.jsonl:3: no completion\n"


def test_a_bug_has_one(monkeypatch, capsys):
    def work(config):
        raise ZeroDivisionError("ours")

    assert in_process(monkeypatch, work) == 2
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert "ZeroDivisionError: ours" in error


def test_memory_that_runs_out_is_no_bug(monkeypatch, capsys):
    def work(config):
        import torch

        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore of it")

    assert in_process(monkeypatch, work) == 1
    error = capsys.readouterr().err
    assert error.startswith(
        "lowalign: out of memory: CUDA out of memory. Tried to allocate 20.00 GiB. Close other programs"
    )
    assert "Traceback" not in error


def test_memory_of_the_driver_that_runs_out_is_no_bug_either(monkeypatch, capsys):
    def work(config):
        import torch

        raise torch.AcceleratorError(config.model)

    for message, code in (
        ("CUDA error: out of memory", 1),
        ("CUDA error: an illegal memory access was encountered", 2),
    ):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "lowalign.commands.sft", types.SimpleNamespace(sft=work))
            assert cli.main(["sft", "--model", message, "--out", "o"]) == code
        assert ("Traceback" in capsys.readouterr().err) == (code == 2)


def test_an_interrupt_is_one_line(monkeypatch, capsys):
    def work(config):
        raise KeyboardInterrupt

    assert in_process(monkeypatch, work) == 130
    assert capsys.readouterr().err == "lowalign: stopped by SIGINT\n"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("stf", "there is no verb stf; did you mean sft?"),
        ("sft --model m --out o --train.learing-rate 3", "--train.learning-rate"),
        ("sft --model m", "give --out DIR: folder of the run"),
        ("sft lora/sft --data x --out o", "give --model M: base model, a folder or a Hub id"),
        ("judge --model m", "give --out DIR: folder of the run"),
        ("judge --model m --out o", "no data: give --data FILE…"),
        ("score --data x", "give --model M: base model, a folder or a Hub id give --adapter RUN: reward run"),
        ("sft --modle m", "--modle"),
        ("generate --model m", "generate takes either --prompt TEXT or --data FILE"),
        ("dpo lora/sft --model m --out o", "lora/sft is a recipe for sft, not for dpo; did you mean lora/dpo?"),
        ("best-of-n prefix/ppo", "prefix/ppo is a recipe for ppo, not for best-of-n; did you mean prefix/best_of_n?"),
        ("recipes show", "give NAME: name of a packaged recipe"),
        ("data chekc a --model m", "usage: lowalign data check"),
        ("sft --model m --out o --adapter.kind loar", "expected one of lora, prompt, prefix, not 'loar'"),
        ("sft lora/sfd --model m", "there is no recipe lora/sfd; did you mean lora/sft?"),
        ("sft lora/sft more.jsonl", "sft takes one RECIPE, found lora/sft more.jsonl"),
        ("data", "usage: lowalign data check"),
        ("recipes shwo", "usage: lowalign recipes list"),
        ("recipes show nothing", "there is no recipe nothing"),
        ("demo --fast", "usage: lowalign demo"),
    ],
)
def test_mistakes_exit_with_1_and_say_what_to_do(called, capsys, line, says):
    assert cli.main(line.split()) == 1
    captured = capsys.readouterr()
    assert says in " ".join(captured.err.split())
    assert re.search(r"^lowalign: (?!usage)", captured.err, re.MULTILINE)
    assert captured.out == ""
    assert called == []


TOKEN = "hf_abcdefghijklmnopqrstuvwxyzABCDEFGH"


@pytest.mark.parametrize("kind", [UserError, RuntimeError])
def test_tokens_never_reach_the_screen(monkeypatch, capsys, kind):
    def work(config):
        raise kind(f"401 for {TOKEN}, and for s3cret-of-another-form")

    monkeypatch.setenv("HF_TOKEN", "s3cret-of-another-form")
    assert in_process(monkeypatch, work) != 0
    assert cli.main([*MINIMAL, f"--hub-token={TOKEN}"]) == 1
    assert cli.main([*MINIMAL, "--hub-token", TOKEN]) == 1
    captured = capsys.readouterr()
    assert "401 for hf_…" in captured.err
    assert TOKEN not in captured.out + captured.err
    assert "s3cret" not in captured.out + captured.err


def run(*command: str, **options) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[1])}
    return subprocess.run(command, capture_output=True, text=True, env=environment, **options)


PROBE = f"""
import sys, time
from lowalign.cli import main
code = main(sys.argv[1:])
loaded = [name for name in {HEAVY!r} if name in sys.modules]
print("probe", code, round(time.process_time(), 2), *loaded, file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("--help", 0),
        ("data --help", 0),
        ("recipes show lora/ppo --full", 0),
        ("--version", 0),
        ("sft --help", 0),
        ("generate --help", 0),
        ("data check --help", 0),
        ("recipes list", 0),
        ("sft --model m --train.sedd 3", 1),
        ("sft lora/sft --model m --train.seed three", 1),
    ],
)
def test_help_and_complaints_come_at_once(line, code):
    """Nothing heavy is imported, and it costs little processor time: at most ten times the 0.3 s measured."""
    answer = run(sys.executable, "-c", PROBE, *line.split())
    probe, got, seconds, *loaded = answer.stderr.splitlines()[-1].split()
    assert (probe, got, loaded) == ("probe", str(code), [])
    assert float(seconds) < 3
    assert code or answer.stdout.strip()


def test_import_is_light_and_names_are_there():
    loaded = run(sys.executable, "-c", f"import lowalign, sys; print([n for n in {HEAVY!r} if n in sys.modules])")
    assert loaded.stdout == "[]\n"
    import lowalign
    from lowalign.data.pack import Example

    assert lowalign.Example is Example
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        lowalign.Nothing  # noqa: B018


def test_a_closed_pipe_is_quiet():
    pipe = f"{sys.executable} -m lowalign recipes show lora/sft | true; exit ${{PIPESTATUS[0]}}"
    answer = run("bash", "-c", pipe)
    assert answer.stderr == ""


def test_as_a_module():
    answer = run(sys.executable, "-m", "lowalign", "--version")
    assert (answer.returncode, answer.stdout) == (0, f"lowalign {cli.__version__}\n")
    assert run(sys.executable, "-m", "lowalign", "nonsense").returncode == 1
