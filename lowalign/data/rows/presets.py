"""Presets and templates: what the rows of a data set mean, as a YAML file. Those shipped are in adapters/presets and
adapters/templates.

about: the data set, with its Hub id
columns: {prompt: question, …}      columns under other names
row: {prompt: "{{…}}", …}           columns made with Jinja: texts, or any value where `{{…}}` is the whole text
rows: [{…}, {…}]                    several of these (paraphrases); one is chosen by a hash of the row
labels: {column: {value: words}}    words for the values of a column
skip: [{when: "{{…}}", why: …}]     rows to leave out, counted by `why`
trees: {…}                          rows that are messages of trees: lowalign.data.rows.trees
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from lowalign.config.recipe import data_presets
from lowalign.config.yaml_flags import compose, suggest
from lowalign.data.rows.expressions import Compiled, compiled
from lowalign.data.rows.turns import expected
from lowalign.data.sources.row import RowDropped, RowError
from lowalign.errors import UserError

KEYS = ("about", "columns", "row", "rows", "labels", "skip", "trees")


@dataclass(frozen=True)
class Preset:
    """One file. fingerprint: of its content, for the key of tokenized rows."""

    name: str
    about: str = ""
    columns: Mapping[str, str] = field(default_factory=dict)
    forms: list[Compiled] = field(default_factory=list)
    labels: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    skip: list[tuple[Compiled, str]] = field(default_factory=list)
    trees: Mapping[str, str] | None = None
    fingerprint: str = ""

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        """The row in the columns of a row format. Raises RowError, and RowDropped for a row that the preset leaves out."""
        for when, why in self.skip:
            if when(data | {"row": data}):
                raise RowDropped(why)
        in_words = data | {name: self._words(name, data[name]) for name in self.labels if name in data}
        if not (self.columns or self.forms):
            return in_words
        form = self.forms[_number(data, len(self.forms))](in_words | {"row": data}) if self.forms else {}
        return named_columns(in_words, self.columns, f"{self.name}: columns") | form

    def _words(self, name: str, value: Any) -> str:
        words = self.labels[name]
        key = json.dumps(value) if isinstance(value, bool) else str(value)
        if key not in words:
            raise RowError(f"{self.name}: no words for {name} {value!r}; `labels` has {', '.join(words)}")
        return words[key]


def named_columns(data: Mapping[str, Any], columns: Mapping[str, str], what: str) -> dict[str, Any]:
    """The columns {new: old} by their new names. what: the flag or the key, for messages. Raises RowError for one that is not
    there."""
    for old in columns.values():
        if old not in data:
            raise RowError(f"{what}: {expected(old, data)}")
    return {new: data[old] for new, old in columns.items()}


@cache
def load_preset(name: str) -> Preset:
    """A preset by its name, or from a YAML file. Raises UserError for what is none."""
    path = preset_file(name)
    node = compose(path)
    content = {} if node is None else yaml.SafeLoader("").construct_document(node)
    return _preset(name, content, path)


def preset_file(name: str) -> Path:
    """The file of a preset by its name, or a YAML file. Raises UserError for a name that is none."""
    path = Path(name).expanduser()
    if path.suffix in (".yaml", ".yml"):
        return path
    known = data_presets()
    if name not in known:
        raise UserError(f"there is no preset {name}{suggest(name, known)} (`lowalign data presets` names them)")
    return known[name]


def _preset(name: str, content: Any, path: Path) -> Preset:
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path}: a preset is made of keys ({', '.join(KEYS)})")
    if unknown := [str(key) for key in content if key not in KEYS]:
        raise UserError(f"{path}: there is no key {unknown[0]}{suggest(unknown[0], KEYS)}; keys are {', '.join(KEYS)}")
    if "row" in content and "rows" in content:
        raise UserError(f"{path}: give one `row`, or several in `rows`")
    rows = content.get("rows", [content["row"]] if "row" in content else [])
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: `row` is made of keys, and `rows` is a list of such")
    labels = content.get("labels", {})
    if not isinstance(labels, dict) or not all(isinstance(words, dict) for words in labels.values()):
        raise UserError(f"{path}: write `labels` as {{column: {{value: words}}}}")
    skip = content.get("skip", [])
    if not isinstance(skip, list) or not all(isinstance(rule, dict) and {"when", "why"} == set(rule) for rule in skip):
        raise UserError(f"{path}: `skip` is a list of {{when: …, why: …}}")
    return Preset(
        name,
        str(content.get("about", "")).strip(),
        _strings(content.get("columns", {}), path, "columns"),
        [compiled(row, f"{name}: row") for row in rows],
        {column: {_key(value): str(word) for value, word in words.items()} for column, words in labels.items()},
        [(compiled(rule["when"], f"{name}: skip"), str(rule["why"])) for rule in skip],
        _strings(content["trees"], path, "trees") if "trees" in content else None,
        hashlib.sha256(path.read_bytes()).hexdigest(),
    )


def _key(value: Any) -> str:
    return json.dumps(value) if isinstance(value, bool) else str(value)


def _strings(value: Any, path: Path, key: str) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(item, str) for pair in value.items() for item in pair):
        raise UserError(f"{path}: write `{key}` as lines of NAME: NAME")
    return value


def _number(data: dict[str, Any], count: int) -> int:
    """Which of `count` forms a row gets: by its content, so that order and other rows do not matter."""
    if count == 1:
        return 0
    content = json.dumps(data, sort_keys=True, default=str).encode()
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big") % count
