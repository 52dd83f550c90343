"""The rooms of the package: every module is in one, imports run downward, and there is no circle."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import lowalign

PACKAGE = Path(lowalign.__file__).parent
# From the bottom up. A module may import from its own room and from those above it in this list.
ROOMS = (
    "errors",
    "processes",
    "log",
    "durable",
    "allocator",
    "config",
    "data.sources",
    "data.rows",
    "data.rendering",
    "data",
    "data.cleaning",
    "model.attention",
    "model.sampling",
    "model.forward",
    "model.base",
    "model.adapters",
    "model",
    "methods",
    "rewards",
    "train",
    "plan",
    "export",
    "report",
    "labelling",
    "hub",
    "commands",
    "demo",
    "cli",
    "__main__",
)
NO_TORCH = {"torch", "transformers", "peft", "bitsandbytes", "datasets", "accelerate", "safetensors"}


def modules() -> dict[str, Path]:
    """By dotted name below lowalign; a package is named by its folder."""
    files = PACKAGE.rglob("*.py")
    names = {".".join(file.relative_to(PACKAGE).with_suffix("").parts): file for file in files}
    return {name.removesuffix("__init__").rstrip("."): file for name, file in names.items()}


def room(module: str) -> str:
    """The longest entry of ROOMS that the module is, or is below."""
    fitting = [name for name in ROOMS if module == name or module.startswith(f"{name}.")]
    assert fitting, f"lowalign.{module} is in no room: give it one, or name the room in {__name__}.ROOMS"
    return max(fitting, key=len)


def imports(file: Path, known: set[str]) -> set[str]:
    """The modules of lowalign that a file imports, inside functions too; `from a import b` is a.b where that is a module."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}:{node.lineno}: write imports from the top: from lowalign…"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name.removeprefix("lowalign.") in known else node.module for name in inner}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name.removeprefix("lowalign.") for name in found if name.startswith("lowalign.")}


MODULES = modules()
IMPORTS = {name: imports(file, set(MODULES)) for name, file in MODULES.items() if name}


@pytest.mark.parametrize("module", IMPORTS)
def test_imports_run_downward(module):
    below = ROOMS[: ROOMS.index(room(module)) + 1]
    upward = sorted(name for name in IMPORTS[module] if room(name) not in below)
    assert not upward, f"lowalign.{module} imports from rooms above its own: {upward}"


def test_no_circles():
    try:
        tuple(TopologicalSorter(IMPORTS).static_order())
    except CycleError as circle:
        pytest.fail(f"modules that import each other: {' -> '.join(circle.args[1])}")


def test_every_room_says_its_rule():
    for name in ROOMS:
        folder = PACKAGE.joinpath(*name.split("."))
        if folder.is_dir():
            sentence = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""
            assert len(sentence.splitlines()) == 1 and sentence.endswith("."), f"{folder}/__init__.py: one sentence"


def test_options_import_no_torch():
    for module, file in MODULES.items():
        if room(module or "errors") in ("errors", "log", "durable", "allocator", "config", "cli", "__main__"):
            roots = {
                alias.name.split(".")[0]
                for node in ast.walk(ast.parse(file.read_text()))
                if isinstance(node, ast.Import)
                for alias in node.names
            }
            roots |= {
                node.module.split(".")[0]
                for node in ast.walk(ast.parse(file.read_text()))
                if isinstance(node, ast.ImportFrom)
            }
            assert not roots & NO_TORCH, f"{file} imports {sorted(roots & NO_TORCH)}"
