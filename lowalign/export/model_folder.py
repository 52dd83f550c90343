"""The files beside merged weights: config, generation config, tokenizer, chat template."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lowalign.durable import write_json
from lowalign.model.base.hub import TOKENIZER_FILES

ALSO_COPIED = ("LICENSE*", "NOTICE*", "USE_POLICY*")


def write_model_files(base: Path, folder: Path, changes: dict[str, Any], template: str, eos_ids: Sequence[int]) -> None:
    """Copy the base's files and change what the merge changed.

    changes: keys of config.json. template: the chat template that the adapters were trained with. eos_ids: every token
    that ends an answer; plain transformers, vLLM and llama.cpp stop at those of generation_config.json.
    """
    for pattern in (*TOKENIZER_FILES, *ALSO_COPIED):
        for file in base.glob(pattern):
            if file.is_file() and file.suffix not in (".py", ".bin", ".pt"):
                shutil.copyfile(file, folder / file.name)
    config = json.loads((base / "config.json").read_text())
    for key in ("quantization_config", "torch_dtype", "_name_or_path"):
        config.pop(key, None)
    write_json(folder / "config.json", config | changes)
    generation = base / "generation_config.json"
    options = json.loads(generation.read_text()) if generation.exists() else {}
    ids = list(eos_ids)
    write_json(folder / "generation_config.json", options | {"eos_token_id": ids[0] if len(ids) == 1 else ids})
    _write_template(folder, template)


def _write_template(folder: Path, template: str) -> None:
    """In both places that loaders look in."""
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    options = folder / "tokenizer_config.json"
    if options.exists():
        write_json(options, json.loads(options.read_text()) | {"chat_template": template})
