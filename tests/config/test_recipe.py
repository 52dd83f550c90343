"""A recipe is flags written down: what it says, what it refuses, and that it survives being written and read."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from lowalign.config import recipe
from lowalign.config.sections import AdapterConfig, BaseConfig, DataConfig, TrainConfig
from lowalign.config.training import SFTConfig
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
        ("train: 3", "r.yaml:1: train is a section; its keys stand below it, one a line"),
        ("model: m\nout: o\nmodel: n", "r.yaml:3: model stands here again (it stands in line 1 already)"),
        ("{model: m, model: n}", "r.yaml:1: model stands here again (it stands in line 1 already)"),
        ("train:\n  betas: [0.9, -0.1]", "r.yaml:2: train.betas: an item may not begin with '-': -0.1"),
        ("data: [a, --model, evil]", "r.yaml:1: data.files: an item may not begin with '-': --model"),
        ("data: [a, null]", "r.yaml:1: data.files is a list of plain values"),
        ("data: [a, [b]]", "r.yaml:1: data.files is a list of plain values"),
        ("train:\n  seed: [1, 2]", "r.yaml:2: train.seed takes one value, not a list"),
        ("adapter:\n  dora: 1", "r.yaml:2: adapter.dora is true or false, not 1"),
        ("- model", "r.yaml:1: a recipe is made of lines `key: value`"),
        ("? [a]\n: b", "r.yaml:1: a key is one word"),
        ("model: 'm", "r.yaml:1: not valid YAML: found unexpected end of stream"),
        ("model: m\n---\nmodel: n", "r.yaml:2: not valid YAML: but found another document"),
        (b"model: \xff", "r.yaml: not UTF-8 text, so not a recipe"),
    ],
)  # fmt: skip
def test_what_is_refused_and_where(tmp_path, text, message):
    assert refusal(tmp_path, text) == message


def test_a_bad_value_names_its_line_and_a_bad_flag_does_not(tmp_path):
    text = "model: m\nout: o\ntrain:\n  steps: many\n"
    assert refusal(tmp_path, text).startswith("r.yaml:4: the options cannot be used\n")
    assert refusal(tmp_path, text, "--train.steps", "few").startswith("the options cannot be used\n")
    assert refusal(tmp_path, text, "--train.steps=few").startswith("the options cannot be used\n")
    assert "--adapter.kind" in refusal(tmp_path, "model: m\nout: o\nadapter:\n  kind: loar")
    assert refusal(tmp_path, "model: m\ndata: a", "stray.jsonl") == "lowalign: options begin with --, found stray.jsonl"


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


def test_a_written_recipe_explains_every_key():
    text = recipe.dump(SFTConfig(model="m", out=Path("o")))
    lines = text.splitlines()
    assert "  # lora: rank.\n  r: 16\n" in text
    assert "\n# The loop.\ntrain:\n" in text
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
