"""Columns by name or by Jinja: what the row becomes, and what is said of templates that fail, loop or reach out."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from lowalign.config.sections import DataConfig, PreferenceConfig
from lowalign.data.chat import Chat
from lowalign.data.dataset import read_examples
from lowalign.data.prompts import read_prompts
from lowalign.data.rows.expressions import compiled
from lowalign.data.rows.mapping import Mapping
from lowalign.data.rows.time_limit import TookTooLong, time_limit
from lowalign.errors import UserError
from tests.data import made

ROW = {"question": "Q", "answer": "A", "topic": {"name": "x"}, "label": False}


def write(folder: Path, *rows: dict[str, Any]) -> str:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "rows.jsonl")


def mapped(folder: Path, config: DataConfig, row: dict[str, Any] = ROW) -> Any:
    (only,) = Mapping(config).rows(write(folder, row))
    return only


def test_columns_by_name_leave_the_others_out(tmp_path: Path) -> None:
    """`label: false` would make it a bad answer, if it were still there."""
    config = DataConfig(columns=("prompt=question,completion=answer",), cache=False)
    assert mapped(tmp_path, config).data == {"prompt": "Q", "completion": "A"}
    assert mapped(tmp_path, DataConfig(columns=("prompt=question", "completion=answer"))).data == {
        "prompt": "Q",
        "completion": "A",
    }
    assert not read_examples([write(tmp_path, ROW)], Chat(made.chatml()), config).bad


def test_columns_by_jinja(tmp_path: Path) -> None:
    config = DataConfig(prompt="{{topic.name}}: {{question}}", completion="{{ answer }}", system="S")
    assert mapped(tmp_path, config).data == {"prompt": "x: Q", "completion": "A", "system": "S"}
    config = PreferenceConfig(columns=("prompt=question",), chosen="{{answer}}", rejected="not {{answer}}")
    assert mapped(tmp_path, config).data == {"prompt": "Q", "chosen": "A", "rejected": "not A"}


def test_prompts_keep_the_columns_of_their_rows(tmp_path: Path) -> None:
    """So that a reward function can name them."""
    (row,) = read_prompts([write(tmp_path, ROW)], None, DataConfig(columns=("prompt=question",)))
    assert row.prompt == "Q" and row.columns["answer"] == "A" and row.columns["topic"] == {"name": "x"}


def test_a_value_stays_what_it_is() -> None:
    assert compiled("{{ a }}", "x")({"a": [1, None]}) == [1, None]
    assert compiled("{{ a }} ", "x")({"a": 1}) == compiled("{{- a -}}", "x")({"a": 1}) == 1
    assert compiled("{{ {'k': {'l': a}} }}", "x")({"a": 1}) == {"k": {"l": 1}}
    assert compiled("{{ '{{' ~ a ~ '}}' }}", "x")({"a": 1}) == "{{1}}"
    assert compiled("{% raw %}{{ a }}{% endraw %}", "x")({}) == "{{ a }}"
    assert compiled("{{ a }}{{ a }}", "x")({"a": 1}) == "11"
    assert compiled({"k": ["{{ a }}", "b", 2]}, "x")({"a": 1}) == {"k": [1, "b", 2]}


BAD = {
    "{{ qestion }}": '--data.prompt: expected "qestion", found "question"; did you mean "qestion"?',
    "{{ [question, qestion] }}": '--data.prompt: expected "qestion", found "question"; did you mean "qestion"?',
    "{{ {'role': {'x': topic.nme}} }}": "--data.prompt: 'dict object' has no attribute 'nme'",
    "{{ '[NaN]' | fromjson }}": "--data.prompt: the template fails on this row: NaN is not JSON",
    "{{ topic.nme }}": "--data.prompt: 'dict object' has no attribute 'nme'",
    "{{ 1 / 0 }}": "--data.prompt: the template fails on this row: division by zero",
    "{{ question.__class__ }}": "access to attribute '__class__' of 'str' object is unsafe",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}": "access to attribute '__class__' of 'str' object is unsafe",
    "{{ 'a' * 10**12 }}": "a repetition of",
    "{{ 10**12 * 'a' }}": "a repetition of",
    "{{ [1, 2] * 10**12 }}": "a repetition of",
    "{{ 9 ** 99999 }}": "a power of too large numbers",
    "{% include 'x' %}": "no loader for this environment specified",
}


@pytest.mark.parametrize("template", BAD)
def test_templates_that_fail(tmp_path: Path, template: str) -> None:
    bad = mapped(tmp_path, DataConfig(prompt=template, completion="c"))
    assert bad.where.endswith("rows.jsonl:1") and BAD[template] in bad.message


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for k in range(99999) %}{% endfor %}{% endfor %}",
        "{{ range(99999) | map('string') | map('replace', '9', '99') | map('length') | sum + (range(99999) | list | length) }}"
        "{% for i in range(99999) %}{% set x = range(99999) | sum %}{% endfor %}",
    ],
)
def test_templates_that_loop_for_ever(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowalign.data.rows.expressions.time_limit", lambda: time_limit(0.2))
    started = time.monotonic()
    with pytest.raises(
        TookTooLong, match=r"--data.prompt: the template does not end: it ran for more than 0.2 seconds"
    ):
        compiled(template, "--data.prompt")({})
    assert time.monotonic() - started < 5


def test_a_time_limit_leaves_nothing_behind() -> None:
    with pytest.raises(TookTooLong), time_limit(0.05):
        while True:
            pass
    for _ in range(200):
        with time_limit(0.05):
            time.sleep(0.001)
    time.sleep(0.3)


OPTIONS = {
    "columns": (("prompt",), "--data.columns prompt: write NEW=OLD"),
    "prompt": ("{{ a", "--data.prompt: not a Jinja template"),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options_that_are_wrong(option: str) -> None:
    value, message = OPTIONS[option]
    with pytest.raises(UserError, match=message):
        Mapping(DataConfig(**{option: value}))


def test_a_column_that_is_not_there(tmp_path: Path) -> None:
    bad = mapped(tmp_path, DataConfig(columns=("prompt=qestion",)))
    assert bad.message == '--data.columns: expected "qestion", found "question"; did you mean "qestion"?'


def test_a_changed_preset_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The key of tokenized rows has the preset's content in it."""
    from lowalign.data.rows.presets import load_preset

    monkeypatch.setenv("LOWALIGN_CACHE", str(tmp_path / "cache"))
    tokenizer, file, lengths = made.chatml(), tmp_path / "own.yaml", []
    for words in ("{{ answer }}", "{{ answer }} and more"):
        file.write_text(f'row: {{prompt: "{{{{ question }}}}", completion: "{words}"}}')
        load_preset.cache_clear()
        data = read_examples([write(tmp_path, ROW)], Chat(tokenizer), DataConfig(preset=(str(file),)))
        lengths.append(data.examples[0].length)
    assert lengths[0] < lengths[1]
