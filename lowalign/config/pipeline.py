"""A pipeline: stages that name each other's results, as YAML.

    verb: run
    stages:
      sft: {recipe: lora/sft, data: "{rows}"}
      dpo: {recipe: lora/dpo, data: "{pairs}", init: "{sft}"}
      merge: {verb: merge, adapters: "{dpo}"}

A stage has the keys of a recipe for its verb. {sft} is the folder of an earlier stage, {rows} a name given with --set.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import tyro
import yaml

from lowalign.config import recipe
from lowalign.config.commands import PipelineConfig
from lowalign.config.verbs import Verb, verbs
from lowalign.config.yaml_flags import Flag, at, compose, flags_in, suggest, verb_in
from lowalign.errors import UserError

NAME = re.compile(r"[A-Za-z][\w-]*")
PLACE = re.compile(r"\{([\w-]+)\}")
NO_STAGE = ("run", "chat", "report")
STAGES, RECIPE, VERB = "stages", "recipe", "verb"


@dataclass(frozen=True)
class Stage:
    """One step. config: of its verb. out: the folder of its results; None for a verb that has none (push)."""

    name: str
    verb: Verb
    config: Any
    out: Path | None


def read_pipeline(config: PipelineConfig) -> list[Stage]:
    """The stages in order. Raises UserError, with file and line, for whatever is wrong in any of them."""
    file = recipe.find(config.file)
    top = _mapping(compose(file), file, "a pipeline")
    known = (STAGES, "model", VERB)
    for key, _ in top.values():
        if key.value not in known:
            raise UserError(f"{at(file, key)}: there is no key {key.value}{suggest(key.value, known)}")
    if STAGES not in top:
        what = f"a recipe for {top[VERB][1].value}, not a pipeline" if VERB in top else "no pipeline"
        raise UserError(f"{file} is {what}: it has no key `stages`")
    model = config.model or (top["model"][1].value if "model" in top else None)
    names = _values(config)
    stages = []
    for name, (key, node) in _mapping(top[STAGES][1], file, "stages").items():
        if not NAME.fullmatch(name) or name in names:
            raise UserError(f"{at(file, key)}: {name} cannot be the name of a stage: it is taken, or is no single word")
        stages.append(_stage(name, node, file, replace(config, model=model), names))
        names[name] = str(config.out / name)
    if not stages:
        raise UserError(f"{file}: there is no stage")
    return stages


def _stage(name: str, node: yaml.Node, file: Path, config: PipelineConfig, names: Mapping[str, str]) -> Stage:
    keys = _mapping(node, file, f"stage {name}")
    _fill_in(node, file, names)
    recipe_file = recipe.find(keys[RECIPE][1].value) if RECIPE in keys else None
    named = verb_in(recipe_file) if recipe_file else None
    word = keys[VERB][1].value if VERB in keys else named[0] if named else name
    verb = next((v for v in verbs() if v.name == word and v.config and v.name not in NO_STAGE), None)
    if verb is None:
        where = at(file, keys[VERB][1]) if VERB in keys else at(file, node)
        raise UserError(f"{where}: stage {name} has no verb that is known; write `verb: sft` or `recipe: lora/sft`")
    if named and named[0] != verb.name:
        raise UserError(
            f"{at(file, keys[RECIPE][1])}: {keys[RECIPE][1].value} is a recipe for {named[0]}, not for {verb.name}"
        )
    node.value = [(key, value) for key, value in node.value if key.value not in (RECIPE, VERB)]
    given = {flag.key: flag for flag in flags_in(node, file, verb.config)}
    own = {f.name for f in fields(verb.config)}
    for key in ("out", "resume", "base"):
        if key in own and any(k == key or k.startswith(f"{key}.") for k in given):
            raise UserError(
                f"{at(file, node)}: stage {name}: {key} is set for all stages by the pipeline; leave it out"
            )
    line = node.start_mark.line + 1
    out = config.out / name if "out" in own else None
    shared = {"model": config.model, "out": str(out) if out else None}
    for key, value in shared.items():
        if key in own and value and key not in given:
            given[key] = Flag(key, line, [f"--{key}={value}"])
    entries = [_as_parsed(flag, verb.config) for flag in given.values()]
    parsed = recipe.parse_entries(verb.config, entries, file, recipe_file)
    if "base" in own:
        parsed = replace(parsed, base=config.base)
    return Stage(name, verb, parsed, out)


def _as_parsed(flag: Flag, config: type) -> Flag:
    """For an argument without a flag: its values alone. For a flag that is repeated: once before each value."""
    marks = getattr(get_type_hints(config, include_extras=True).get(flag.key), "__metadata__", ())
    first, *rest = flag.tokens
    if tyro.conf.Positional in marks:
        return flag._replace(tokens=rest or [first.partition("=")[2]])
    if tyro.conf.UseAppendAction in marks:
        return flag._replace(tokens=[token for value in rest for token in (first, value)])
    return flag


def _values(config: PipelineConfig) -> dict[str, str]:
    """Of --set."""
    values = {}
    for text in config.set:
        name, equals, value = text.partition("=")
        if not equals or not NAME.fullmatch(name):
            raise UserError(f"--set takes NAME=VALUE, found {text}")
        values[name] = value
    return values


def _fill_in(node: yaml.Node, file: Path, names: Mapping[str, str]) -> None:
    """Put the values of {NAME} into all texts. Raises UserError for a name that nothing stands for yet."""
    if isinstance(node, yaml.MappingNode):
        for _, value in node.value:
            _fill_in(value, file, names)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _fill_in(item, file, names)
    else:
        unknown = [name for name in PLACE.findall(node.value) if name not in names]
        if unknown:
            raise UserError(
                f"{at(file, node)}: {{{unknown[0]}}} is no earlier stage{suggest(unknown[0], names)}; give it with "
                f"--set {unknown[0]}=VALUE"
            )
        node.value = PLACE.sub(lambda match: names[match[1]], node.value)


def _mapping(node: yaml.Node | None, file: Path, what: str) -> dict[str, tuple[yaml.Node, yaml.Node]]:
    """The keys of a node with their values. Raises UserError for another node, and for a key that is there twice."""
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{at(file, node) if node else file}: {what} is made of lines `key: value`")
    keys: dict[str, tuple[yaml.Node, yaml.Node]] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.value in keys:
            raise UserError(f"{at(file, key)}: a key is one word, and stands once")
        keys[key.value] = (key, value)
    return keys
