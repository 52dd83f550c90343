"""The hash of the weight files, and when it is computed again."""

import hashlib
import os

import pytest

from lowalign.model.base import identity


@pytest.fixture
def hashed(tmp_path, monkeypatch):
    """file -> its hash; `hashed.files` counts those that were read."""
    monkeypatch.setenv("LOWALIGN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(identity, "SETTLED", -1.0)
    files, plain = [], identity.file_hash
    monkeypatch.setattr(identity, "file_hash", lambda file: files.append(file) or plain(file))

    def weights_hash(file):
        assert identity._weights_hash(file) == hashlib.sha256(file.read_bytes()).hexdigest()

    weights_hash.files = files
    return weights_hash


def test_a_file_is_read_once(hashed, tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"one")
    hashed(file), hashed(file)
    assert len(hashed.files) == 1


def test_a_changed_file_is_read_again(hashed, tmp_path):
    """Also one of the same size whose modification time is set back, as copying tools do."""
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"one")
    hashed(file)
    before = file.stat()
    file.write_bytes(b"two")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    hashed(file)
    (tmp_path / "other").write_bytes(b"six")
    os.replace(tmp_path / "other", file)
    hashed(file)
    assert len(hashed.files) == 3


def test_a_fresh_file_is_not_kept(hashed, tmp_path, monkeypatch):
    monkeypatch.setattr(identity, "SETTLED", 60.0)
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"one")
    hashed(file), hashed(file)
    assert len(hashed.files) == 2


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"file": 1}'])
def test_a_damaged_entry_is_no_error(hashed, tmp_path, damage):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"one")
    hashed(file)
    (entry,) = (tmp_path / "cache" / "weights").iterdir()
    entry.write_text(damage)
    hashed(file)
    assert len(hashed.files) == 2


def test_a_cache_that_cannot_be_written_is_no_error(hashed, tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file in the place of the folder")
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"one")
    hashed(file)
