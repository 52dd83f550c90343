"""An artefact → one commit in a Hub repository, compared with what was sent before success is said.

Only known files are sent, without paths of this machine and without tokens. Large files go first, a part of the folder at a
time; the commit then makes all of them visible at once. Whatever interrupts it, the repository is as before, and a second
push sends only the large files that are not there yet.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, get_token
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id

from lowalign.errors import UserError
from lowalign.hub.artefact import CARD, Artefact, decides_weights, open_artefact
from lowalign.hub.card import GENERATED, PLOT, CardFacts, make_card
from lowalign.hub.listing import git_hash, list_files
from lowalign.hub.publishable import is_hub_id, published_base, published_json
from lowalign.log import log
from lowalign.model.base.hub_errors import HUB_ERRORS, LOG_IN, explain
from lowalign.report.plot import metrics_plot

PART_BYTES = 20_000_000_000  # the addresses that the Hub gives for uploads expire, so those of a large folder are asked for in parts
TOKEN = re.compile(rb"hf_[A-Za-z0-9]{20,}")


def push(path: str | Path, repo: str, *, private: bool = False, revision: str | None = None) -> str:
    """Publish a run's adapter, an adapter folder or a model folder. Returns the commit.

    repo: NAMESPACE/NAME, or NAME in the user's own namespace; made if it does not exist. private: make it private.
    revision: a branch, made from main if it does not exist; default: main. The token is that of HF_TOKEN or of `hf auth
    login`. Raises UserError when the folder cannot be published, when the Hub refuses, and when the repository afterwards
    does not hold what was sent.
    """
    if revision and re.fullmatch(r"[0-9a-f]{40}", revision):
        raise UserError(f"--revision {revision} is a commit; a push goes to a branch")
    artefact = open_artefact(path)
    try:
        validate_repo_id(repo)
        if get_token() is None:
            raise UserError(f"{repo} was not pushed: you are not logged in: {LOG_IN}")
        api = HfApi()
        repo = repo if "/" in repo else f"{api.whoami()['name']}/{repo}"
        plot = metrics_plot(artefact.run / "metrics.jsonl") if artefact.run else None
        facts = CardFacts(repo, _license(api, artefact), plot is not None or PLOT in artefact.files)
        card = make_card(artefact, facts, _own_card(api, artefact, repo, revision))
        contents = _contents(artefact, {CARD: card} | ({PLOT: plot} if plot else {}))
        ModelCard(card).validate()  # by the Hub, now rather than after the upload
        additions = [CommitOperationAdd(name, content) for name, content in contents.items()]  # computes hashes
        _make_repository(api, repo, private, revision)
        commit = _upload(api, repo, revision, additions)
        wrong = list(_differences(api, repo, revision, additions))
    except HUB_ERRORS as error:
        raise UserError(f"{repo} was not pushed: {explain(error, revision)}") from error
    if wrong:
        raise UserError(
            f"{repo} does not hold what was pushed: {'; '.join(wrong)}. Somebody may have changed it meanwhile; push again"
        )
    log(f"{repo} holds the {len(additions)} files of {path}, compared by size and hash; commit {commit}")
    return commit


def _own_card(api: HfApi, artefact: Artefact, repo: str, revision: str | None) -> str | None:
    """The card that the user wrote: README.md of the folder, or the one on the Hub if no push wrote that."""
    if CARD in artefact.files:
        return (artefact.folder / CARD).read_text(encoding="utf-8")
    try:
        commit = api.model_info(repo, revision=revision).sha  # for a branch the client may answer from its cache
    except (RepositoryNotFoundError, RevisionNotFoundError):
        return None
    if CARD not in list_files(api, repo, commit):
        return None
    text = Path(api.hf_hub_download(repo, CARD, revision=commit)).read_text(encoding="utf-8")
    return None if GENERATED in text else text


def _contents(artefact: Artefact, texts: dict[str, str]) -> dict[str, bytes | Path]:
    """What is sent: the known files and these texts. Raises UserError when one of them has an access token in it."""
    contents: dict[str, bytes | Path] = {}
    for name in artefact.files:
        contents[name] = published_json(artefact, name) or artefact.folder / name
    contents |= {name: text.encode() for name, text in texts.items()}
    left_out = sorted(p.name for p in artefact.folder.iterdir() if p.is_file() and p.name not in contents)
    if left_out:
        log(f"not published, because lowalign does not know these files: {', '.join(left_out)}")
    token = str(get_token()).encode()
    for name, content in contents.items():
        text = b"" if name.endswith(".safetensors") else content if isinstance(content, bytes) else content.read_bytes()
        if TOKEN.search(text) or token in text:
            raise UserError(f"{artefact.folder / name} has an access token in it; take it out, and revoke it")
    size = sum(c.stat().st_size if isinstance(c, Path) else len(c) for c in contents.values())
    log(f"computing the hashes of {len(contents)} files, {size / 1e6:,.1f} MB")
    return contents


def _license(api: HfApi, artefact: Artefact) -> dict[str, str]:
    """What the card of the base says about its license; {} if that is not known."""
    base, commit = published_base(artefact)
    if not (commit or is_hub_id(base)):
        return {}
    try:
        data = api.model_info(base, revision=commit).card_data
    except HUB_ERRORS as error:
        log(f"the license of {base} is not known ({explain(error, commit)}); write it in the metadata of {CARD}")
        return {}
    known = {key: data.get(key) for key in ("license", "license_name", "license_link")} if data else {}
    if known.get("license_link") and "://" not in known["license_link"]:
        known["license_link"] = f"https://huggingface.co/{base}/blob/main/{known['license_link']}"
    return {key: value for key, value in known.items() if value}


def _make_repository(api: HfApi, repo: str, private: bool, revision: str | None) -> None:
    api.create_repo(repo, private=private or None, exist_ok=True)
    if private and not api.model_info(repo).private:
        raise UserError(
            f"{repo} exists and is public; make it private in its settings first, or push without --private"
        )
    if revision not in (None, "main"):
        api.create_branch(repo, branch=revision, exist_ok=True)


def _upload(api: HfApi, repo: str, revision: str | None, additions: Sequence[CommitOperationAdd]) -> str:
    """Large files, then the commit, which also removes weights and configs of an earlier push that are in this no more."""
    names = {addition.path_in_repo for addition in additions}
    stale = [name for name in list_files(api, repo, revision) if decides_weights(name) and name not in names]
    if stale:
        log(f"removed from {repo}, because they belong to other weights: {', '.join(stale)}")
    for part in _parts(additions):
        api.preupload_lfs_files(repo, additions=part, revision=revision)
    operations = [*additions, *map(CommitOperationDelete, stale)]
    return api.create_commit(repo, operations, commit_message="Push with lowalign", revision=revision).oid


def _parts(additions: Sequence[CommitOperationAdd]) -> Iterator[list[CommitOperationAdd]]:
    """Runs of files that have PART_BYTES together; a larger file is a part of its own."""
    part: list[CommitOperationAdd] = []
    room = PART_BYTES
    for addition in additions:
        if part and addition.upload_info.size > room:
            yield part
            part, room = [], PART_BYTES
        part.append(addition)
        room -= addition.upload_info.size
    yield part


def _differences(api: HfApi, repo: str, revision: str | None, additions: Sequence[CommitOperationAdd]) -> Iterator[str]:
    """A line for each file that the repository does not hold as it was sent."""
    stored = list_files(api, repo, revision)
    for addition in additions:
        name, info = addition.path_in_repo, addition.upload_info
        file = stored.get(name)
        if file is None:
            yield f"{name} is missing"
        elif file.size != info.size:
            yield f"{name} has {file.size:,} bytes instead of {info.size:,}"
        elif file.lfs and file.lfs.sha256 != info.sha256.hex():
            yield f"{name} has another sha256"
        elif not file.lfs:
            with addition.as_file() as content:
                if file.blob_id != git_hash(content.read()):
                    yield f"{name} has another hash"
