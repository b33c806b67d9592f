"""Files that are replaced whole, locks that die with their holder, and the one rule of deletion."""

import multiprocessing
import os
import signal

import pytest

from internvl3_jax.io import safe_files
from internvl3_jax.io.safe_files import InUse, Lock
from internvl3_jax.io.terminal import excerpt, one_line, printable

pytestmark = pytest.mark.smoke


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    safe_files.replace(path, "old")
    path.chmod(0o640)
    safe_files.replace(path, b"new")
    assert path.read_bytes() == b"new" and path.stat().st_mode & 0o777 == 0o640

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        OSError, match=r"cannot be written \(No space left on device\).*config.json"
    ):
        safe_files.replace(path, b"newer")
    assert path.read_bytes() == b"new" and [entry.name for entry in tmp_path.iterdir()] == [
        "config.json"
    ]


def test_a_link_stays_a_link_when_its_file_is_replaced(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "store/file")
    safe_files.replace(tmp_path / "link", "x")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "store/file").read_text() == "x"


def _hold(path, ready):
    with Lock(path, "the run"):
        ready.set()
        signal.pause()


def test_a_lock_names_its_holder_and_dies_with_it(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    holder = context.Process(target=_hold, args=(tmp_path / "lock", ready))
    holder.start()
    assert ready.wait(60)
    with pytest.raises(
        InUse, match=rf"the run is in use by another process \(process {holder.pid} on "
    ):
        Lock(tmp_path / "lock", "the run").acquire()
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    with Lock(tmp_path / "lock", "the run"):
        with pytest.raises(InUse, match=f"process {os.getpid()} on "):
            Lock(tmp_path / "lock", "the run").acquire()
    with Lock(tmp_path / "lock", "the run"):
        pass


def test_only_marked_directories_are_deleted(tmp_path):
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    for directory in (theirs, ours):
        (directory / "deep/er").mkdir(parents=True)
        (directory / "deep/er/file").write_text("x")
    safe_files.mark_own(ours)
    (tmp_path / "link").symlink_to(ours)
    (ours / "out").symlink_to(theirs)
    assert not safe_files.remove_own(theirs) and (theirs / "deep/er/file").exists()
    assert not safe_files.remove_own(tmp_path / "link") and not safe_files.remove_own(
        tmp_path / "nothing"
    )
    assert safe_files.remove_own(ours) and not ours.exists() and (theirs / "deep/er/file").exists()


def test_text_cannot_drive_a_terminal():
    assert printable("a\x1b[2J\x9b\u202e\ud800\n\tb书") == "a\\x1b[2J\\x9b\\u202e\\ud800\n\tb书"
    assert one_line("a\nb") == "a\\nb"
    assert excerpt("x" * 1000) == f"'{'x' * 96}..." and excerpt({"a": "\x07"}) == "{'a': '\\x07'}"


def test_a_file_that_is_no_lock_is_left_as_it_is(tmp_path):
    path = tmp_path / "some.lock"
    path.write_bytes(b"notes")
    with (
        pytest.raises(safe_files.FileError, match="some.lock: is not a lock file of this program"),
        safe_files.Lock(path, "it"),
    ):
        pass
    assert path.read_bytes() == b"notes"
    path.write_bytes(b'{"hos')  # its holder was killed while it wrote
    for _ in range(2):
        with safe_files.Lock(path, "it"):
            pass
    assert path.read_bytes().count(b"host") == 1
    path.unlink()
    for make in (os.mkfifo, os.mkdir, lambda link: link.symlink_to(tmp_path / "elsewhere")):
        make(path)
        with pytest.raises(safe_files.FileError, match="some.lock: is not a lock file of this pr"):
            safe_files.Lock(path, "it").acquire()
        path.rmdir() if path.is_dir() else path.unlink()
    assert not any(tmp_path.iterdir())
