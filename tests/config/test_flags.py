"""Flags: mistakes are one line that says what to write, and --help shows types that a person reads."""

import re
import types

import pytest

from lowalign import cli
from lowalign.config import recipe
from lowalign.config.commands import ChatConfig, GenerateConfig
from lowalign.config.evaluation import EvalConfig
from lowalign.config.flags import ELSEWHERE
from lowalign.config.training import PPOConfig, SFTConfig
from lowalign.config.verbs import verbs
from lowalign.config.yaml_flags import options
from lowalign.errors import UserError

RUN = ["--model", "m", "--out", "o"]


@pytest.mark.parametrize(
    ("config", "flags", "message"),
    [
        (SFTConfig, ["--lr", "1e-4"], "sft has no option --lr; did you mean --train.learning-rate? "),
        (SFTConfig, ["--learning_rate=1"], "sft has no option --learning_rate; did you mean --train.learning-rate? "),
        (SFTConfig, ["--data.max-lenght", "9"], "sft has no option --data.max-lenght; did you mean --data.max-length? "),
        (SFTConfig, ["--lora_alpha", "9"], "sft has no option --lora_alpha; did you mean --adapter.alpha? "),
        (SFTConfig, ["--sampling.n", "9"], "sft has no option --sampling.n (`lowalign sft --help` lists them)"),
        (PPOConfig, ["--epochs", "9"], "ppo has no option --epochs; did you mean --train.epochs or --ppo.epochs? "),
        (PPOConfig, ["--temprature", "9"], "ppo has no option --temprature; did you mean --sampling.temperature? "),
        (SFTConfig, ["--train.steps", "many"], "--train.steps: expected a whole number, not 'many'"),
        (SFTConfig, ["--train.steps", "1", "2"], "--train.steps: takes one value, found 1 2"),
        (SFTConfig, ["--train.steps"], "--train.steps: needs a value (=VALUE where it begins with -)"),
        (SFTConfig, ["--train.betas", "0.9"], "--train.betas: expected 2 values, not 1"),
        (SFTConfig, ["--train.schedule", "cos"], "--train.schedule: expected one of cosine, linear, constant, not 'cos'"),
        (SFTConfig, ["--resume", "yes"], "--resume: takes no value, found yes"),
        (SFTConfig, ["--no-model", "x"], "sft has no option --no-model"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(config, flags, message):
    with pytest.raises(UserError) as refused:
        recipe.parse(config, [*RUN, *flags], prog=f"lowalign {'ppo' if config is PPOConfig else 'sft'}")
    assert str(refused.value).startswith(message) and "\n" not in str(refused.value)


def test_a_list_may_be_given_in_parts():
    for flags in (["--adapter", "a", "b"], ["--adapter", "a", "--adapter=b"]):
        assert recipe.parse(EvalConfig, ["--data", "f", *flags]).adapter == ("a", "b")
    assert recipe.parse(SFTConfig, [*RUN, "--data.files", "a"]).data.files == ("a",)
    config = recipe.parse(
        SFTConfig, [*RUN, "--data", "a", "--train.betas", "0.5", "0.6", "--train.seed=1", "--train.seed=2"]
    )
    assert (config.train.betas, config.train.seed) == ((0.5, 0.6), 2)  # of what is no list, the last holds


def test_values_that_begin_with_a_hyphen():
    config = recipe.parse(PPOConfig, [*RUN, "--rollout.eos-score", "-2"])
    assert config.rollout.eos_score == -2
    assert recipe.parse(GenerateConfig, ["--model", "m", "--prompt", "- a list"]).prompt == "- a list"
    assert recipe.parse(GenerateConfig, ["--model", "m", "--prompt=--x"]).prompt == "--x"


def test_arguments_without_a_flag_may_follow_one():
    assert recipe.parse(ChatConfig, ["--model", "m", "a", "b"]).adapters == ("a", "b")
    assert recipe.parse(ChatConfig, ["a", "--allow-base-mismatch", "b"]).adapters == ("a", "b")


def test_names_of_other_libraries_lead_to_options_that_there_are():
    keys = {key for verb in verbs() if verb.config for key, _ in options(verb.config)}
    assert set(ELSEWHERE.values()) <= keys


@pytest.mark.parametrize("verb", [verb for verb in verbs() if verb.config], ids=lambda verb: verb.name)
def test_help_has_types_that_a_person_reads(verb, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "110")
    assert cli.main([*verb.name.split(), "--help"]) == 0
    text = capsys.readouterr().out
    assert not re.search(r"\b(INT|FLOAT|STR|PATH)\b|\{None|\(default:\s*\)|\(default:\W+None\)", text)
    framed = {len(line) for line in text.splitlines() if line[:1] in "│ " and line.strip()}
    assert len(framed) == 1  # the right edge of the frame is straight


def test_an_option_has_one_spelling_in_all_verbs():
    """What every verb calls by the same last word is in the same section."""
    keys = {
        key for verb in verbs() if verb.config and verb.name not in ("push", "pull") for key, _ in options(verb.config)
    }
    for word in ("limit", "prompt_format", "on_error", "revision", "temperature", "max_new_tokens", "files"):
        spelled = {key for key in keys if key.rpartition(".")[2] == word}
        assert (
            spelled <= {f"data.{word}", f"sampling.{word}", f"base.{word}", "files"} and len(spelled - {"files"}) == 1
        )


@pytest.mark.parametrize(
    "words", [["fly"], ["data"], ["recipes", "list", "x"], ["sft", "--lr", "1"], ["sft", "a", "b"], []]
)
def test_the_last_line_is_the_message(words, capsys, monkeypatch):
    if not words:  # Ctrl-C where nothing handles it

        def work(config):
            raise KeyboardInterrupt

        words = ["sft", *RUN]
        monkeypatch.setitem(__import__("sys").modules, "lowalign.commands.sft", types.SimpleNamespace(sft=work))
    assert cli.main(words) in (1, 130)
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("lowalign: ")


def test_a_list_that_is_given_twice_is_the_last_one_and_said(tmp_path, capsys):
    config = recipe.parse(
        SFTConfig, ["--model", "m", "--out", "o", "--data", "a.jsonl", "--data", "b.jsonl", "c.jsonl"]
    )
    assert config.data.files == ("b.jsonl", "c.jsonl")
    assert (
        "--data is given twice: a.jsonl is left out. For both: --data a.jsonl b.jsonl c.jsonl"
        in capsys.readouterr().err
    )
