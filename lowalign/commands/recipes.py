"""The recipes that come with lowalign: list them, copy one."""

import shutil
from pathlib import Path

from lowalign.config import recipe
from lowalign.errors import UserError


def table() -> str:
    """One line a recipe: its name and the first line of its header comment."""
    packaged = recipe.packaged()
    width = max(map(len, packaged))
    return "\n".join(f"{name:{width}}  {_title(path)}" for name, path in packaged.items())


def copy(name: str, dest: Path | None = None) -> Path:
    """Copy a recipe to a file or into a folder (by default lora/sft to ./lora-sft.yaml); never over another file."""
    source = recipe.find(name)
    dest = Path() if dest is None else dest
    if dest.is_dir():
        dest = dest / f"{source.parent.name}-{source.name}"
    if dest.exists():
        raise UserError(f"{dest} exists and is not overwritten; name another file: lowalign recipes copy {name} FILE")
    dest.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, dest)
    return dest


def _title(path: Path) -> str:
    with path.open() as file:
        return file.readline().removeprefix("#").strip()
