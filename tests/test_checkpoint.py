"""Checkpoint directories: saved whole or not at all, opened from every place, and refused when they
contradict themselves.
"""

import dataclasses
import itertools
import json
import logging
import os
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
from internvl3_jax.checkpoints.checkpoint import load, save_checkpoint
from internvl3_jax.checkpoints.fingerprint import FingerprintError
from internvl3_jax.config import MeshConfig
from internvl3_jax.io import checkpoint_paths
from internvl3_jax.io.integrity import Damaged
from internvl3_jax.model.internvl import InternVL
from internvl3_jax.parallel import sharding
from tests.support.released import (
    convert,
    random_params,
    reduce,
    reduce_processor,
    same_tensors,
    write_released,
)

pytestmark = pytest.mark.smoke
MODEL = reduce("1b")


@pytest.fixture
def saved(tmp_path):
    save_checkpoint(
        tmp_path / "saved",
        random_params(MODEL),
        MODEL,
        reduce_processor(MODEL),
        tiny_tokenizer.build(),
    )
    return tmp_path / "saved"


def leaves(params) -> dict:
    return {path: np.asarray(leaf) for path, leaf in storage.by_path(params).items()}


def batch_of(model):
    tokens = np.array([[5] + [model.image_token_id] * model.tokens_per_tile + [7]], np.int32)
    positions = np.arange(tokens.size, dtype=np.int32)[None] * 256
    tiles = np.random.default_rng(0).integers(0, 256, (1, 1, 16, 16, 3), dtype=np.uint8)
    return {
        "tokens": tokens,
        "positions": positions,
        "segments": np.ones_like(tokens),
        "tiles": tiles,
    }


def test_saved_checkpoint_opens_as_it_was(saved):
    opened = load(saved)
    same_tensors(leaves(opened.params), leaves(random_params(MODEL)))
    assert (opened.config, opened.processor) == (MODEL, reduce_processor(MODEL))
    assert opened.model.dtype == jnp.bfloat16
    assert opened.tokenizer.files() == tiny_tokenizer.build()
    assert opened.directory == saved
    with pytest.raises(FileExistsError, match="saved exists"):
        save_checkpoint(saved, opened.params, MODEL, opened.processor, opened.tokenizer.files())


def test_every_kind_of_directory_computes_the_same_logits(saved, tmp_path):
    convert(saved, tmp_path / "hf", to="hf")
    convert(saved, tmp_path / "internvl", to="internvl")
    logits, apply = [], jax.jit(InternVL(MODEL).apply)
    for directory in (saved, tmp_path / "hf", tmp_path / "internvl"):
        opened = load(directory, dtype="float32")
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(opened.params))
        logits.append(apply({"params": opened.params}, batch_of(MODEL)))
    assert logits[0].shape == (1, 6, MODEL.language.vocab_size)
    np.testing.assert_array_equal(logits[0], logits[1])
    np.testing.assert_array_equal(logits[0], logits[2])


def test_parameters_are_read_to_where_a_mesh_puts_them(saved, tmp_path):
    """From each kind of directory; the vocabulary's padding included."""
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    convert(saved, tmp_path / "hf", to="hf")
    convert(saved, tmp_path / "internvl", to="internvl")
    whole = load(saved).params
    places = sharding.param_shardings(whole, mesh)
    for directory in (saved, tmp_path / "hf", tmp_path / "internvl"):
        opened = load(directory, mesh=mesh)
        assert jax.tree.map(lambda leaf: leaf.sharding, opened.params) == places
        jax.tree.map(np.testing.assert_array_equal, opened.params, whole)
    assert len({str(place.spec) for place in jax.tree.leaves(places)}) >= 4


# --- directories that cannot be opened -----------------------------------------------------------


def test_a_wrong_directory_says_what_was_expected(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load(tmp_path / "nothing")
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(
        FileNotFoundError,
        match=r"internvl3_jax.json and params/.*config.json and \*.safetensors.*photo.jpg",
    ):
        load(tmp_path)

    def unreachable(name, allow_patterns, **options):
        assert name == "OpenGVLab/InternVL3-1B"
        assert "*.safetensors" in allow_patterns
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(FileNotFoundError, match="could not be downloaded from the hub: no network"):
        load("OpenGVLab/InternVL3-1B")


def test_a_hub_id_is_downloaded_and_opened(tmp_path, monkeypatch):
    released = write_released(tmp_path / "snapshot", MODEL, "internvl")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **options: str(released))
    same_tensors(leaves(load("owner/model").params), leaves(random_params(MODEL)))


def test_damaged_description_is_named(saved):
    path = saved / checkpoint_paths.MANIFEST
    text = path.read_text()
    for damaged, named in (
        (text[:-20], "damaged"),
        (text.replace('"format": 1', '"format": 99'), "format 99"),
        (
            text.replace('"num_kv_heads"', '"num_kv_head"'),
            "unknown field 'num_kv_head'; did you mean 'num_kv_heads'",
        ),
        (
            text.replace('"intermediate_size": 38', '"intermediate_size": 40'),
            r"language/layers/up/kernel: stored \(3, 56, 38\)",
        ),
    ):
        path.write_text(damaged)
        with pytest.raises(ValueError, match=named):
            load(saved)


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
def test_other_weights_beside_a_checkpoint_are_ignored_with_a_word(name, saved, caplog):
    (saved / name).write_bytes(b"x")
    same_tensors(leaves(load(saved).params), leaves(random_params(MODEL)))
    assert f"{saved}: reading params/ and ignoring {name}" in caplog.text


# --- fingerprint ---------------------------------------------------------------------------------

CHANGES = {
    "max_tiles": lambda values: values["processor"].update(max_tiles=6),
    "tiles": lambda values: values["processor"].update(tiles="shared"),
    "max_total_tiles": lambda values: values["processor"].update(max_total_tiles=64),
    "delta": lambda values: values["processor"].update(delta=64),
    "frame_label": lambda values: values["processor"].update(frame_label="Frame{}: "),
    "apply_exif": lambda values: values["processor"].update(apply_exif=True),
    "system_text": lambda values: values["processor"].update(system_message="Be brief."),
    "stop_ids": lambda values: values["processor"].update(stop_tokens=["<|endoftext|>"]),
    "mean": lambda values: values["model"]["vision"].update(mean=[0.5, 0.5, 0.5]),
    "dtype": lambda values: values["fingerprint"].update(dtype="float32"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_fingerprint_names_what_differs(name, saved):
    path = saved / checkpoint_paths.MANIFEST
    values = json.loads(path.read_text())
    CHANGES[name](values)
    path.write_text(json.dumps(values))
    with pytest.raises(
        FingerprintError, match=rf"(?s)\n  {name}: made with .*--accept_fingerprint"
    ) as error:
        load(saved)
    assert str(error.value).count("made with") <= 3
    load(saved, accept_fingerprint=True)


def test_a_checkpoint_from_before_the_tile_rule_has_the_released_models_rule(saved):
    path = saved / checkpoint_paths.MANIFEST
    values = json.loads(path.read_text())
    for part, name in itertools.product(("processor", "fingerprint"), ("tiles", "max_total_tiles")):
        del values[part][name]
    del values["listed"]
    path.write_text(json.dumps(values))
    (saved / "files.json").unlink()
    assert load(saved).processor.tiles == "per image"
    values["processor"]["tiles"] = "shared"  # its owner knows what it was trained for
    path.write_text(json.dumps(values))
    assert load(saved).processor.tiles == "shared"


def test_fingerprint_notices_another_tokenizer(saved, tmp_path):
    convert(saved, tmp_path / "hf", to="hf")
    for directory in (saved, tmp_path / "hf"):
        version, *merges = (directory / "merges.txt").read_text().splitlines(keepends=True)
        (directory / "merges.txt").write_text("".join([version, *reversed(merges)]))
        with pytest.raises(FingerprintError, match="tokenizer_probe"):
            load(directory)
        added = json.loads((directory / "added_tokens.json").read_text())
        settings = json.loads((directory / "tokenizer_config.json").read_text())
        added["<IMG_CONTEXT>"], added["</img>"] = added["</img>"], added["<IMG_CONTEXT>"]
        settings.pop("added_tokens_decoder")
        (directory / "added_tokens.json").write_text(json.dumps(added))
        (directory / "tokenizer_config.json").write_text(json.dumps(settings))
        with pytest.raises(ValueError, match="<IMG_CONTEXT>"):
            load(directory, accept_fingerprint=True)


# --- training runs -------------------------------------------------------------------------------

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


def flip(path) -> bytes:
    """Changes one bit in the middle of a file; returns what it was."""
    whole = path.read_bytes()
    content = bytearray(whole)
    content[len(content) // 2] ^= 0x40
    path.write_bytes(content)
    return whole


def largest(directory):
    return max(
        (path for path in directory.rglob("*") if path.is_file()),
        key=lambda path: path.stat().st_size,
    )


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


def test_verification_has_levels(saved):
    whole = flip(largest(saved / "params"))
    with pytest.raises(Damaged, match=r"params/.* has other content than was written"):
        load(saved)
    load(saved, verify="sizes", allow_nonfinite=True)
    largest(saved / "params").write_bytes(whole)
    (saved / "params" / "more").write_bytes(b"")
    with pytest.raises(Damaged, match="params/more was not written with it"):
        load(saved, verify="sizes")
    load(saved, verify="none")
    with pytest.raises(ValueError, match="verify is 'fast'; expected one of full, sizes, none"):
        load(saved, verify="fast")
    (saved / "params" / "more").unlink()
    # A list of sizes alone, as it was written earlier, and none at all.
    listed = json.loads((saved / "files.json").read_text())["files"]
    (saved / "files.json").write_text(
        json.dumps({name: entry["bytes"] for name, entry in listed.items()})
    )
    load(saved)
    values = json.loads((saved / checkpoint_paths.MANIFEST).read_text())
    del values["listed"]
    (saved / checkpoint_paths.MANIFEST).write_text(json.dumps(values))
    (saved / "files.json").unlink()
    load(saved)
    os.mkfifo(saved / "params" / "pipe")
    with pytest.raises(Damaged, match="params/pipe is not a regular file"):
        load(saved)


WRONG_DESCRIPTIONS = {
    "a list": b"[]",
    "deep": b'{"format": 1, "model": ' + b"[" * 100_000,
    "hashes": {"hashes": ["x"]},
    "a hash": {"hashes": {"x": 3}},
    "fingerprint": {"fingerprint": "x"},
    "model": {"model": 3},
    "vision": {"model": {"vision": None}},
    "processor": {"processor": None},
    "base": {"base": {"path": 3}},
    "format": {"format": "1"},
    "unknown": {"colour": 3},
}


@pytest.mark.parametrize("name", WRONG_DESCRIPTIONS)
def test_wrong_types_in_a_description_are_named(name, saved):
    path, wrong = saved / checkpoint_paths.MANIFEST, WRONG_DESCRIPTIONS[name]
    content = (
        wrong
        if isinstance(wrong, bytes)
        else json.dumps(json.loads(path.read_text()) | wrong).encode()
    )
    path.write_bytes(content)
    for accept in (False, True):
        with pytest.raises(ValueError, match=re.escape(checkpoint_paths.MANIFEST)):
            load(saved, accept_fingerprint=accept)


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


def test_parameters_that_are_not_finite_are_refused(tmp_path):
    params = random_params(MODEL)
    kernel = params["language"]["layers"]["up"]["kernel"]
    kernel[0, 0, :3] = np.nan
    save_checkpoint(
        tmp_path / "saved", params, MODEL, reduce_processor(MODEL), tiny_tokenizer.build()
    )
    with pytest.raises(
        ValueError,
        match=rf"NaN or infinite values in language/layers/up/kernel \(3 of {kernel.size:,}\)",
    ):
        load(tmp_path / "saved")
    load(tmp_path / "saved", allow_nonfinite=True)


NAMES = ["a [v2]", "{x}", "50% #1?", "st*r", "ünï 书", "~x"]


@pytest.mark.parametrize("name", NAMES)
def test_directories_may_have_any_name(name, tmp_path):
    """Saved as a whole, and leaf by leaf."""
    released = write_released(tmp_path / name / "released", MODEL, "internvl")
    convert(released, tmp_path / name / "ours")
    save_checkpoint(
        tmp_path / name / "saved",
        random_params(MODEL),
        MODEL,
        reduce_processor(MODEL),
        tiny_tokenizer.build(),
    )
    for directory in (released, tmp_path / name / "ours", tmp_path / name / "saved"):
        same_tensors(leaves(load(directory).params), leaves(random_params(MODEL)))


def test_a_backslash_is_refused_before_anything_is_done(tmp_path):
    with pytest.raises(ValueError, match="backslash"):
        save_checkpoint(tmp_path / "a\\b", {}, MODEL, reduce_processor(MODEL), {})
    with pytest.raises(ValueError, match="backslash"):
        checkpoint_paths.latest_step(tmp_path / "a\\b")
    assert not any(tmp_path.iterdir())


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


def test_training_goes_on_while_a_step_is_saved(tmp_path):
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


def test_interrupted_save_leaves_the_old_checkpoint(saved, monkeypatch):
    def fails(path, tree):
        raise OSError("disk full")

    monkeypatch.setattr(storage, "start_saving", fails)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(
            saved,
            random_params(MODEL),
            MODEL,
            reduce_processor(MODEL),
            tiny_tokenizer.build(),
            overwrite=True,
        )
    assert [entry.name for entry in saved.parent.iterdir()] == ["saved"]
    load(saved)


def test_model_carries_its_configuration(saved):
    opened = load(saved)
    assert opened.model == InternVL(MODEL, jnp.dtype(jnp.bfloat16))
    assert dataclasses.asdict(opened.model.config) == dataclasses.asdict(MODEL)
