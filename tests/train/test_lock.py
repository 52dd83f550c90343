"""One process at a time works in a run's folder."""

import errno
import os
import resource
import signal
from pathlib import Path

import pytest

from lowalign.errors import UserError
from lowalign.train.lock import in_use, lock_folder
from tests.train import toy


def _run(out: Path) -> None:
    try:
        toy.run(out)
    except UserError as error:
        (out / "message").write_text(str(error))
        os._exit(1)


def _hold_and_die(out: Path) -> None:
    with lock_folder(out):
        os.kill(os.getpid(), signal.SIGKILL)


def _hold_on_a_full_disk(out: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with lock_folder(out):
        os._exit(0 if (out / ".lock").exists() and not (out / ".lock.pid").read_text() else 1)


def test_a_second_process_is_refused_with_the_first_ones_pid(tmp_path):
    with lock_folder(tmp_path), lock_folder(tmp_path):  # one process may nest it
        assert toy.in_child(_run, tmp_path) == 1
        message = (tmp_path / "message").read_text()
        assert message == f"{tmp_path} is in use by process {os.getpid()}; wait for it, or choose another --out"
        assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", ".lock.pid", "message"]
    assert toy.in_child(_run, tmp_path) == 0


def test_nothing_is_left_but_the_lock_file(tmp_path):
    with lock_folder(tmp_path / "run"):
        pass
    assert [p.name for p in (tmp_path / "run").iterdir()] == [".lock"]


def test_without_the_pid_another_process_is_named(tmp_path):
    with lock_folder(tmp_path):
        (tmp_path / ".lock.pid").unlink()
        assert toy.in_child(_run, tmp_path) == 1
    assert "is in use by another process; wait" in (tmp_path / "message").read_text()


def test_a_kill_frees_the_folder(tmp_path):
    assert toy.in_child(_hold_and_die, tmp_path) == -signal.SIGKILL
    with lock_folder(tmp_path):
        assert (tmp_path / ".lock.pid").read_text() == str(os.getpid())


def test_in_use_says_whether_a_process_works_there(tmp_path):
    assert not in_use(tmp_path / "none") and not in_use(tmp_path)
    with lock_folder(tmp_path):
        assert in_use(tmp_path)
        (tmp_path / ".lock.pid").write_text("")  # a full disk
        assert not in_use(tmp_path)
    assert toy.in_child(_hold_and_die, tmp_path) == -signal.SIGKILL
    assert (tmp_path / ".lock.pid").exists() and not in_use(tmp_path)
    # The killed process's id is given to another: this one, which began after the file was written.
    (tmp_path / ".lock.pid").write_text(str(os.getpid()))
    os.utime(tmp_path / ".lock.pid", (0, 0))
    assert not in_use(tmp_path)


def test_an_error_frees_the_folder(tmp_path):
    with pytest.raises(ZeroDivisionError), lock_folder(tmp_path):
        raise ZeroDivisionError
    assert toy.in_child(_run, tmp_path) == 0


def test_a_full_disk_does_not_prevent_locking(tmp_path):
    assert toy.in_child(_hold_on_a_full_disk, tmp_path) == 0


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS])
def test_a_file_system_without_locks(tmp_path, monkeypatch, code):
    def flock(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(UserError, match=f"cannot be the folder of a run: {os.strerror(code)}"), lock_folder(tmp_path):
        pass


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/run cannot be the folder of a run: Not a directory"):
        toy.run(tmp_path / "file" / "run")
