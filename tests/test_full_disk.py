"""What a disk without room costs: one line with the file's name, and nothing of what was complete.

A limit on the size of files replaces the full disk: the same calls fail, also those of C++
libraries, and it needs no rights.
"""

import contextlib
import errno
import gc
import os
import resource

import jax
import numpy as np
import pytest

from convert.__main__ import main as convert
from examples.tiny_digits.recipe import tokenizer as tiny_tokenizer
from internvl3_jax.checkpoints import steps, storage
from internvl3_jax.checkpoints.checkpoint import load
from internvl3_jax.io.checkpoint_paths import latest_step
from internvl3_jax.io.command_line import message
from internvl3_jax.io.safe_files import Lock
from internvl3_jax.io.unfinished import Unfinished
from tests.support.released import random_params, reduce, reduce_processor
from tests.support.tiny_checkpoint import TOKENIZER

pytestmark = pytest.mark.smoke
MODEL = reduce("1b")
OPTIONS = {
    "model": MODEL,
    "processor": reduce_processor(MODEL),
    "files": tiny_tokenizer.build(),
    "extra": {},
}


@contextlib.contextmanager
def room(size: int):
    """Lets no file grow beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_step_without_room_leaves_the_steps_before_it(tmp_path, capfd):
    params = random_params(MODEL, 1, np.float32)
    steps.save_training(tmp_path, 1, params, params, **OPTIONS)
    capfd.readouterr()
    with room(40_000), pytest.raises(OSError, match="2 could not be saved .*earlier steps"):
        steps.save_training(tmp_path, 2, params, params, **OPTIONS)
    assert os.listdir(tmp_path / "checkpoints") == ["1"]
    gc.collect()  # asyncio complains when its tasks are deleted
    assert "Traceback" not in capfd.readouterr().err
    steps.save_training(tmp_path, 2, params, params, **OPTIONS)
    assert latest_step(tmp_path) == 2


def test_a_failed_save_is_removed_when_nothing_is_written_to_it_any_more(tmp_path, monkeypatch):
    """The writes of the optimizer state continue while those of the parameters have failed."""

    def start(path, tree):
        def wait():
            if path.name == "params":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            (path / "d").mkdir(parents=True)

        return wait

    monkeypatch.setattr(storage, "start_saving", start)
    with pytest.raises(OSError, match="No space left on device"):
        steps.save_training(tmp_path, 2, {}, {}, **OPTIONS)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("layout", [(), ("--to", "hf")])
def test_a_conversion_without_room_is_one_line_and_leaves_nothing(layout, tmp_path, capfd):
    target = tmp_path / "models" / "digits"
    with room(1_000_000):
        assert convert([str(TOKENIZER), str(target), *layout]) == 1
    said = [line for line in capfd.readouterr().err.splitlines() if line]
    assert said == [f"error: {target}: File too large"]
    assert not any(tmp_path.iterdir())
    assert convert([str(TOKENIZER), str(target), *layout]) == 0
    assert jax.tree.leaves(load(target).params)


def test_a_lock_without_room_is_named_and_not_held(tmp_path):
    path = tmp_path / "run.lock"
    with room(0), pytest.raises(OSError) as caught:
        Lock(path, "the run").acquire()
    assert message(caught.value) == f"{path}: cannot be written (File too large)"
    with Lock(path, "the run"):
        pass


def test_a_directory_that_cannot_be_begun_leaves_nothing(tmp_path):
    with room(0), pytest.raises(OSError, match="cannot be written"):
        Unfinished(tmp_path / "new" / "a", "0b", True)
    assert not any(tmp_path.iterdir())
