"""Checkpoints of a training run: saved whole or not at all, the newest whole one counts, and one
flipped bit is found.
"""

import logging
import re
import shutil
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from examples.tiny_digits.recipe import tokenizer as tiny_tokenizer
from internvl3_jax.checkpoints import steps, storage
from internvl3_jax.checkpoints.checkpoint import load
from internvl3_jax.config import MeshConfig
from internvl3_jax.io import checkpoint_paths
from internvl3_jax.io.integrity import Damaged
from internvl3_jax.parallel import sharding
from tests.support.released import convert, random_params, reduce, reduce_processor, same_tensors
from tests.support.saved_steps import flip, largest, leaves

pytestmark = pytest.mark.smoke
MODEL = reduce("1b")

OPTIONS = {"model": MODEL, "processor": reduce_processor(MODEL), "files": tiny_tokenizer.build()}


def training_state(seed: int):
    params = jax.tree.map(jnp.asarray, random_params(MODEL, seed, np.float32))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    opt_state = jax.tree.map(lambda leaf: leaf + seed, optimizer.init(params))
    return params, opt_state


def test_training_state_comes_back_and_opens_as_a_model(tmp_path):
    params, opt_state = training_state(3)
    extra = {"batches": {"epoch": 1, "cursor": [4, 5]}, "seconds": 1.5}
    data = {"0": {"cursor": 7, "waiting": "3 5"}, "1": {"cursor": 9, "waiting": ""}}
    steps.save_training(tmp_path, 20, params, opt_state, extra=extra, data=data, **OPTIONS)
    abstract = jax.eval_shape(lambda: training_state(0))
    assert checkpoint_paths.latest_step(tmp_path) == 20
    restored, restored_state, restored_extra = steps.restore_training(tmp_path, 20, *abstract)
    same_tensors(leaves(restored), leaves(params))
    assert jax.tree.structure(restored_state) == jax.tree.structure(opt_state)
    for one, other in zip(jax.tree.leaves(restored_state), jax.tree.leaves(opt_state), strict=True):
        np.testing.assert_array_equal(one, other)
    assert restored_extra == {"step": 20, **extra, "data": data}
    for path in (tmp_path, tmp_path / "checkpoints", tmp_path / "checkpoints" / "20"):
        same_tensors(leaves(load(path).params), leaves(params))
    convert(checkpoint_paths.resolve_checkpoint(tmp_path), tmp_path / "hf", to="hf", verify=True)
    same_tensors(leaves(load(tmp_path / "hf").params), leaves(params))


def test_newest_complete_step_counts_and_old_ones_go(tmp_path, caplog):
    for step in (9, 10, 100):
        steps.save_training(tmp_path, step, *training_state(step), extra={}, keep=2, **OPTIONS)
    folder = tmp_path / "checkpoints"
    assert sorted(entry.name for entry in folder.iterdir()) == ["10", "100"]
    (folder / "200.partial" / "params").mkdir(parents=True)
    (folder / "300").mkdir()
    with caplog.at_level(logging.WARNING):
        assert checkpoint_paths.latest_step(tmp_path) == 100
    assert "200.partial" in caplog.text
    assert "300: not a complete checkpoint" in caplog.text
    with pytest.raises(
        FileNotFoundError, match="300 is not a complete checkpoint; the newest of this run is 100"
    ):
        steps.restore_training(tmp_path, 300, None, None)
    assert checkpoint_paths.latest_step(tmp_path / "elsewhere") is None


def test_damage_to_a_step_is_named(tmp_path, caplog):
    """A file that is gone, shorter or longer, or a list of files that is: each is seen without
    reading the arrays.
    """
    for step in (1, 2):
        steps.save_training(tmp_path, step, *training_state(step), extra={}, **OPTIONS)
    directory = tmp_path / "checkpoints" / "2"
    largest = max(
        (path for path in directory.rglob("*") if path.is_file()),
        key=lambda path: path.stat().st_size,
    )
    for name, damaged in (
        ("training.json", None),
        (largest.relative_to(directory), b"x"),
        ("files.json", b"{"),
    ):
        path = directory / name
        whole = path.read_bytes()
        path.unlink() if damaged is None else path.write_bytes(damaged)
        caplog.clear()
        assert checkpoint_paths.latest_step(tmp_path) == 1
        assert f"ignoring {directory}: {name} " in caplog.text
        path.write_bytes(whole)
    assert checkpoint_paths.latest_step(tmp_path) == 2


def test_one_flipped_bit_anywhere_in_a_step_is_found_before_it_is_used(tmp_path, caplog):
    for step in (1, 2):
        steps.save_training(
            tmp_path, step, *training_state(step), extra={}, data={"0": {"row": 3}}, **OPTIONS
        )
    directory = tmp_path / "checkpoints" / "2"
    arrays = (
        largest(directory / "params"),
        largest(directory / "opt_state"),
        directory / "params" / "state" / "_METADATA",
    )
    for path in (
        *arrays,
        *(
            directory / name
            for name in ("training.json", "data/0.json", "merges.txt", checkpoint_paths.MANIFEST)
        ),
    ):
        whole = flip(path)
        caplog.clear()
        assert checkpoint_paths.latest_step(tmp_path) == 1
        assert f"ignoring {directory}: {path.relative_to(directory).as_posix()} " in caplog.text
        assert f"{load(tmp_path).directory}".endswith("/1")
        with pytest.raises(ValueError, match=re.escape(path.name)):
            load(directory)
        path.write_bytes(whole)
    (directory / "files.json").unlink()
    with pytest.raises(Damaged, match="files.json is missing"):
        load(directory)
    assert checkpoint_paths.latest_step(tmp_path, "none") == 2
    flip(largest(tmp_path / "checkpoints" / "1"))
    with pytest.raises(Damaged, match="every step is damaged"):
        checkpoint_paths.latest_step(tmp_path)
    # What is saved in a damaged step's place does not delete it.
    steps.save_training(tmp_path, 2, *training_state(5), extra={}, **OPTIONS)
    assert checkpoint_paths.latest_step(tmp_path) == 2
    assert sorted(entry.name.split(".")[-1] for entry in directory.parent.iterdir()) == [
        "1",
        "2",
        "damaged",
    ]


def test_a_copy_of_another_step_does_not_count(tmp_path, caplog):
    for step in (2, 4):
        steps.save_training(tmp_path, step, *training_state(step), extra={}, **OPTIONS)
    folder = tmp_path / "checkpoints"
    shutil.rmtree(folder / "4")
    for copy in ("4", "99"):
        shutil.copytree(folder / "2", folder / copy)
    assert checkpoint_paths.latest_step(tmp_path) == 2
    for copy in ("4", "99"):
        assert f"ignoring {folder / copy}: training.json says that this is step 2" in caplog.text
        with pytest.raises(Damaged, match=rf"checkpoints/{copy} is damaged: .* this is step 2"):
            load(folder / copy)
    # The step itself may be kept anywhere else under any name.
    shutil.move(folder / "4", tmp_path / "99")
    same_tensors(leaves(load(tmp_path / "99").params), leaves(load(folder / "2").params))
    # A new step 99 is saved beside the copy, which is not deleted.
    steps.save_training(tmp_path, 99, *training_state(5), extra={}, **OPTIONS)
    assert checkpoint_paths.latest_step(tmp_path) == 99
    assert sorted(entry.name.split(".")[-1] for entry in folder.iterdir()) == ["2", "99", "damaged"]


def test_old_steps_are_deleted_but_never_the_newest_nor_what_others_put_there(tmp_path, caplog):
    for step in (1, 2, 3, 4):
        steps.save_training(tmp_path, step, *training_state(step), extra={}, **OPTIONS)
    folder = tmp_path / "checkpoints"
    (folder / "1" / "notes.txt").write_text("mine")
    (folder / "5").mkdir()
    (folder / "5" / "notes.txt").write_text("mine")
    largest(folder / "2" / "params").write_bytes(b"")
    steps.delete_old_steps(tmp_path, 0)
    assert sorted(entry.name for entry in folder.iterdir()) == ["1", "2", "4", "5"]
    assert (folder / "1" / "notes.txt").exists()
    assert "1 is not deleted: it holds notes.txt" in caplog.text
    assert "2 is damaged" in caplog.text


def test_training_continues_while_a_step_is_saved(tmp_path):
    params, opt_state = training_state(1)
    before = jax.tree.map(lambda leaf: np.array(leaf, copy=True), params)
    finish = steps.start_saving_training(tmp_path, 1, params, opt_state, extra={}, **OPTIONS)
    assert checkpoint_paths.latest_step(tmp_path) is None
    update = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf * 0 - 1, tree), donate_argnums=0)
    params, opt_state = update(params), update(opt_state)
    jax.block_until_ready((params, opt_state))
    finish()
    same_tensors(leaves(load(tmp_path).params), leaves(before))


def test_a_save_says_when_its_writes_are_done(tmp_path, monkeypatch):
    """`done` never waits; a step becomes complete with the call, and a failed write comes out of
    both.
    """
    written, started = threading.Event(), storage.start_saving

    def slow(path, tree):
        wait = started(path, tree)
        return lambda: (written.wait(60), wait())

    monkeypatch.setattr(storage, "start_saving", slow)
    saving = steps.start_saving_training(tmp_path, 1, *training_state(1), extra={}, **OPTIONS)
    assert not saving.done()
    written.set()
    until(saving.done)
    assert checkpoint_paths.latest_step(tmp_path) is None
    saving()
    saving()
    assert saving.done()
    assert checkpoint_paths.latest_step(tmp_path) == 1

    def fails(path, tree):
        def wait():
            raise OSError(28, "No space left on device", str(path))

        return wait

    monkeypatch.setattr(storage, "start_saving", fails)
    saving = steps.start_saving_training(tmp_path, 2, *training_state(1), extra={}, **OPTIONS)
    with pytest.raises(OSError, match="No space left"):
        until(saving.done)
    with pytest.raises(OSError, match="No space left"):
        saving()
    assert checkpoint_paths.latest_step(tmp_path) == 1


def until(condition) -> None:
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("still not after a minute")


@pytest.mark.parametrize("devices", [1, 8])
def test_arrays_beyond_the_limit_of_a_read(monkeypatch, tmp_path, devices):
    """Orbax refuses an array, or a device's shard of it, that is as large as its limit."""
    monkeypatch.setattr(storage, "LARGEST_CHUNK", 1000)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:devices])
    rows = jax.NamedSharding(mesh, jax.P("fsdp"))
    tree = {"a": jax.device_put(np.arange(4096.0, dtype=np.float32).reshape(64, 64), rows)}
    storage.start_saving(tmp_path / "tree", tree)()
    target = {"a": jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=rows)}
    np.testing.assert_array_equal(storage.load_tree(tmp_path / "tree", target)["a"], tree["a"])
