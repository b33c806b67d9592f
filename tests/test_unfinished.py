"""Directories that appear whole or not at all: what is replaced, what is deleted, and what a crash
leaves.
"""

import contextlib
import os

import pytest

from internvl3_jax.checkpoints import directories
from internvl3_jax.io import unfinished
from internvl3_jax.io.integrity import MANIFEST
from internvl3_jax.io.safe_files import InUse

pytestmark = pytest.mark.smoke


def make(directory, text="new", **options):
    with directories.new_directory(directory, **options) as partial:
        (partial / "params").mkdir()
        (partial / "params" / "x").write_text(text)
        (partial / MANIFEST).write_text('{"format": 1}')
    return directory


def names(directory) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


def test_neighbors_stay(tmp_path):
    for name in ("a.old", "a.partial", ".a.0123abcd.partial", ".a.0123abcd.replaced"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes.txt").write_text("my only copy")
    before = names(tmp_path)
    make(tmp_path / "a")
    make(tmp_path / "a", overwrite=True)
    assert names(tmp_path) == sorted([*before, "a"])
    assert all((tmp_path / name / "notes.txt").exists() for name in before)
    assert names(tmp_path / "a") == ["files.json", MANIFEST, "params"]


def test_what_was_not_made_here_is_not_replaced(tmp_path, monkeypatch):
    mine = make(tmp_path / "mine")
    (tmp_path / "foreign" / "photos").mkdir(parents=True)
    (tmp_path / "foreign" / "photos" / "a.jpg").write_text("x")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(mine)
    (make(tmp_path / "added") / "notes.txt").write_text("x")
    (make(tmp_path / "step") / "training.json").write_text("{}")
    (make(tmp_path / "unlisted") / "files.json").unlink()
    for name, why in {
        "foreign": "was not made by this program",
        "file": "is not a directory",
        "link": "is a symbolic link",
        "added": "holds notes.txt, not written",
        "step": "is a step of a training run",
        "unlisted": "was not made by this program",
    }.items():
        before = sorted(path for path in tmp_path.rglob("*"))
        with pytest.raises(FileExistsError, match=why):
            make(tmp_path / name, overwrite=True)
        assert sorted(path for path in tmp_path.rglob("*")) == before
    for source in (mine, mine / "params", tmp_path):
        with pytest.raises(FileExistsError, match="which is read"):
            make(mine, overwrite=True, sources=[source])
    (tmp_path / "empty").mkdir()
    make(tmp_path / "empty", overwrite=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    make("~/empty", "newer", overwrite=True)
    assert (tmp_path / "empty" / "params" / "x").read_text() == "newer"


@pytest.mark.parametrize("exchange", [True, False])
def test_a_crash_leaves_the_old_or_the_new(exchange, tmp_path, monkeypatch):
    """A crash before each call that renames or deletes, with and without the system's exchange; the
    next attempt cleans up.
    """
    if not exchange:
        monkeypatch.setattr(unfinished, "_renameat2", lambda *arguments: False)
    for crash in range(1, 13):
        target = make(tmp_path / str(crash), "old")
        calls = []

        def counted(function, crash=crash, calls=calls):
            def call(*arguments, **options):
                calls.append(function)
                if len(calls) > crash:
                    raise KeyboardInterrupt
                return function(*arguments, **options)

            return call

        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            for name in ("rename", "unlink", "rmdir"):
                patch.setattr(os, name, counted(getattr(os, name)))
            patch.setattr(unfinished, "_renameat2", counted(unfinished._renameat2))
            patch.setattr(unfinished.Unfinished, "abandon", unfinished.Unfinished._release)
            make(target, overwrite=True)
        unfinished.clean(tmp_path, target.name)
        assert (target / "params" / "x").read_text() in ("old", "new"), crash
        make(target, "last", overwrite=True)
        assert (target / "params" / "x").read_text() == "last"
        assert names(tmp_path) == sorted(str(number) for number in range(1, crash + 1))
    assert len(calls) <= crash  # so the last of them was undisturbed


def test_a_living_process_keeps_what_it_is_filling(tmp_path):
    with (
        pytest.raises(InUse, match=rf"{tmp_path / 'a'} is in use by another process"),
        directories.new_directory(tmp_path / "a") as partial,
    ):
        make(tmp_path / "a")
    assert not partial.exists()
    assert names(tmp_path) == []


def test_a_failure_leaves_no_folders_that_it_made(tmp_path):
    with (
        pytest.raises(ValueError, match="no"),
        directories.new_directory(tmp_path / "a" / "b" / "c"),
    ):
        raise ValueError("no")
    assert names(tmp_path) == []
    with (
        pytest.raises(ValueError, match="no"),
        directories.new_directory(tmp_path / "a" / "b" / "c"),
    ):
        (tmp_path / "a" / "notes.txt").write_text("mine")
        raise ValueError("no")
    assert names(tmp_path / "a") == ["notes.txt"]
