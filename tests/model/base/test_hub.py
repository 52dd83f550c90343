"""What is downloaded when a base or an adapter is loaded by its Hub id, and what is said when that fails."""

import contextlib

import pytest
from huggingface_hub import constants

from lowalign import Base
from lowalign.errors import UserError
from lowalign.model.adapters.files import locate
from lowalign.model.base.hub import BASE_FILES, load_tokenizer, resolve
from tests.hub_stub import DROP, Repo
from tests.tiny import tiny_folder

REPO = "me/model"
UNSAFE = ("pytorch_model.bin", "model.pt", "tokenizer.py", "vocab.PKL", "tokenizer.ckpt", "modeling_x.py", "x.h5")


@pytest.fixture
def model(hub, tmp_path):
    folder = tiny_folder(tmp_path / "model", "llama")
    hub.repos[REPO] = Repo()
    hub.repos[REPO].add(**{p.name: p.read_bytes() for p in folder.iterdir()})
    hub.repos[REPO].add(**dict.fromkeys(UNSAFE, b"evil"))
    return hub


def asked_for(hub):
    return {r.path.rpartition("/")[2] for r in hub.requests if "/resolve/" in r.path}


def test_a_base_without_files_that_can_hold_code(model):
    commit = model.repos[REPO].branches["main"]
    base = Base.load(REPO, quantization="none", dtype="float32", device="cpu", quiet=True)
    assert (base.identity.name, base.identity.revision) == (REPO, commit)
    assert "model.safetensors" in asked_for(model) and not asked_for(model) & set(UNSAFE)


def test_an_adapter_without_files_that_can_hold_code(hub):
    hub.repos[REPO] = Repo()
    names = ("adapter_model.safetensors", "adapter_config.json", "parents/0/adapter_config.json")
    hub.repos[REPO].add(**dict.fromkeys(names, b"{}"), **{f"parents/0/{name}": b"evil" for name in UNSAFE})
    folder = locate(REPO)
    assert {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} == set(names)
    assert not asked_for(hub) & set(UNSAFE)


@pytest.mark.parametrize("name", ["../evil.json", "parents/../../../evil.json", "parents/../../../../../evil.json"])
def test_a_name_that_leaves_the_cache(hub, tmp_path, name):
    hub.repos[REPO] = Repo()
    hub.repos[REPO].add(**{name: b"evil"})
    with pytest.raises(
        UserError, match=r"reachable on the Hub: Invalid filename '.*evil.json': cannot contain a '\.\.'"
    ):
        resolve(REPO, None, ["*.json"])
    assert not list(tmp_path.rglob("evil.json")) and not asked_for(hub)


def test_code_of_a_tokenizer_is_not_run(model, tmp_path, monkeypatch):
    code = b'import os\n\nopen(os.environ["EVIL"], "w")\n\n\nclass Mine:\n    pass\n'
    config = b'{"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", null]}}'
    model.repos[REPO].add(**{"mine.py": code, "tokenizer_config.json": config})
    monkeypatch.setenv("EVIL", str(tmp_path / "evil"))
    monkeypatch.setattr("builtins.input", lambda question: pytest.fail(question))  # whether to run it
    with contextlib.suppress(UserError):
        load_tokenizer(REPO)
    assert not (tmp_path / "evil").exists() and "mine.py" not in asked_for(model)


FAULTS = {
    "no repository": ("me/nothing", None, None, "there is no such repository, or it is private and your token may not"),
    "no revision": (REPO, "v9", None, "the repository has no revision v9"),
    "no name": ("me/mo del", None, None, "this is not the name of a repository"),
    "hub down": (REPO, None, 503, "the Hub answered 503; run the command again later"),
    "rate limit": (REPO, None, 429, "the Hub answered 429"),
    "no right": (REPO, None, 403, "your token has no right to do this"),
    "bad token": (REPO, None, 401, "your token was not accepted"),
    "cut": (REPO, None, DROP, "the connection failed"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_said(model, fault):
    name, revision, status, message = FAULTS[fault]
    if status:
        model.fail("GET /api/models", status, times=1000)
    with pytest.raises(UserError, match=f'"{name}" is neither a folder here nor reachable on the Hub: {message}'):
        resolve(name, revision, BASE_FILES)


def test_offline_from_the_cache_only(model, monkeypatch):
    folder, commit = resolve(REPO, None, BASE_FILES)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve(REPO, None, BASE_FILES) == (folder, commit)
    with pytest.raises(UserError, match=r"offline mode is on \(HF_HUB_OFFLINE\) and the cache does not hold all of it"):
        resolve("me/other", None, BASE_FILES)


def test_a_gated_repository(model):
    model.gated.add(REPO)
    with pytest.raises(
        UserError, match=r"its owner grants access on request: accept the terms on its page, then log in"
    ):
        resolve(REPO, None, BASE_FILES)
