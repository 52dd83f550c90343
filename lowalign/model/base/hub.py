"""Folder or Hub id -> local folder, downloaded if needed."""

import json
from pathlib import Path

from huggingface_hub import snapshot_download
from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

from lowalign.errors import UserError
from lowalign.model.base.hub_errors import HUB_ERRORS, explain

TOKENIZER_FILES = [
    *("config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json"),
    *("vocab*", "merges.txt", "*.model", "*.jinja"),
]
BASE_FILES = ["*.safetensors", "*.safetensors.index.json", "generation_config.json", *TOKENIZER_FILES]
UNSAFE_SUFFIXES = (
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".pkl",
    ".pickle",
    ".joblib",
    ".npy",
    ".npz",
    ".h5",
    ".msgpack",
    ".py",
    ".so",
)
# Never downloaded: they can hold code. The patterns of fnmatch know no other way to ignore case.
UNSAFE_FILES = [f"*.{''.join(f'[{c}{c.upper()}]' for c in suffix[1:])}" for suffix in UNSAFE_SUFFIXES]


def resolve(path_or_hub_id: str, revision: str | None, patterns: list[str]) -> tuple[Path, str | None]:
    """-> the local folder, and the Hub commit (None for a folder of the user).

    patterns: of the files to download; those that can hold code never are. Raises UserError when there is neither a folder
    nor a Hub repository of that name.
    """
    folder = Path(path_or_hub_id).expanduser()
    if folder.is_dir():
        return folder, None
    if folder.exists() or path_or_hub_id.startswith((".", "/", "~")) or path_or_hub_id.count("/") > 1:
        raise UserError(f"{path_or_hub_id} is not a folder")
    try:
        snapshot = snapshot_download(
            path_or_hub_id, revision=revision, allow_patterns=patterns, ignore_patterns=UNSAFE_FILES
        )
    except HUB_ERRORS as error:
        reason = explain(error, revision)
        raise UserError(f'"{path_or_hub_id}" is neither a folder here nor reachable on the Hub: {reason}') from error
    return Path(snapshot), Path(snapshot).name


def load_tokenizer(path_or_hub_id: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder or of a Hub model; code in the repository is never run. Raises UserError."""
    folder, _ = resolve(path_or_hub_id, revision, TOKENIZER_FILES)
    refuse_own_code(folder)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # every tokenizer class raises its own
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"the tokenizer of {path_or_hub_id} cannot be loaded ({type(error).__name__}: {reason})"
        ) from error


def load_config(folder: Path) -> PretrainedConfig:
    """The config of a model folder; code in it is never run. Raises UserError."""
    try:
        json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is not a model folder: config.json cannot be read ({error})") from error
    refuse_own_code(folder)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        raise UserError(f"transformers does not know the model in {folder}: {error}") from error


def refuse_own_code(folder: Path) -> None:
    """Raise UserError for a model or tokenizer that works only with the code in its folder (auto_map).

    A folder with code whose model and tokenizer transformers knows too passes; transformers' own classes are then used.
    """
    config, tokenizer = _read_json(folder / "config.json"), _read_json(folder / "tokenizer_config.json")
    needs = []
    if config.get("auto_map") and config.get("model_type") not in CONFIG_MAPPING:
        needs += [f"config.json (model_type {config.get('model_type')})"]
    names = tokenizer.get("auto_map") or {}
    name = str(tokenizer.get("tokenizer_class"))
    if (isinstance(names, list) or names.get("AutoTokenizer")) and not tokenizer_class_from_name(name):
        needs += [f"tokenizer_config.json (tokenizer_class {name})"]
    if needs:
        raise UserError(
            f"{folder} needs code of its own: auto_map in {' and '.join(needs)}. lowalign never runs a model's code; use a "
            "model that transformers supports by itself"
        )


def _read_json(file: Path) -> dict:
    """{} when the file is missing or damaged; whoever needs it reports that."""
    try:
        value = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
