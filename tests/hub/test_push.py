"""`lowalign push` against a stub of the Hub: what is sent, what never is, and every fault on the way."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants

from lowalign.cli import main
from lowalign.errors import UserError
from lowalign.hub import push as push_module
from lowalign.hub.push import push
from tests.hub.conftest import BASE
from tests.hub_stub import DROP, TOKEN, Repo

REPO = "me/adapter"


def stored(folder):
    """The files of a folder by relative path."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def everything(hub, tmp_path):
    """All that left this process or was written by it."""
    sent = b"".join(request.body + request.path.encode() for request in hub.requests)
    return sent + b"".join(content for name, content in stored(tmp_path).items())


def test_a_run_is_one_commit_with_its_adapter(base_hub, artefacts, capsys):
    assert main(["push", str(artefacts.run), REPO]) == 0
    files = base_hub.files(REPO)
    expected = {"adapter_config.json", "adapter_model.safetensors", "lowalign.json", "chat_template.jinja"}
    assert set(files) == expected | {"README.md", "metrics.svg"}  # no checkpoint, recipe or metrics file
    weights = artefacts.run / "adapter" / "adapter_model.safetensors"
    assert files["adapter_model.safetensors"] == weights.read_bytes()
    assert len(base_hub.repos[REPO].commits) == 2 and not base_hub.repos[REPO].private
    sha = base_hub.repos[REPO].branches["main"]
    assert f"{REPO} holds the 6 files" in (said := capsys.readouterr().err) and sha in said
    assert str(artefacts.folder).encode() not in b"".join(files.values())


def test_a_second_push_sends_nothing(base_hub, artefacts):
    first = push(artefacts.run, REPO)
    assert base_hub.count("PUT /lfs") == 1 and base_hub.count("POST .*/commit/") == 1
    assert push(artefacts.run, REPO) == first
    assert base_hub.count("PUT /lfs") == 1 and base_hub.count("POST .*/commit/") == 1


def test_own_namespace_branch_and_privacy(base_hub, artefacts):
    commit = push(artefacts.run, "mine", private=True, revision="v2")
    repo = base_hub.repos["tester/mine"]
    assert repo.private and repo.branches["v2"] == commit and repo.at("main")[1] == {}
    push(artefacts.run, "tester/public")
    with pytest.raises(UserError, match="tester/public exists and is public; make it private in its settings"):
        push(artefacts.run, "tester/public", private=True)


def test_unknown_files_and_links_stay_here(base_hub, artefacts, tmp_path, capsys):
    folder, outside = tmp_path / "adapter", tmp_path / "outside.json"
    shutil.copytree(artefacts.run / "adapter", folder)
    for name in (".env", "secret.txt", "pytorch_model.bin", "train.py", ".saving-x.json", "notes/config.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("password")
    push(folder, REPO)
    assert not any(b"password" in content for content in base_hub.files(REPO).values())
    assert set(base_hub.files(REPO)) == {
        *("adapter_config.json", "adapter_model.safetensors", "lowalign.json", "chat_template.jinja", "README.md")
    }
    assert ".env, .saving-x.json, pytorch_model.bin, secret.txt, train.py" in capsys.readouterr().err
    outside.write_text("{}")
    (folder / "tokenizer.json").symlink_to(outside)
    with pytest.raises(UserError, match=r"tokenizer\.json is a link to a file outside"):
        push(folder, "me/other")
    (folder / "tokenizer.json").unlink()
    shutil.copytree(artefacts.second / "parents", tmp_path / "parents")
    (folder / "parents").symlink_to(tmp_path / "parents")
    with pytest.raises(UserError, match="is a link to a file outside"):
        push(folder, "me/other")
    assert "me/other" not in base_hub.repos


def test_weights_of_an_earlier_push_go(base_hub, artefacts):
    base_hub.repos[REPO] = Repo()
    base_hub.repos[REPO].add(
        **{
            "model-00001-of-00002.safetensors": b"old",
            "config.json": b"{}",
            "notes.md": b"mine",
            "tokenizer.json": b"{}",
        }
    )
    push(artefacts.run, REPO)
    files = base_hub.files(REPO)
    assert "config.json" not in files and "model-00001-of-00002.safetensors" not in files
    assert files["notes.md"] == b"mine" and "tokenizer.json" in files and "adapter_model.safetensors" in files


def test_large_folders_go_in_parts_and_one_commit(base_hub, artefacts, monkeypatch):
    monkeypatch.setattr(push_module, "PART_BYTES", 60_000)
    monkeypatch.setattr(base_hub, "part_size", 16 * 1024)
    push(artefacts.second, REPO)
    assert base_hub.count("POST .*/objects/batch") == 2  # the adapter, its parent
    assert base_hub.count(r"PUT /lfs/\w+/\d+") > 4 and base_hub.count("POST .*/commit/") == 1
    assert (
        base_hub.files(REPO)["parents/0/adapter_model.safetensors"]
        == (artefacts.run / "adapter" / "adapter_model.safetensors").read_bytes()
    )


@pytest.mark.parametrize("name", ["run", "second", "prefix", "reward", "merged", "classifier"])
def test_what_is_sent_names_no_path_and_no_token(base_hub, artefacts, name, tmp_path, monkeypatch):
    monkeypatch.chdir(artefacts.folder)
    push(name, REPO)
    sent = everything(base_hub, tmp_path)
    assert TOKEN.encode() not in sent and str(artefacts.folder).encode() not in sent
    assert {r.headers.get("Authorization", r.headers.get("authorization")) for r in base_hub.requests} <= {
        *(f"Bearer {TOKEN}", None)
    }


def test_paths_become_names(base_hub, artefacts, tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(artefacts.run / "adapter", folder)
    meta = json.loads((folder / "lowalign.json").read_text())
    meta["base"]["name"] = "/home/somebody/models/llama"
    meta["recipe"] += "\n  # kept: prompt/completion, and 1/2\n  files: [/home/somebody/rows.jsonl, ~/more.jsonl]\n"
    meta |= {"hub": {"repo": "them/x", "commit": "0"}, "ratio": "1/2", "notes": ["C:\\Users\\somebody\\x.txt"]}
    (folder / "lowalign.json").write_text(json.dumps(meta))
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "/home/somebody/models/llama"
    (folder / "adapter_config.json").write_text(json.dumps(config))
    push(folder, REPO)
    files = base_hub.files(REPO)
    assert not any(b"somebody" in content for content in files.values())
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "llama"
    sent = json.loads(files["lowalign.json"])
    assert sent["notes"] == ["x.txt"] and sent["ratio"] == "1/2" and "hub" not in sent
    assert "# kept: prompt/completion, and 1/2\n  files: [rows.jsonl, more.jsonl]\n" in sent["recipe"]


def test_a_token_in_a_text_is_refused(base_hub, artefacts, tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(artefacts.run / "adapter", folder)
    (folder / "README.md").write_text(f"# Mine\n\nhf = login('{TOKEN}')\n")
    with pytest.raises(UserError, match=r"README\.md has an access token in it; take it out, and revoke it"):
        push(folder, REPO)
    assert REPO not in base_hub.repos and not any(TOKEN.encode() in request.body for request in base_hub.requests)


def test_small_files_take_no_other_way_with_xet(base_hub, artefacts, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    monkeypatch.setattr(base_hub, "lfs_threshold", 10**9)
    push(artefacts.run, REPO)
    assert "adapter_model.safetensors" in base_hub.files(REPO) and base_hub.count("PUT") == 0


def test_the_token_of_a_login(base_hub, artefacts, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    Path(constants.HF_TOKEN_PATH).write_text(TOKEN)
    push(artefacts.run, REPO)
    assert REPO in base_hub.repos


# -- faults -----------------------------------------------------------------------------------------------------------

FAULTS = {
    "expired token": ("POST /api/repos/create", 401, "your token was not accepted .*: log in with `hf auth login`"),
    "read-only token": ("POST /api/repos/create", 403, "no right to do this .*a token with write access"),
    "not yours": ("POST .*/preupload/", 403, "a NAMESPACE that is you or an organization of yours"),
    "repository gone": ("POST .*/preupload/", 404, "the Hub answered 404"),
    "hub down": ("POST .*/preupload/", 503, "the Hub answered 503; run the command again later"),
    "rate limit": ("POST .*/preupload/", 429, "the Hub answered 429"),
    "upload refused": ("PUT /lfs", 400, "the Hub answered 400"),
    "upload down": ("PUT /lfs", 503, "the Hub answered 503"),
    "connection cut in the upload": (
        "PUT /lfs",
        DROP,
        r"the connection failed \(\w+\); check it and run the command again",
    ),
    "connection cut in the commit": ("POST .*/commit/", DROP, "the connection failed"),
    "commit refused": ("POST .*/commit/", 400, "the Hub answered 400"),
    "card refused": ("POST /api/validate-yaml", 400, "injected"),
    "commit down": ("POST .*/commit/", 503, "the Hub answered 503"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_commits_nothing_and_a_rerun_goes_on(base_hub, artefacts, tmp_path, fault, capsys):
    pattern, status, message = FAULTS[fault]
    base_hub.fail(pattern, status, times=1000)
    with pytest.raises(UserError, match=f"^{REPO} was not pushed: .*{message}") as error:
        push(artefacts.run, REPO)
    assert TOKEN not in str(error.value)
    assert REPO not in base_hub.repos or len(base_hub.repos[REPO].commits) == 1
    there = len(base_hub.blobs)
    base_hub.faults.clear()
    before = base_hub.count("PUT /lfs")
    push(artefacts.run, REPO)
    assert base_hub.count("PUT /lfs") - before == 1 - there  # what had arrived is not sent again
    said = capsys.readouterr()
    assert TOKEN not in said.out + said.err and TOKEN.encode() not in everything(base_hub, tmp_path)


def test_a_few_503_are_waited_for(base_hub, artefacts):
    base_hub.fail("PUT /lfs", 503, times=3)
    push(artefacts.run, REPO)
    assert base_hub.count("PUT /lfs") == 4


def test_an_upload_cut_between_two_files_sends_the_second_only(base_hub, artefacts):
    parent = (artefacts.run / "adapter" / "adapter_model.safetensors").read_bytes()
    base_hub.fail(f"PUT /lfs/{hashlib.sha256(parent).hexdigest()}", DROP, times=1000)
    with pytest.raises(UserError, match="the connection failed"):
        push(artefacts.second, REPO)
    assert base_hub.files(REPO) == {}
    base_hub.faults.clear()
    base_hub.requests.clear()
    push(artefacts.second, REPO)
    assert base_hub.count("PUT /lfs") == 1 and "parents/0/lowalign.json" in base_hub.files(REPO)


def test_a_commit_that_was_made_but_not_answered(base_hub, artefacts, monkeypatch):
    def cut(repo):
        raise ConnectionAbortedError

    monkeypatch.setattr(base_hub, "on_commit", cut)
    monkeypatch.setattr(base_hub.server, "handle_error", lambda *connection: None)
    with pytest.raises(UserError, match="the connection failed"):
        push(artefacts.run, REPO)
    monkeypatch.setattr(base_hub, "on_commit", lambda repo: None)
    assert push(artefacts.run, REPO) == base_hub.repos[REPO].branches["main"]
    assert len(base_hub.repos[REPO].commits) == 2


CHANGES = {
    "missing": (lambda files: files.pop("lowalign.json"), "lowalign.json is missing"),
    "cut off": (lambda files: files.update({"lowalign.json": (b"{}", None)}), r"lowalign.json has 2 bytes instead of"),
    "other text": (
        lambda files: files.update({"README.md": (files["README.md"][0][::-1], None)}),
        "README.md has another hash",
    ),
    "other weights": (
        lambda files: files.update({"adapter_model.safetensors": (files["adapter_model.safetensors"][0], "0" * 64)}),
        "adapter_model.safetensors has another sha256",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_repository_that_is_not_what_was_sent(base_hub, artefacts, change, monkeypatch):
    edit, message = CHANGES[change]

    def tamper(repo):
        files = dict(repo.at()[1])
        edit(files)
        repo.commit(files)

    monkeypatch.setattr(base_hub, "on_commit", tamper)
    with pytest.raises(UserError, match=f"{REPO} does not hold what was pushed: {message}.*; push again"):
        push(artefacts.run, REPO)


# -- mistakes ---------------------------------------------------------------------------------------------------------


def missing_shard(artefacts, folder):
    shutil.copytree(artefacts.merged, folder)
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def cut_weights(artefacts, folder):
    shutil.copytree(artefacts.merged, folder)
    os.truncate(folder / "model.safetensors", 5000)


def changed_weights(artefacts, folder):
    shutil.copytree(artefacts.second, folder)
    shutil.copyfile(artefacts.reward / "adapter_model.safetensors", folder / "parents/0/adapter_model.safetensors")


def without(source, name):
    def make(artefacts, folder):
        shutil.copytree(artefacts.folder / source, folder)
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return make


def unfinished_run(artefacts, folder):
    folder.mkdir()
    (folder / "recipe.yaml").write_text("verb: sft\n")


def pickled(artefacts, folder):
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"")


def of_another_kind(artefacts, folder):
    shutil.copytree(artefacts.second, folder)
    (folder / "adapter_config.json").write_text('{"peft_type": "IA3"}')


FOLDERS = {
    "another kind": (of_another_kind, "DIR holds a IA3 adapter; lowalign knows LORA, "),
    "absent": (lambda artefacts, folder: None, "DIR is not a folder"),
    "empty": (lambda artefacts, folder: folder.mkdir(), "DIR holds neither an adapter .* nor a model"),
    "unfinished run": (unfinished_run, "the run in DIR has not saved an adapter in .*; finish it with --resume"),
    "no adapter weights": (without("second", "adapter_model.safetensors"), "has no adapter_model.safetensors"),
    "no adapter config": (without("second", "adapter_config.json"), "holds neither an adapter"),
    "no parent": (without("second", "parents"), "parents/0 is not an adapter folder"),
    "parent changed": (changed_weights, "is not the file that was written with lowalign.json"),
    "missing shard": (missing_shard, "model-00001-of-00002.safetensors is missing"),
    "cut weights": (cut_weights, "is cut off"),
    "pickle": (pickled, r"model.safetensors is missing.*files that can hold code \(.bin, .pt\) are not read"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_that_cannot_be_published(hub, artefacts, case, tmp_path):
    make, message = FOLDERS[case]
    make(artefacts, tmp_path / "dir")
    with pytest.raises(UserError, match=message.replace("DIR", str(tmp_path / "dir"))):
        push(tmp_path / "dir", REPO)
    assert hub.requests == []


def test_what_an_interrupted_command_left(hub, artefacts, tmp_path):
    shutil.copytree(artefacts.merged, tmp_path / ".saving-merged")
    with pytest.raises(UserError, match=r"\.saving-merged is what an interrupted command left"):
        push(tmp_path / ".saving-merged", REPO)


@pytest.mark.parametrize("name", ["a/b/c", "me/mo del", "me/..", "-me/x", "datasets/me/x", "me/x.git", ""])
def test_a_malformed_name(hub, artefacts, name):
    with pytest.raises(UserError, match="this is not the name of a repository; write NAMESPACE/NAME"):
        push(artefacts.run, name)
    assert hub.requests == []


def test_a_push_to_a_commit(hub, artefacts):
    with pytest.raises(UserError, match="is a commit; a push goes to a branch"):
        push(artefacts.run, REPO, revision="0" * 40)
    assert hub.requests == []


def test_not_logged_in(hub, artefacts, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match="you are not logged in: log in with `hf auth login`, or set HF_TOKEN"):
        push(artefacts.run, REPO)
    assert hub.requests == []


def test_a_repository_of_others(base_hub, artefacts):
    with pytest.raises(
        UserError, match=r"theirs/x was not pushed: your token has no right .*You don't have the rights"
    ):
        push(artefacts.run, "theirs/x")
    base_hub.repos["theirs/x"] = Repo()
    with pytest.raises(UserError, match="theirs/x was not pushed: your token has no right"):
        push(artefacts.run, "theirs/x")
    assert base_hub.files("theirs/x") == {}


def test_offline(hub, artefacts, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"offline mode is on \(HF_HUB_OFFLINE\)"):
        push(artefacts.run, REPO)
    assert hub.requests == []


def test_the_command_line_honours_the_endpoint(base_hub, artefacts, tmp_path):
    environment = os.environ | {"HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-m", "lowalign", "push", str(artefacts.run), REPO]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "adapter_model.safetensors" in base_hub.files(REPO) and BASE in base_hub.files(REPO)["README.md"].decode()
    assert TOKEN not in done.stdout + done.stderr and TOKEN.encode() not in everything(base_hub, tmp_path)


def test_there_is_no_option_for_a_token(hub, artefacts, capsys):
    assert main(["push", str(artefacts.run), REPO, "--token", TOKEN]) == 1
    said = capsys.readouterr()
    assert "push has no option --token" in said.err and TOKEN not in said.out + said.err
