"""The recipes that come with lowalign, the verbs that show them, and every command that the documentation gives."""

import re
import shlex
import sys
import types
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from lowalign import cli
from lowalign.config import recipe
from lowalign.config.commands import BestOfNConfig
from lowalign.config.training import DPOConfig, PPOConfig, RewardConfig, SFTConfig

ROOT = Path(__file__).parents[2]
RECIPES = sorted(ROOT.glob("adapters/**/*.yaml"))
CONFIGS = {"sft": SFTConfig, "reward": RewardConfig, "dpo": DPOConfig, "ppo": PPOConfig, "best_of_n": BestOfNConfig}
TEXTS = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md")), ROOT / "adapters/README.md", *RECIPES]
TEXTS += sorted(ROOT.glob("examples/*.sh"))


def name(path: Path) -> str:
    return path.relative_to(ROOT / "adapters").with_suffix("").as_posix()


def keys(tree: dict, prefix: str = "") -> set[str]:
    """Dotted names of the leaves."""
    return {
        leaf
        for key, value in tree.items()
        for leaf in (keys(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key})
    }


def test_every_file_is_packaged():
    assert set(map(name, RECIPES)) == {f"{kind}/{stem}" for kind in ("lora", "prompt", "prefix") for stem in CONFIGS}
    assert {n: p.resolve() for n, p in recipe.packaged().items()} == {name(p): p for p in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_a_recipe_has_every_key_and_parses(path):
    written = yaml.safe_load(path.read_text())
    kind = CONFIGS[path.stem]
    assert keys(written) == keys(asdict(kind("m", Path("o"))))
    config = recipe.parse(kind, [], path)
    assert config.out == Path("runs") / f"{path.parent.name}-{path.stem}"
    training = config.sft if path.stem == "best_of_n" else config
    assert training.adapter.kind == path.parent.name
    learning = written["sft"] if training is not config else written
    assert training.train.learning_rate == float(learning["train"]["learning_rate"])
    if training is config:
        assert config.data.eval_rows == 0  # so that it runs on a handful of rows too


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_a_recipe_begins_with_its_title_and_its_command(path, monkeypatch):
    title, _, command = path.read_text().splitlines()[:3]
    assert re.fullmatch(r"# \w.{20,}[.]", title)
    assert command.removeprefix("#   ").startswith(f"lowalign {path.stem.replace('_', '-')} {name(path)} --model ")


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
    methods = ("sft", "reward", "dpo", "ppo", "best_of_n")
    for called in (*methods, "score", "judge", "generate", "main", "check", "doctor"):
        setattr(work, called, lambda *_: 0)
    modules = (*methods, "score", "judge", "generate", "data_check", "doctor")
    for module in (*(f"commands.{name}" for name in modules), "demo.run"):
        monkeypatch.setitem(sys.modules, f"lowalign.{module}", work)
    for command in commands(path):
        words = shlex.split(command.replace("$resume", "--resume"), comments=True)[1:]
        assert cli.main(words) == 0, f"{command}\n{capsys.readouterr().err}"


def test_the_documentation_gives_commands():
    assert sum(len(commands(path)) for path in TEXTS) > 20
