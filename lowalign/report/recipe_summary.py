"""What a stored recipe says beyond the defaults."""

from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from lowalign.config.verbs import verbs

NOT_SHOWN = ("verb", "out", "resume")  # they say nothing about the training


def changed_options(recipe: str | None) -> dict[str, Any]:
    """The options of a complete recipe that differ from their defaults, nested as in the recipe. {} for text that is none."""
    try:
        options = yaml.safe_load(recipe or "")
    except yaml.YAMLError:
        return {}
    return changed(options) if isinstance(options, dict) else {}


def changed(options: dict[str, Any]) -> dict[str, Any]:
    """As `changed_options`, of a recipe that is read already."""
    config = next((verb.config for verb in verbs() if verb.name == options.get("verb")), None)
    different = _changed(options, config) if config else options
    return {name: value for name, value in different.items() if name not in NOT_SHOWN}


def _changed(options: dict[str, Any], defaults: Any) -> dict[str, Any]:
    """defaults: a dataclass, or one of its objects."""
    changed = {}
    known = {field.name: _default(field, defaults) for field in fields(defaults)}
    for name, value in options.items():
        default = known.get(name, MISSING)
        if is_dataclass(default) and isinstance(value, dict):
            value, default = _changed(value, default), {}
        if value != _plain(default):
            changed[name] = value
    return changed


def _default(field: Any, defaults: Any) -> Any:
    if not isinstance(defaults, type):
        return getattr(defaults, field.name)
    return field.default_factory() if field.default_factory is not MISSING else field.default


def _plain(value: Any) -> Any:
    """As YAML gives it back."""
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
