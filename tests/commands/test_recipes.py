"""The recipes that come with lowalign, the verbs that show them, and every command that the documentation gives."""

import re
import shlex
import sys
import types
from operator import attrgetter
from pathlib import Path

import pytest

from lowalign import cli
from lowalign.config import recipe
from lowalign.config.bitdelta import DistilConfig
from lowalign.config.commands import BestOfNConfig
from lowalign.config.training import DPOConfig, PPOConfig, RewardConfig, SFTConfig
from lowalign.config.verbs import verb_of, verbs
from lowalign.config.yaml_flags import options, read
from lowalign.errors import UserError

ROOT = Path(__file__).parents[2]
RECIPES = sorted(recipe.packaged().values())
METHODS = {"sft": SFTConfig, "reward": RewardConfig, "dpo": DPOConfig, "ppo": PPOConfig, "best_of_n": BestOfNConfig}
CONFIGS = METHODS | {"long": SFTConfig, "distil": DistilConfig}
FLAGS = {config: ["--model", "m", "--out", "o"] for config in METHODS.values()}
FLAGS[DistilConfig] = ["--model", "m", "--out", "o", "--delta", "d", "--finetuned", "f"]
OF_ONE_VERB = [path for path in RECIPES if path.parent.name != "pipelines"]
TEXTS = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md")), ROOT / "adapters/README.md", *RECIPES]
TEXTS += sorted(ROOT.glob("examples/*.sh"))


def name(path: Path) -> str:
    return path.relative_to(ROOT / "adapters").with_suffix("").as_posix()


def test_every_file_is_packaged():
    names = {f"{kind}/{stem}" for kind in ("lora", "prompt", "prefix") for stem in METHODS}
    names |= {"bitdelta/distil", "lora/long"}
    assert set(map(name, OF_ONE_VERB)) == names
    assert {n: p.resolve() for n, p in recipe.packaged().items()} == {name(p): p for p in RECIPES}


@pytest.mark.parametrize("path", OF_ONE_VERB, ids=name)
def test_a_recipe_has_only_what_differs_from_the_defaults(path):
    kind = CONFIGS[path.stem]
    config, default = recipe.parse(kind, FLAGS[kind], path), recipe.parse(kind, FLAGS[kind])
    keys = [flag.key for flag in read(path, kind)]
    assert [key for key in keys if attrgetter(key)(config) == attrgetter(key)(default)] == []
    assert len(path.read_text().splitlines()) <= 15
    training = config.sft if path.stem == "best_of_n" else config
    assert training.adapter.kind == path.parent.name
    with pytest.raises(UserError, match=r"^give --model M: .*\ngive --out DIR: .*"):
        recipe.parse(kind, [], path)


@pytest.mark.parametrize("path", OF_ONE_VERB, ids=name)
def test_a_recipe_begins_with_its_title_and_its_command(path):
    title, command, verb = path.read_text().splitlines()[:3]
    assert re.fullmatch(r"# \w.{20,}[.]", title)
    named = verb_of(CONFIGS[path.stem])
    assert command.removeprefix("#   ").startswith(f"lowalign {named} {name(path)} --model ")
    assert verb == f"verb: {named}"


@pytest.mark.parametrize("path", OF_ONE_VERB, ids=name)
def test_a_recipe_in_full_is_the_same_configuration(path, tmp_path, capsys):
    full, kind = tmp_path / "full.yaml", CONFIGS[path.stem]
    assert cli.main(["recipes", "copy", name(path), str(full), "--full"]) == 0
    text = full.read_text()
    assert text.startswith("\n".join(path.read_text().splitlines()[:2]))
    flags = FLAGS[kind]
    assert recipe.parse(kind, flags, full) == recipe.parse(kind, flags, path)
    written = {key for key, _ in options(kind)} - {flag.key for flag in read(full, kind)}
    assert all(f"{key.rpartition('.')[2]}: null" in text for key in written)  # the rest have no value
    capsys.readouterr()
    assert cli.main(["recipes", "show", name(path), "--full"]) == 0
    assert capsys.readouterr().out == text


def test_a_recipe_in_full_needs_a_verb(tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("model: m\n")
    assert cli.main(["recipes", "show", str(tmp_path / "mine.yaml"), "--full"]) == 1
    assert "mine.yaml: add the command that it is for, as a line `verb: sft`" in capsys.readouterr().err


def test_list_show_and_copy(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["recipes", "list"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == list(map(name, RECIPES))
    source = (ROOT / "adapters/lora/sft.yaml").read_text()
    (line,) = [line for line in listed if line.split()[0] == "lora/sft"]
    assert source.splitlines()[0].removeprefix("# ") in line

    assert cli.main(["recipes", "show", "lora/sft"]) == 0
    assert capsys.readouterr().out == source

    assert cli.main(["recipes", "copy", "lora/sft"]) == 0
    assert capsys.readouterr().out == "lora-sft.yaml\n"
    assert cli.main(["recipes", "copy", "lora/sft", "deep/mine.yaml"]) == 0
    assert cli.main(["recipes", "copy", "lora/sft", "deep"]) == 0
    copies = [Path("lora-sft.yaml"), Path("deep/mine.yaml"), Path("deep/lora-sft.yaml")]
    assert [copy.read_text() for copy in copies] == [source] * 3


def test_copy_never_overwrites(capsys, tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("mine")
    assert cli.main(["recipes", "copy", "lora/sft", str(mine)]) == 1
    assert f"{mine} exists and is not overwritten" in capsys.readouterr().err
    assert mine.read_text() == "mine"


def test_an_installed_package_has_its_recipes_inside(tmp_path, monkeypatch):
    """In site-packages the folder beside the package may be a stranger's: there is a PyPI project named adapters."""
    for folder in ("adapters/stranger", "lowalign/adapters/lora"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "sft.yaml").touch()
    monkeypatch.setattr(recipe, "__file__", str(tmp_path / "lowalign/config/recipe.py"))
    assert recipe.packaged() == {"lora/sft": tmp_path / "lowalign/adapters/lora/sft.yaml"}


def commands(path: Path) -> list[str]:
    """Commands of lowalign in a text: lines of code blocks and scripts, and the header of a recipe."""
    text = path.read_text().replace("\\\n", " ")
    if path.suffix == ".md":
        text = "\n".join(re.findall(r"^```(?:bash)?\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    return re.findall(r"^(?:#   )?(lowalign .*)$", text, re.MULTILINE)


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_command_in_the_documentation_is_understood(path, monkeypatch, tmp_path, capsys):
    """Up to the point where the work would begin."""
    monkeypatch.chdir(tmp_path)
    Path("runs/first").mkdir(parents=True)
    Path("runs/first/recipe.yaml").write_text(recipe.dump(SFTConfig("m", Path("o"))))  # as an earlier run leaves it
    work = types.SimpleNamespace()
    for module, _, function in (verb.function.partition(":") for verb in verbs()):
        if module != "commands.recipes":
            setattr(work, function, lambda *_: 0)
            monkeypatch.setitem(sys.modules, f"lowalign.{module}", work)
    for command in commands(path):
        words = shlex.split(command.replace("$resume", "--resume"), comments=True)[1:]
        assert cli.main(words) == 0, f"{command}\n{capsys.readouterr().err}"


def test_the_documentation_gives_commands():
    assert sum(len(commands(path)) for path in TEXTS) > 20
