"""What a repository holds: its files with their sizes and hashes."""

import hashlib

from huggingface_hub import HfApi
from huggingface_hub.hf_api import RepoFile


def list_files(api: HfApi, repo: str, revision: str | None) -> dict[str, RepoFile]:
    """The files of a model repository by path. Raises what the Hub's client raises."""
    entries = api.list_repo_tree(repo, recursive=True, revision=revision)
    return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}


def git_hash(content: bytes) -> str:
    """The hash by which git, and the Hub, name the content of a small file: sha1 behind a header."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
