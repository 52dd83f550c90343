"""`lowalign recipes`: the recipes that come with lowalign."""

from pathlib import Path

from lowalign.config import recipe
from lowalign.config.commands import CopyRecipeConfig, ShowRecipeConfig
from lowalign.errors import UserError


def list_recipes() -> None:
    """Print a line for each recipe: its name and the first line of its header comment."""
    packaged = recipe.packaged()
    width = max(map(len, packaged))
    print("\n".join(f"{name:{width}}  {_title(path)}" for name, path in packaged.items()))


def show(config: ShowRecipeConfig) -> None:
    """Print a recipe."""
    print(_text(config), end="")


def copy(config: CopyRecipeConfig) -> None:
    """Copy a recipe to a file or into a folder, and print the path. Raises UserError when that file exists."""
    source, dest = recipe.find(config.name), config.dest
    if dest.is_dir():
        dest = dest / f"{source.parent.name}-{source.name}"
    if dest.exists():
        raise UserError(f"{dest} exists and is not overwritten; name another: lowalign recipes copy {config.name} FILE")
    text = _text(config)
    dest.parent.mkdir(parents=True, exist_ok=True)
    dest.write_text(text)
    print(dest)


def _text(config: ShowRecipeConfig) -> str:
    path = recipe.find(config.name)
    return recipe.complete(path) if config.full else path.read_text()


def _title(path: Path) -> str:
    with path.open() as file:
        return file.readline().removeprefix("#").strip()
