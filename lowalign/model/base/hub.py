"""Folder or Hub id -> local folder, downloaded if needed."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lowalign.errors import UserError

TOKENIZER_FILES = [
    *("config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json"),
    *("vocab*", "merges.txt", "*.model", "*.jinja"),
]
BASE_FILES = ["*.safetensors", "*.safetensors.index.json", "generation_config.json", *TOKENIZER_FILES]


def resolve(path_or_hub_id: str, revision: str | None, patterns: list[str]) -> tuple[Path, str | None]:
    """-> the local folder, and the Hub commit (None for a folder of the user).

    patterns: of the files to download. Raises UserError when there is neither a folder nor a Hub repository of that name.
    """
    folder = Path(path_or_hub_id).expanduser()
    if folder.is_dir():
        return folder, None
    if folder.exists() or path_or_hub_id.startswith((".", "/", "~")) or path_or_hub_id.count("/") > 1:
        raise UserError(f"{path_or_hub_id} is not a folder")
    try:
        snapshot = snapshot_download(path_or_hub_id, revision=revision, allow_patterns=patterns)
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f'"{path_or_hub_id}" is neither a folder here nor reachable on the Hub: {reason}') from error
    return Path(snapshot), Path(snapshot).name


def load_tokenizer(path_or_hub_id: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder or of a Hub model; code in the repository is never run. Raises UserError."""
    folder, _ = resolve(path_or_hub_id, revision, TOKENIZER_FILES)
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # every tokenizer class raises its own
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"the tokenizer of {path_or_hub_id} cannot be loaded ({type(error).__name__}: {reason})"
        ) from error
