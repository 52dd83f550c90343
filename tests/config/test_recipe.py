"""A recipe is flags written down: what it says, what it refuses, and that it survives being written and read."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from lowalign.config import recipe
from lowalign.config.renamed import RENAMED
from lowalign.config.sections import AdapterConfig, BaseConfig, DataConfig, TrainConfig
from lowalign.config.training import DPOConfig, PPOConfig, SFTConfig
from lowalign.config.yaml_flags import options
from lowalign.errors import UserError

LARGE_BUT_VALID = "model: m\nout: o\n" + "# padding\n" * 12_000


def parse(tmp_path: Path, text: str, *flags: str) -> SFTConfig:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    return recipe.parse(SFTConfig, flags, path)


def refusal(tmp_path: Path, text: str | bytes, *flags: str) -> str:
    """The message, with the file's folder taken off."""
    path = tmp_path / "r.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as refused:
        recipe.parse(SFTConfig, flags, path)
    return str(refused.value).replace(f"{tmp_path}/", "")


def test_every_kind_of_value(tmp_path):
    config = parse(
        tmp_path,
        """
        model: org/base
        out: 2026-11-21          # YAML's own reading would be a date
        data:
          files: [a.jsonl, "b c.jsonl"]
          eval: held.jsonl       # one file may stand without brackets
          cache: no
          limit:
        adapter:
          rslora: on
          targets: []
          init_text: "- two\\nlines: é"
        train:
          learning-rate: 2e-4    # YAML's own reading would be a string
          betas: [0.8, 0.95]
          checkpointing: off     # YAML's own reading would be false
        base:
        """,
    )
    assert config == SFTConfig(
        model="org/base",
        out=Path("2026-11-21"),
        data=DataConfig(files=("a.jsonl", "b c.jsonl"), eval=("held.jsonl",), cache=False),
        adapter=AdapterConfig(rslora=True, targets=(), init_text="- two\nlines: é"),
        train=TrainConfig(learning_rate=0.0002, betas=(0.8, 0.95), checkpointing="off"),
    )


@pytest.mark.parametrize("written", ["data: a.jsonl", "data: [a.jsonl]", "data: {files: a.jsonl}"])
def test_data_as_value_list_or_section(tmp_path, written):
    assert parse(tmp_path, f"model: m\nout: o\n{written}").data.files == ("a.jsonl",)


def test_flags_overrule_the_recipe(tmp_path):
    text = "model: m\nout: o\ndata: [a, b]\nadapter: {dora: true}\ntrain: {seed: 1, steps: 5}"
    config = parse(tmp_path, text, "--data", "c", "--adapter.no-dora", "--train.seed", "2")
    assert (config.data.files, config.adapter.dora, config.train.seed, config.train.steps) == (("c",), False, 2, 5)
    mended = parse(tmp_path, "model: m\nout: o\ntrain: {steps: many}", "--train.steps", "3")
    assert mended.train.steps == 3  # also when what the recipe says could not be used


@pytest.mark.parametrize(
    "text, message",
    [
        ("model: m\ntrain:\n  learning_rat: 1", "r.yaml:3: there is no key train.learning_rat; did you mean train.learning_rate?"),
        ("learning_rate: 1", "r.yaml:1: there is no key learning_rate; did you mean train.learning_rate?"),
        ("modle: m", "r.yaml:1: there is no key modle; did you mean model?"),
        ("class_path: evil.Evil", "r.yaml:1: there is no key class_path"),
        ("model: {name: m}", "r.yaml:1: there is no key model.name; did you mean model?"),
        ("train: 3", "r.yaml:1: train is a section: write its keys below it, one per line"),
        ("model: m\nout: o\nmodel: n", "r.yaml:3: model is set twice (first in line 1)"),
        ("{model: m, model: n}", "r.yaml:1: model is set twice (first in line 1)"),
        ("train:\n  betas: [0.9, -0.1]", "r.yaml:2: train.betas: an item may not begin with '-': -0.1"),
        ("data: [a, --model, evil]", "r.yaml:1: data.files: an item may not begin with '-': --model"),
        ("data: [a, null]", "r.yaml:1: data.files is a list of plain values"),
        ("data: [a, [b]]", "r.yaml:1: data.files is a list of plain values"),
        ("train:\n  seed: [1, 2]", "r.yaml:2: train.seed takes one value, not a list"),
        ("adapter:\n  dora: 1", "r.yaml:2: adapter.dora: expected true or false, not '1'"),
        ("train:\n  steps: many", "r.yaml:2: train.steps: expected a whole number, not 'many'"),
        ("train:\n  epochs: two", "r.yaml:2: train.epochs: expected a number, not 'two'"),
        ("train:\n  betas: [0.9]", "r.yaml:2: train.betas: expected 2 values, not 1"),
        ("train:\n  betas: [0.9, x]", "r.yaml:2: train.betas: expected a number, not 'x'"),
        ("adapter:\n  kind: loar", "r.yaml:2: adapter.kind: expected one of lora, prompt, prefix, not 'loar'"),
        ("vreb: sft", "r.yaml:1: there is no key vreb; did you mean verb?"),
        ("verb: [sft]", "r.yaml:1: verb takes the name of one command, such as sft"),
        ("model: m\nverb: dpo", "r.yaml:2: this is a recipe for dpo, not for sft: lowalign dpo r.yaml"),
        ("- model", "r.yaml:1: a recipe is made of lines `key: value`"),
        ("? [a]\n: b", "r.yaml:1: a key is one word"),
        ("model: 'm", "r.yaml:1: not valid YAML: found unexpected end of stream"),
        ("model: m\n---\nmodel: n", "r.yaml:2: not valid YAML: but found another document"),
        (b"model: \xff", "r.yaml: not UTF-8 text, so not a recipe"),
    ],
)  # fmt: skip
def test_what_is_refused_and_where(tmp_path, text, message):
    assert refusal(tmp_path, text) == message


def test_a_bad_flag_is_named_as_a_flag(tmp_path):
    text = "model: m\nout: o\ntrain:\n  steps: many\n"
    for flag in (["--train.steps", "few"], ["--train.steps=few"]):
        assert refusal(tmp_path, text, *flag) == "--train.steps: expected a whole number, not 'few'"
    assert refusal(tmp_path, "model: m\ndata: a", "stray.jsonl") == "lowalign: options begin with --, found stray.jsonl"
    assert refusal(tmp_path, "model: m") == "give --out DIR: folder of the run"


@pytest.mark.parametrize(
    "text, flags, message",
    [
        ("dpo:\n  beta: -1", [], "r.yaml:4: dpo.beta is -1.0; it must be above 0"),
        ("dpo:\n  beta: 1", ["--dpo.beta", "-1"], "--dpo.beta is -1.0; it must be above 0"),
        ("dpo: {beta: 1}", ["--adapter.dropout", "0.1"], "--adapter.dropout is 0.1: with dropout the policy is not"),
        (
            "dpo:\n  loss: ipo\n  robust: yes",
            [],
            "r.yaml:5: --dpo.label-smoothing and dpo.robust belong to dpo.loss sigmoid, not ipo",
        ),
        ("data:\n\n  gap: -1", [], "r.yaml:5: data.gap is -1.0; it must be at least 0"),
    ],
)
def test_a_value_that_a_check_refuses_names_its_line(tmp_path, text, flags, message):
    path = tmp_path / "r.yaml"
    path.write_text(f"model: m\nout: o\n{text}")
    with pytest.raises(UserError) as refused:
        recipe.parse(DPOConfig, flags, path)
    assert str(refused.value).replace(f"{tmp_path}/", "").startswith(message)


def test_a_section_that_checks_itself_names_its_line_too(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("model: m\nout: o\nsampling:\n  top_k: -1")
    with pytest.raises(UserError, match=r"r.yaml:4: sampling.top_k is -1; it must be at least 0"):
        recipe.parse(PPOConfig, [], path)


def test_old_keys_work_with_a_notice(tmp_path, capsys):
    path = tmp_path / "r.yaml"
    path.write_text("model: m\nout: o\nppo:\n  lam: 0.5\n  stop_at_kl: 0.1\nrollout: {show: 7}")
    config = recipe.parse(PPOConfig, ["--ppo.target-kl", "0.3"], path)
    assert (config.ppo.gae_lambda, config.ppo.target_kl, config.rollout.log_samples) == (0.5, 0.3, 7)
    notices = capsys.readouterr().err.splitlines()
    assert notices[0] == f"{path}:4: ppo.lam is now ppo.gae_lambda; the old name will stop working in the next release"
    assert len(notices) == 3
    path.write_text("ppo:\n  lam: 0.5\n  gae_lambda: 0.5")
    with pytest.raises(UserError, match=r"r.yaml:3: ppo.gae_lambda is set twice \(first in line 2\)"):
        recipe.parse(PPOConfig, [], path)


def test_renamed_options_lead_to_options():
    keys = dict(options(PPOConfig))
    assert set(RENAMED.values()) <= set(keys)
    assert not set(RENAMED) & set(keys)


def test_a_value_cannot_become_a_flag(tmp_path):
    config = parse(tmp_path, "model: --resume\nout: o\ninit: '--train.seed=7'")
    assert (config.model, config.init, config.resume, config.train.seed) == ("--resume", "--train.seed=7", False, 0)


EVIL = [
    "model: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path [PWNED]]",
    "model: !!python/name:evil.Evil",
    "model: !!python/module:evil",
    "model: !evil x",
    "model: !!str x",
    "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nmodel: *c",
    "train: &t {seed: 1}\nadapter:\n  <<: *t",
]


@pytest.mark.parametrize("text", EVIL)
def test_tags_and_aliases_are_refused_and_nothing_runs(tmp_path, monkeypatch, text):
    (tmp_path / "evil.py").write_text("open('PWNED', 'w').close()\nclass Evil: pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    message = refusal(tmp_path, text)
    assert "is not allowed in a recipe" in message or "there is no key a" in message
    assert "evil" not in sys.modules
    assert not (tmp_path / "PWNED").exists()


def test_large_deep_and_missing_files(tmp_path):
    assert refusal(tmp_path, LARGE_BUT_VALID) == "r.yaml: larger than 100,000 bytes, so not a recipe"
    assert refusal(tmp_path, "model: " + "[" * 50_000) == "r.yaml: nested too deeply for a recipe"
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        recipe.parse(SFTConfig, [], tmp_path)


AWKWARD = [
    "null",
    "true",
    "1e3",
    "0x10",
    "",
    " x ",
    "a: b # c",
    "[a]",
    "'\"",
    "é\u2028\x07\n\n  y",
    "*a",
    "!b",
    "2026-11-21",
    "-x",
]


@pytest.mark.parametrize("value", AWKWARD)
def test_written_and_read_again_is_equal(tmp_path, value):
    listed = () if value.startswith("-") else (value, value)
    config = SFTConfig(
        model=value,
        out=Path("runs") / "a b",
        data=DataConfig(files=listed, eval_rows=3, template=Path("t.jinja"), cache=False),
        adapter=AdapterConfig(kind="prefix", targets=listed, dora=True, init_text=value),
        train=TrainConfig(steps=7, learning_rate=1e-05, betas=(0.1, 1e-7), checkpointing="off"),
        base=BaseConfig(revision=value),
        resume=True,
    )
    assert parse(tmp_path, recipe.dump(config)) == config
    with pytest.raises(UserError, match="this is a recipe for sft, not for dpo"):
        recipe.parse(DPOConfig, [], tmp_path / "r.yaml")


def test_a_written_recipe_explains_every_key():
    text = recipe.dump(SFTConfig(model="m", out=Path("o")))
    lines = text.splitlines()
    assert "rank, usually 8 to 64. A higher rank has more capacity and takes more memory.\n  r: 16\n" in text
    assert "\n# The training loop.\ntrain:\n" in text
    keys = [i for i, line in enumerate(lines) if line.strip() and not line.strip().startswith("#")]
    assert all(lines[i - 1].strip().startswith("# ") for i in keys)


def test_diff_names_what_may_not_change_on_resume():
    old = SFTConfig(model="m", out=Path("o"))
    may = replace(
        old,
        out=Path("moved"),
        resume=True,
        train=replace(old.train, steps=9, save_every=1, log_every=2, eval_every=3, keep=4, track="tensorboard", token_budget=5),
    )  # fmt: skip
    assert recipe.diff(old, may) == []
    may_not = replace(may, data=DataConfig(files=("a",)), train=replace(may.train, learning_rate=1e-3))
    assert recipe.diff(old, may_not) == ["data.files: [] -> [a]", "train.learning_rate: 0.0002 -> 0.001"]
