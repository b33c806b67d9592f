"""Checkpoint directories: saved whole or not at all, opened from every place, and refused when they contradict themselves."""

import dataclasses
import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from released import convert, random_params, reduce, reduce_processor, same_tensors, write_released

from internvl3_jax import checkpoint, find, sharding, storage
from internvl3_jax.checkpoint import load, save_checkpoint
from internvl3_jax.config import MeshConfig
from internvl3_jax.data import tiny_tokenizer
from internvl3_jax.fingerprint import FingerprintError
from internvl3_jax.model import InternVL

pytestmark = pytest.mark.smoke
MODEL = reduce("1b")


@pytest.fixture
def saved(tmp_path):
    save_checkpoint(tmp_path / "saved", random_params(MODEL), MODEL, reduce_processor(MODEL), tiny_tokenizer.build())
    return tmp_path / "saved"


def leaves(params) -> dict:
    return {path: np.asarray(leaf) for path, leaf in storage.by_path(params).items()}


def batch_of(model):
    tokens = np.array([[5] + [model.image_token_id] * model.tokens_per_tile + [7]], np.int32)
    positions = np.arange(tokens.size, dtype=np.int32)[None] * 256
    tiles = np.random.default_rng(0).integers(0, 256, (1, 1, 16, 16, 3), dtype=np.uint8)
    return {"tokens": tokens, "positions": positions, "segments": np.ones_like(tokens), "tiles": tiles}


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


# --- directories that cannot be opened ----------------------------------------------------------------------------------------


def test_a_wrong_directory_says_what_was_expected(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load(tmp_path / "nothing")
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(FileNotFoundError, match=r"internvl3_jax.json and params/.*config.json and \*.safetensors.*photo.jpg"):
        load(tmp_path)

    def unreachable(name, allow_patterns):
        assert name == "OpenGVLab/InternVL3-1B"
        assert "*.safetensors" in allow_patterns
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(FileNotFoundError, match="could not be downloaded from the hub: no network"):
        load("OpenGVLab/InternVL3-1B")


def test_a_hub_id_is_downloaded_and_opened(tmp_path, monkeypatch):
    released = write_released(tmp_path / "snapshot", MODEL, "internvl")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, allow_patterns: str(released))
    same_tensors(leaves(load("owner/model").params), leaves(random_params(MODEL)))


def test_damaged_description_is_named(saved):
    path = saved / find.MANIFEST
    text = path.read_text()
    for damaged, named in (
        (text[:-20], "damaged"),
        (text.replace('"format": 1', '"format": 99'), "format 99"),
        (text.replace('"num_kv_heads"', '"num_kv_head"'), "unknown field 'num_kv_head'; did you mean 'num_kv_heads'"),
        (
            text.replace('"intermediate_size": 38', '"intermediate_size": 40'),
            r"language/layers/up/kernel: stored \(3, 56, 38\)",
        ),
    ):
        path.write_text(damaged)
        with pytest.raises(ValueError, match=named):
            load(saved)


# --- fingerprint --------------------------------------------------------------------------------------------------------------

CHANGES = {
    "max_tiles": lambda values: values["processor"].update(max_tiles=6),
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
    path = saved / find.MANIFEST
    values = json.loads(path.read_text())
    CHANGES[name](values)
    path.write_text(json.dumps(values))
    with pytest.raises(FingerprintError, match=rf"(?s)\n  {name}: made with .*--accept_fingerprint") as error:
        load(saved)
    assert str(error.value).count("made with") <= 3
    load(saved, accept_fingerprint=True)


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


# --- training runs ------------------------------------------------------------------------------------------------------------

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
    checkpoint.save_training(tmp_path, 20, params, opt_state, extra=extra, data=data, **OPTIONS)
    abstract = jax.eval_shape(lambda: training_state(0))
    assert checkpoint.latest_step(tmp_path) == 20
    restored, restored_state, restored_extra = checkpoint.restore_training(tmp_path, 20, *abstract)
    same_tensors(leaves(restored), leaves(params))
    assert jax.tree.structure(restored_state) == jax.tree.structure(opt_state)
    for one, other in zip(jax.tree.leaves(restored_state), jax.tree.leaves(opt_state), strict=True):
        np.testing.assert_array_equal(one, other)
    assert restored_extra == {"step": 20, **extra, "data": data}
    for path in (tmp_path, tmp_path / "checkpoints", tmp_path / "checkpoints" / "20"):
        same_tensors(leaves(load(path).params), leaves(params))
    convert(find.find(tmp_path), tmp_path / "hf", to="hf", verify=True)
    same_tensors(leaves(load(tmp_path / "hf").params), leaves(params))


def test_newest_complete_step_counts_and_old_ones_go(tmp_path, caplog):
    for step in (9, 10, 100):
        checkpoint.save_training(tmp_path, step, *training_state(step), extra={}, keep=2, **OPTIONS)
    steps = tmp_path / "checkpoints"
    assert sorted(entry.name for entry in steps.iterdir()) == ["10", "100"]
    (steps / "200.partial" / "params").mkdir(parents=True)
    (steps / "300").mkdir()
    with caplog.at_level(logging.WARNING):
        assert checkpoint.latest_step(tmp_path) == 100
    assert "200.partial" in caplog.text
    assert "300: not a complete checkpoint" in caplog.text
    with pytest.raises(FileNotFoundError, match="300 is no complete checkpoint; the newest of this run is 100"):
        checkpoint.restore_training(tmp_path, 300, None, None)
    assert checkpoint.latest_step(tmp_path / "elsewhere") is None


def test_damage_to_a_step_is_named(tmp_path, caplog):
    """A file that is gone, shorter or longer, or a list of files that is: each is seen without reading the arrays."""
    for step in (1, 2):
        checkpoint.save_training(tmp_path, step, *training_state(step), extra={}, **OPTIONS)
    directory = tmp_path / "checkpoints" / "2"
    largest = max((path for path in directory.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    for name, damaged in (("training.json", None), (largest.relative_to(directory), b"x"), ("files.json", b"{")):
        path = directory / name
        whole = path.read_bytes()
        path.unlink() if damaged is None else path.write_bytes(damaged)
        caplog.clear()
        assert checkpoint.latest_step(tmp_path) == 1
        assert f"ignoring {directory}: {name} " in caplog.text
        path.write_bytes(whole)
    assert checkpoint.latest_step(tmp_path) == 2


def test_training_goes_on_while_a_step_is_saved(tmp_path):
    params, opt_state = training_state(1)
    before = jax.tree.map(lambda leaf: np.array(leaf, copy=True), params)
    finish = checkpoint.start_saving_training(tmp_path, 1, params, opt_state, extra={}, **OPTIONS)
    assert checkpoint.latest_step(tmp_path) is None
    update = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf * 0 - 1, tree), donate_argnums=0)
    params, opt_state = update(params), update(opt_state)
    jax.block_until_ready((params, opt_state))
    finish()
    same_tensors(leaves(load(tmp_path).params), leaves(before))


def test_interrupted_save_leaves_the_old_checkpoint(saved, monkeypatch):
    def fails(path, tree):
        raise OSError("disk full")

    monkeypatch.setattr(storage, "start_saving", fails)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(saved, random_params(MODEL), MODEL, reduce_processor(MODEL), tiny_tokenizer.build(), overwrite=True)
    assert [entry.name for entry in saved.parent.iterdir()] == ["saved"]
    load(saved)


def test_model_carries_its_configuration(saved):
    opened = load(saved)
    assert opened.model == InternVL(MODEL, jnp.dtype(jnp.bfloat16))
    assert dataclasses.asdict(opened.model.config) == dataclasses.asdict(MODEL)
