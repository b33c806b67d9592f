"""Checkpoint directories: opened from every place, and refused when they contradict themselves."""

import dataclasses
import json
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.tiny_digits.recipe import tokenizer as tiny_tokenizer
from internvl3_jax.checkpoints import storage
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
from tests.support.saved_steps import flip, largest, leaves

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
    with pytest.raises(FileNotFoundError, match="does not exist; give a checkpoint directory"):
        load("x" * 5000)  # no file has a name that long
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
def test_other_weights_in_a_checkpoint_are_ignored_with_a_note(name, saved, caplog):
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


def test_a_description_of_an_older_form_is_one_clear_line(saved):
    """Nothing was released with it, so that it is named and not read."""
    path = saved / checkpoint_paths.MANIFEST
    whole = path.read_text()
    path.write_text(json.dumps(json.loads(whole) | {"listed": True}))
    with pytest.raises(ValueError, match=r"internvl3_jax\.json.*unknown.*listed") as error:
        load(saved)
    assert "\n" not in str(error.value)
    path.write_text(whole)
    load(saved)


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
    listed = json.loads((saved / "files.json").read_text())
    sizes = {name: entry["bytes"] for name, entry in listed["files"].items()}
    (saved / "files.json").write_text(json.dumps(sizes))
    with pytest.raises(Damaged, match="files.json is damaged .*format is missing"):
        load(saved)
    (saved / "files.json").unlink()
    with pytest.raises(Damaged, match="files.json is missing"):
        load(saved)
    load(saved, verify="none")
    (saved / "files.json").write_text(json.dumps(listed))
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
    "unknown": {"color": 3},
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
