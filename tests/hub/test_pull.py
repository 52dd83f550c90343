"""`lowalign pull` against a stub of the Hub: safetensors only, nothing outside the folder, whole or not there."""

import hashlib
import json
import shutil
from collections import namedtuple

import pytest
import torch
from huggingface_hub import constants
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lowalign import Base, Host
from lowalign.cli import main
from lowalign.errors import UserError
from lowalign.hub.pull import pull
from lowalign.hub.push import push
from lowalign.model.policy import load_policy
from tests.hub.conftest import BASE, add_folder
from tests.hub.test_push import stored
from tests.hub_stub import CUT, DROP, TOKEN, Repo

REPO = "me/thing"


def leftovers(folder):
    return [p.name for p in folder.iterdir() if p.name not in ("hub-cache", "no-token")]


@pytest.mark.parametrize("name", ["run", "second", "prefix", "reward", "merged", "classifier"])
def test_there_and_back(base_hub, artefacts, name, tmp_path):
    commit = push(artefacts.folder / name, REPO)
    assert pull(REPO, tmp_path / "out") == commit
    got, on_hub = stored(tmp_path / "out"), base_hub.files(REPO)
    meta = json.loads(got.pop("lowalign.json"))
    assert meta.pop("hub") == {"repo": REPO, "commit": commit}
    assert meta == json.loads(on_hub.pop("lowalign.json"))
    assert got == on_hub
    again = push(tmp_path / "out", REPO)  # what was pulled is what is there
    assert base_hub.files(REPO)["lowalign.json"] == json.dumps(meta, indent=2).encode() + b"\n" or again == commit


def test_what_was_pulled_is_what_was_trained(base_hub, artefacts, tmp_path):
    ids = torch.randint(5, 300, (1, 24), generator=torch.Generator().manual_seed(1))
    for name in ("second", "merged", "classifier"):
        push(artefacts.folder / name, f"me/{name}")
        pull(f"me/{name}", tmp_path / name)
    host = Host(Base.load(BASE, quantization="none", dtype="float32", device="cpu", quiet=True))
    logits = []
    for folder in (artefacts.second, tmp_path / "second"):
        with torch.no_grad(), host.use(*(stack := load_policy(host, [str(folder)]))):
            logits.append(host.base.model(ids).logits)
        for adapter in stack:
            host.delete(adapter)
    assert torch.equal(*logits)
    for kind, name in ((AutoModelForCausalLM, "merged"), (AutoModelForSequenceClassification, "classifier")):
        ours, theirs = (kind.from_pretrained(f).state_dict() for f in (artefacts.folder / name, tmp_path / name))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_branches_and_commits(base_hub, artefacts, tmp_path, capsys):
    first = push(artefacts.run, REPO)
    second = push(artefacts.reward, REPO)
    assert main(["pull", REPO, str(tmp_path / "a"), "--revision", first]) == 0
    assert f"of {REPO} that lowalign knows, compared by size and hash; commit {first}" in capsys.readouterr().err
    assert pull(REPO, tmp_path / "b") == second
    assert pull(REPO, tmp_path / "c", revision="main") == second
    assert json.loads((tmp_path / "a" / "lowalign.json").read_text())["method"] == "sft"
    with pytest.raises(UserError, match=f"{REPO} was not pulled: the repository has no revision nope"):
        pull(REPO, tmp_path / "d", revision="nope")


def test_files_that_can_hold_code_are_never_asked_for(base_hub, artefacts, tmp_path):
    push(artefacts.merged, REPO)
    evil = [
        "pytorch_model.bin",
        "x.pt",
        "x.PTH",
        "modeling.py",
        "tokenizer.py",
        "vocab.pkl",
        "parents/0/adapter_model.bin",
    ]
    base_hub.repos[REPO].add(**dict.fromkeys([*evil, ".env", "notes/config.json"], b"evil"))
    base_hub.requests.clear()
    pull(REPO, tmp_path / "out")
    assert not any(b"evil" in content for content in stored(tmp_path).values())
    assert not any(name in request.path for name in [*evil, ".env", "notes"] for request in base_hub.requests)


@pytest.mark.parametrize(
    "name",
    ["../evil.json", "parents/../../evil.json", "/etc/evil.json", "..\\evil.json", "C:evil.json", "a\\..\\b.json"],
)
def test_names_that_leave_the_folder(base_hub, artefacts, name, tmp_path):
    push(artefacts.run, REPO)
    base_hub.repos[REPO].add(**{name: b"{}"})
    with pytest.raises(UserError, match=r"names a file that would lie outside DIR: .*; nothing was downloaded"):
        pull(REPO, tmp_path / "out")
    assert leftovers(tmp_path) == [] and base_hub.count("GET .*/resolve/") == 0


def test_an_interrupted_pull_goes_on(base_hub, artefacts, tmp_path):
    push(artefacts.merged, REPO)
    base_hub.fail("GET .*/model.safetensors", CUT, times=1)
    base_hub.fail("(GET|HEAD) .*/model.safetensors", DROP, times=1000)
    with pytest.raises(UserError, match=f"{REPO} was not pulled: .*the connection failed"):
        pull(REPO, tmp_path / "out")
    assert leftovers(tmp_path) == []
    base_hub.faults.clear()
    base_hub.requests.clear()
    pull(REPO, tmp_path / "out")
    fetched = [r for r in base_hub.requests if r.method == "GET" and "/resolve/" in r.path]
    assert [r.path.rpartition("/")[2] for r in fetched] == ["model.safetensors"]  # the others are in the cache


FAULTS = {
    "hub down": ("GET /api/models", 503, "the Hub answered 503"),
    "connection cut": ("GET /api/models", DROP, r"the connection failed \(\w+\)"),
    "forbidden": ("GET .*/tree/", 403, "your token has no right to do this"),
    "not logged in": ("GET .*/revision/|GET /api/models", 401, "your token was not accepted .*log in with"),
    "file gone": ("(GET|HEAD) .*/resolve/.*/adapter_config.json", 404, ""),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_leaves_nothing(base_hub, artefacts, fault, tmp_path, capsys):
    push(artefacts.run, REPO)
    pattern, status, message = FAULTS[fault]
    base_hub.fail(pattern, status, times=1000)
    with pytest.raises(UserError, match=f"{REPO} was not pulled: .*{message}") as error:
        pull(REPO, tmp_path / "out")
    assert leftovers(tmp_path) == [] and TOKEN not in str(error.value)
    base_hub.faults.clear()
    pull(REPO, tmp_path / "out")
    said = capsys.readouterr()
    assert TOKEN not in said.out + said.err
    assert not any(TOKEN.encode() in content for content in stored(tmp_path).values())


def test_a_file_that_is_not_what_the_hub_says(base_hub, artefacts, tmp_path):
    push(artefacts.run, REPO)
    pull(REPO, tmp_path / "first")
    (blob,) = (p for p in (tmp_path / "hub-cache").rglob("blobs/*") if len(p.name) == 64)
    blob.write_bytes(blob.read_bytes()[::-1])  # a cache on a bad disk
    with pytest.raises(UserError, match=f"is not the file that the Hub has .*; delete {blob} and pull again"):
        pull(REPO, tmp_path / "out")
    assert leftovers(tmp_path) == ["first"]
    blob.unlink()
    pull(REPO, tmp_path / "out")


def test_a_full_disk(base_hub, artefacts, tmp_path, monkeypatch):
    push(artefacts.run, REPO)
    usage = namedtuple("usage", "total used free")(1, 1, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"the files take 0\.0 GB and 0\.0 GB are free in .*; choose another DIR"):
        pull(REPO, tmp_path / "out")
    monkeypatch.undo()


def test_a_disk_that_fills_up(base_hub, artefacts, tmp_path, monkeypatch):
    push(artefacts.run, REPO)

    def full(source, target):
        raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr("lowalign.hub.pull.shutil.copyfile", full)
    with pytest.raises(UserError, match=f"{REPO} was not pulled: .*: No space left on device"):
        pull(REPO, tmp_path / "out")
    assert leftovers(tmp_path) == []


def test_a_stop_and_a_kill(base_hub, artefacts, tmp_path):
    def stop(source, target):
        raise KeyboardInterrupt

    push(artefacts.run, REPO)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("lowalign.hub.pull.shutil.copyfile", stop)
        pull(REPO, tmp_path / "out")
    assert leftovers(tmp_path) == []
    (tmp_path / ".saving-out").mkdir()
    (tmp_path / ".saving-out" / "model.safetensors").write_bytes(b"what a kill left")
    pull(REPO, tmp_path / "out")
    assert leftovers(tmp_path) == ["out"] and not (tmp_path / "out" / "model.safetensors").exists()


def test_repositories_with_nothing_to_load(hub, tmp_path):
    hub.repos[REPO] = Repo()
    hub.repos[REPO].add(**{"data.csv": b"1"})
    with pytest.raises(UserError, match=f"{REPO} holds neither an adapter nor a model in safetensors$"):
        pull(REPO, tmp_path / "out")
    hub.repos[REPO].add(**{"config.json": b"{}", "pytorch_model.bin": b"1"})
    with pytest.raises(UserError, match=r"pytorch_model\.bin is of a format that can hold code and is not downloaded"):
        pull(REPO, tmp_path / "out")
    hub.repos[REPO].add(**{"model.safetensors": b"short"})
    with pytest.raises(UserError, match="is no safetensors file that lowalign reads"):
        pull(REPO, tmp_path / "out")
    assert leftovers(tmp_path) == []


def test_private_repositories(base_hub, artefacts, tmp_path, monkeypatch):
    push(artefacts.run, REPO, private=True)
    pull(REPO, tmp_path / "mine")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match="it is private and you are not logged in: log in with `hf auth login`"):
        pull(REPO, tmp_path / "out")
    with pytest.raises(UserError, match="there is no such repository"):
        pull("me/nothing", tmp_path / "out")


def test_mistakes(hub, tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="there exists and is not overwritten; name another DIR"):
        pull(REPO, tmp_path / "there")
    with pytest.raises(UserError, match="this is not the name of a repository"):
        pull("a/b/c", tmp_path / "out")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"offline mode is on \(HF_HUB_OFFLINE\)"):
        pull(REPO, tmp_path / "out")
    assert hub.requests == []


def test_a_plain_model_of_others(hub, artefacts, tmp_path):
    commit = add_folder(hub, "them/model", artefacts.base)
    pull("them/model", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "lowalign.json").read_text()) == {
        "hub": {"repo": "them/model", "commit": commit}
    }
    weights = hashlib.sha256((tmp_path / "out" / "model.safetensors").read_bytes())
    assert weights.digest() == hashlib.sha256((artefacts.base / "model.safetensors").read_bytes()).digest()
    identity = Base.load(tmp_path / "out", quantization="none", dtype="float32", device="cpu", quiet=True).identity
    assert (identity.name, identity.revision) == ("them/model", commit)  # an adapter on it names the Hub's model
