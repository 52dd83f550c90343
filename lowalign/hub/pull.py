"""A Hub repository → a new folder with its adapter or model, at one commit, each file compared with the Hub's hash.

Files come through the cache of `huggingface_hub`, so an interrupted pull goes on where it stopped, and the folder appears
when it is complete. Only known files are downloaded, and none that can hold code.
"""

import glob
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id

from lowalign.durable import check_disk, file_hash, new_folder, write_json
from lowalign.errors import UserError
from lowalign.hub.artefact import check_folder, known
from lowalign.hub.listing import git_hash, list_files
from lowalign.log import log
from lowalign.model.base.hub import UNSAFE_SUFFIXES
from lowalign.model.base.hub_errors import HUB_ERRORS, explain


def pull(repo: str, out: str | Path, *, revision: str | None = None) -> str:
    """Download an adapter or a model to a new folder. Returns the commit, which out/lowalign.json names too.

    revision: a branch, tag or commit; default: main. Raises UserError when the folder exists, when the repository cannot be
    read, holds nothing that lowalign loads, or names a file outside it, and when a file is not what the Hub says; then
    nothing is left of the folder.
    """
    out = Path(out).expanduser()
    if out.exists():
        raise UserError(f"{out} exists and is not overwritten; name another DIR")
    try:
        validate_repo_id(repo)
        api = HfApi()
        commit = api.model_info(repo, revision=revision).sha
        listed = list_files(api, repo, commit)
        _refuse_outside(repo, listed)
        files = [file for name, file in listed.items() if known(name)]
        _check_content(repo, listed, [file.path for file in files])
        check_disk(out, sum(file.size for file in files), "the files take", "another DIR")
        names = [glob.escape(file.path) for file in files]
        snapshot = Path(snapshot_download(repo, revision=commit, allow_patterns=names))
        with new_folder(out) as temp:
            for file in files:
                _copy(snapshot / file.path, temp / file.path, file)
            artefact = check_folder(temp)
            write_json(temp / "lowalign.json", artefact.meta | {"hub": {"repo": repo, "commit": commit}})
    except HUB_ERRORS as error:
        raise UserError(f"{repo} was not pulled: {explain(error, revision)}") from error
    log(f"{out} holds the {len(files)} files of {repo} that lowalign knows, compared by size and hash; commit {commit}")
    return commit


def _refuse_outside(repo: str, names: Iterable[str]) -> None:
    """Raises UserError for a name that would be written outside the folder, on any system."""
    for name in names:
        parts = PurePosixPath(name).parts
        if name.startswith("/") or ".." in parts or "\\" in name or re.match(r"[A-Za-z]:", name):
            raise UserError(f"{repo} names a file that would lie outside DIR: {name!r}; nothing was downloaded")


def _check_content(repo: str, listed: Iterable[str], names: Sequence[str]) -> None:
    """Raises UserError for a repository that has nothing to load."""
    configs = {"adapter_config.json", "config.json"} & set(names)
    if configs and any(name.endswith(".safetensors") for name in names):
        return
    unsafe = next((name for name in listed if name.endswith(UNSAFE_SUFFIXES)), None)
    raise UserError(
        f"{repo} holds neither an adapter nor a model in safetensors"
        + (f"; {unsafe} is of a format that can hold code and is not downloaded" if unsafe else "")
    )


def _copy(source: Path, target: Path, file: RepoFile) -> None:
    """From the cache. Raises UserError when the copy is not what the Hub says."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    own = file_hash(target) if file.lfs else git_hash(target.read_bytes())
    if target.stat().st_size != file.size or own != (file.lfs.sha256 if file.lfs else file.blob_id):
        raise UserError(
            f"{file.path} in the cache is not the file that the Hub has (size or hash differs); delete {source.resolve()} and "
            "pull again"
        )
