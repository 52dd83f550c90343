"""The table of chat templates (benchmarks/templates.py) finds no silent loss, and would find one."""

from pathlib import Path

import pytest

from lowalign.data.rendering import renderer as rendering
from tests.data import made, traits

TEMPLATES = {name: value for name, value in vars(traits).items() if name.isupper() and "for m in messages" in value}
TEMPLATES |= {"LLAMA3": made.LLAMA3, "GEMMA": made.GEMMA, "QWEN3": made.QWEN3}


@pytest.fixture
def cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The columns of a template's line: equal, turns, other, dropped, silent."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    import templates

    def read(template: str) -> list[int]:
        path = tmp_path / "template.jinja"
        path.write_text(template)
        return [int(cell) for cell in templates.row(path, 40, None).split("|")[2:7]]

    return read


@pytest.mark.parametrize("name", TEMPLATES)
def test_nothing_is_lost_without_a_word(cells, name: str) -> None:
    *others, silent = cells(TEMPLATES[name])
    assert silent == 0 and sum(others) == 40


def test_a_silent_loss_would_be_seen(cells, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cells(made.CHATML_TOOLS)[-1] == 0
    monkeypatch.setattr(rendering, "lost_parts", lambda messages, examples: ([], []))
    assert cells(made.CHATML_TOOLS)[-1] > 0
