"""Damaged tensors are named in a conversion, and one that is interrupted leaves nothing behind."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert import run
from internvl3_jax.checkpoints import storage
from internvl3_jax.checkpoints.hf.assemble import ConversionError
from internvl3_jax.checkpoints.hf.safetensors import INDEX, SafetensorsSource
from internvl3_jax.io import unfinished
from internvl3_jax.io.integrity import Damaged
from tests.support.damaged_tensors import KEY, check_refused
from tests.support.released import convert, params_of, reduce, same_tensors, write_released

TENSOR_DAMAGE = {
    "missing": lambda tensors: tensors.pop(KEY),
    "extra": lambda tensors: tensors.update({KEY.replace("up", "sideways"): tensors[KEY]}),
    "misshapen": lambda tensors: tensors.update({KEY: tensors[KEY][:-1]}),
    "integers": lambda tensors: tensors.update({KEY: tensors[KEY].view(np.int16)}),
    "another dtype": lambda tensors: tensors.update({KEY: tensors[KEY].astype(np.float32)}),
}


@pytest.mark.parametrize("damage", TENSOR_DAMAGE)
def test_damaged_tensors_are_named(damage, tmp_path):
    released = write_released(tmp_path / "released", reduce("1b"), "internvl")
    tensors = load_file(released / "model.safetensors")
    TENSOR_DAMAGE[damage](tensors)
    save_file(tensors, released / "model.safetensors")
    check_refused(released, KEY.replace("up", "sideways") if damage == "extra" else KEY, tmp_path)


def test_truncated_file_names_what_is_cut_off(tmp_path):
    released = write_released(tmp_path / "released", reduce("1b"), "internvl")
    content = (released / "model.safetensors").read_bytes()
    last = max(SafetensorsSource(released).entries.items(), key=lambda item: item[1][1])[0]
    (released / "model.safetensors").write_bytes(content[:-1])
    check_refused(released, f"truncated.*{last}", tmp_path)
    (released / "model.safetensors").write_bytes(content[:100])
    check_refused(released, "truncated or not a safetensors", tmp_path)
    (released / "model.safetensors").write_bytes(content[:8] + b"x" * (len(content) - 8))
    check_refused(released, "header is not valid JSON", tmp_path)


def test_damaged_index_names_shard_and_tensor(tmp_path):
    write_released(tmp_path / "released", reduce("1b"), "internvl")
    sharded = tmp_path / "sharded"
    convert(tmp_path / "released", sharded, to="internvl", shard_size=60_000)
    index = json.loads((sharded / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    (sharded / "files.json").unlink()  # as of a directory that was not made here
    shutil.copytree(sharded, tmp_path / "moved")
    moved = {
        "weight_map": index["weight_map"]
        | {KEY: next(file for file in files if file != index["weight_map"][KEY])}
    }
    (tmp_path / "moved" / INDEX).write_text(json.dumps(moved))
    check_refused(tmp_path / "moved", KEY, tmp_path)
    (tmp_path / "moved" / INDEX).unlink()
    check_refused(tmp_path / "moved", INDEX, tmp_path)
    (sharded / files[1]).unlink()
    check_refused(sharded, files[1], tmp_path)


def test_layout_of_names_and_config_must_agree(tmp_path):
    released = write_released(tmp_path / "released", reduce("1b"), "internvl")
    save_file({"some.weight": np.zeros(3, np.float32)}, released / "model.safetensors")
    check_refused(released, "some.weight", tmp_path)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("to", [None, "hf"])
def test_interrupted_write_leaves_nothing_and_spares_what_was_there(to, tmp_path, monkeypatch):
    released = write_released(tmp_path / "released", reduce("1b"), "internvl")
    convert(released, tmp_path / "target", to=to)
    before = params_of(tmp_path / "target")
    with pytest.raises(FileExistsError, match="--overwrite"):
        convert(released, tmp_path / "target", to=to)
    sink = run.SafetensorsSink if to else run.OrbaxSink
    add, calls = sink.add, []

    def interrupted(self, row, leaf):
        add(self, row, leaf)
        calls.append(row)
        if len(calls) == 9:
            raise Killed

    monkeypatch.setattr(sink, "add", interrupted)
    for target in ("target", "fresh"):
        calls.clear()
        with pytest.raises(Killed):
            convert(released, tmp_path / target, to=to, overwrite=True)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["released", "target"]
    same_tensors(params_of(tmp_path / "target"), before)
    monkeypatch.undo()
    # What a killed process left behind is no checkpoint, and does not stand in the way of the next
    # attempt.
    unfinished.Unfinished(tmp_path / "fresh", "0123abcd", True).lock.release()
    convert(released, tmp_path / "fresh", to=to)
    convert(released, tmp_path / "target", to=to, overwrite=True)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["fresh", "released", "target"]


def test_verify_finds_a_wrong_write_and_a_changed_source(tmp_path, monkeypatch):
    released = write_released(tmp_path / "released", reduce("1b"), "internvl")
    add = storage.TreeWriter.add

    def wrong(self, path, leaf):
        if path == "language/layers/up/kernel":
            leaf[1, 3, 5] += 1
        add(self, path, leaf)

    monkeypatch.setattr(storage.TreeWriter, "add", wrong)
    with pytest.raises(ConversionError, match=f"written checkpoint differs.*: {KEY}$"):
        convert(released, tmp_path / "ours", verify=True)
    assert not (tmp_path / "ours").exists()
    monkeypatch.undo()
    convert(released, tmp_path / "copy", to="hf")
    file = next((tmp_path / "copy").glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(Damaged, match=f"{file.name} has other content than was written"):
        convert(tmp_path / "copy", tmp_path / "ours")
    (tmp_path / "copy" / "files.json").unlink()
    with pytest.raises(ConversionError, match="source has changed.*language_model"):
        convert(tmp_path / "copy", tmp_path / "ours", verify=True)
