"""Headers, indexes, files and values that a conversion must refuse are named, and DST is looked at
first.
"""

import json
import os
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert.__main__ import check_target, main
from convert.open import open_model
from internvl3_jax.checkpoints.checkpoint import load
from internvl3_jax.checkpoints.hf.assemble import ConversionError
from internvl3_jax.checkpoints.hf.safetensors import INDEX, SINGLE, SafetensorsSource
from internvl3_jax.checkpoints.manifest import Manifest
from internvl3_jax.data.text.tokenizer_files import OPTIONS
from internvl3_jax.io.checkpoint_paths import resolve_checkpoint, resolve_hub_dir
from tests.support.damaged_tensors import KEY, check_refused
from tests.support.released import convert, reduce, write_released

# --- headers and indexes -------------------------------------------------------------------------

OTHER = "language_model.model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return write_released(tmp_path_factory.mktemp("sound") / "released", reduce("1b"), "internvl")


def spoiled(sound, tmp_path, change):
    """A copy whose header is what `change` makes of (header, bytes of the tensors): (header as an
    object or bytes, bytes).
    """
    shutil.copytree(sound, tmp_path / "released")
    path = tmp_path / "released" / SINGLE
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, body = change(json.loads(content[8 : 8 + length]), content[8 + length :])
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + body)
    return tmp_path / "released"


def entry(**values):
    return lambda header, body: (header | {KEY: header[KEY] | values}, body)


def shifted(header, body):
    for name in header.keys() - {"__metadata__"}:
        header[name]["data_offsets"] = [offset + 4 for offset in header[name]["data_offsets"]]
    return header, b"\0" * 4 + body


def overlapping(header, body):
    header[KEY]["data_offsets"] = header[OTHER]["data_offsets"]
    return header, body


def named_for_a_terminal(header, body):
    return {f"\x1b[2J{name}" if name == KEY else name: one for name, one in header.items()}, body


HEADERS = {
    "overlap": (overlapping, "overlaps with|leaves a gap"),
    "negative": (entry(data_offsets=[-16, 3632]), rf"{KEY}: data_offsets\[0\] is -16"),
    "twice": (lambda header, body: (json.dumps(header).encode()[:-1] + b', "mlp1.0.weight": {}}', body), "'mlp1.0.weight' occurs twice"),
    "trailing": (lambda header, body: (header, body + b"x" * 64), "64 bytes after the last tensor belong to none"),
    "shifted": (shifted, "leaves a gap of 4 bytes after the header"),
    "list": (lambda header, body: ([], body), "header: is the list"),
    "no dtype": (lambda header, body: (header | {KEY: {"shape": [1], "data_offsets": [0, 4]}}, body), f"{KEY}: dtype is missing"),
    "null": (lambda header, body: (header | {KEY: None}, body), f"{KEY}: is null; expected an object"),
    "three offsets": (entry(data_offsets=[0, 1, 2]), "data_offsets has 3 elements; expected 2"),
    "fractions": (entry(shape=[38.0, 56.0]), r"shape\[0\] is the number 38.0; expected a whole number"),
    "dtype": (entry(dtype="F4"), "dtype is 'F4', which is not supported"),
    "size": (entry(shape=[1]), "does not fit its shape"),
    "metadata": (lambda header, body: (header | {"__metadata__": {"a": 1}}, body), "__metadata__: 'a' is the number 1; expected a text"),
    "escape": (named_for_a_terminal, r"\\x1b\[2J"),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADERS)
def test_headers_that_the_library_refuses_are_refused_here(name, sound, tmp_path):
    change, message = HEADERS[name]
    with pytest.raises(ValueError, match=message) as caught:
        open_model(spoiled(sound, tmp_path, change))
    assert "\x1b" not in str(caught.value) and (SINGLE in str(caught.value) or name == "escape")


def test_a_header_beyond_the_librarys_limit_is_not_read(tmp_path):
    with open(tmp_path / SINGLE, "wb") as file:
        file.write((10**10).to_bytes(8, "little"))
        file.truncate(10**10 + 8)
    with pytest.raises(ConversionError, match="its header has 10,000,000,000 bytes"):
        SafetensorsSource(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"\xff\xfe", "UTF-16"),
        (b"[]", "is the list"),
        (b"{}", "weight_map is missing"),
        (b'{"weight_map": []}', "weight_map is the list"),
        (b'{"weight_map": {"a": null}}', "a is null; expected a text"),
        (b'{"weight_map": {"a": "../b.safetensors"}}', "expected a file of this directory"),
        (
            b'{"weight_map": {"a": "b.safetensors"}}',
            "names files that do not exist: b.safetensors",
        ),
    ],
)
def test_indexes_are_read_strictly(content, message, tmp_path):
    (tmp_path / INDEX).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        SafetensorsSource(tmp_path)
    assert INDEX in str(caught.value)


def test_stale_shards_are_ignored_with_a_note(sound, tmp_path, caplog):
    shutil.copytree(sound, tmp_path / "released")
    tensors = load_file(sound / SINGLE)
    save_file(
        {name: np.zeros_like(tensor) for name, tensor in tensors.items()},
        tmp_path / "released" / "model-00001-of-00001.safetensors",
    )
    index = {"weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}
    (tmp_path / "released" / INDEX).write_text(json.dumps(index))
    source = SafetensorsSource(tmp_path / "released")
    assert np.array_equal(source.read(KEY), tensors[KEY]) and np.abs(tensors[KEY]).max() > 0
    assert "as transformers does; ignoring model-00001-of-00001.safetensors" in caplog.text


# --- files that are not what they seem -----------------------------------------------------------

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize("name", [SINGLE, "config.json", "vocab.json"])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda path: path.write_bytes(POINTER),
            "is a Git LFS pointer, not the file itself; run `git lfs pull`",
        ),
        (
            lambda path: path.write_bytes(b"<!DOCTYPE html><html>"),
            "is a web page, not the file itself",
        ),
        (
            lambda path: path.symlink_to("../../blobs/0123"),
            "links to ../../blobs/0123, which does not exist; the download is incomplete",
        ),
        (os.mkfifo, "is not a regular file"),
    ],
    ids=["pointer", "page", "dangling", "pipe"],
)
def test_what_replaces_a_file_is_named(make, message, name, sound, tmp_path):
    released = tmp_path / "released"
    shutil.copytree(sound, released)
    (released / name).unlink()
    make(released / name)
    with pytest.raises(ValueError, match=message) as caught:
        open_model(resolve_checkpoint(released))
    assert name in str(caught.value)


def test_links_out_of_a_checkpoint_are_not_followed_but_the_hubs_own_are(sound, tmp_path):
    (tmp_path / "secret.py").write_text("password")
    cache = tmp_path / "models--owner--name"
    snapshot = cache / "snapshots" / ("0" * 40)
    (cache / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sound.iterdir()):
        shutil.copy(path, cache / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    convert(snapshot, tmp_path / "ours", to="hf")
    assert Manifest.read(tmp_path / "ours").source == f"owner/name@{'0' * 40}"
    (snapshot / "modeling.py").symlink_to(tmp_path / "secret.py")
    with pytest.raises(
        ValueError, match="modeling.py: links out of its directory, to .*secret.py; put a copy"
    ):
        open_model(snapshot)


# --- values --------------------------------------------------------------------------------------


def test_nan_and_infinite_weights_are_named_and_counted(sound, tmp_path, capsys):
    shutil.copytree(sound, tmp_path / "released")
    tensors = load_file(sound / SINGLE)
    tensors[KEY][1, 2:5] = np.nan
    tensors["mlp1.1.bias"][0] = -np.inf
    save_file(tensors, tmp_path / "released" / SINGLE)
    check_refused(tmp_path / "released", r"2 tensor\(s\) with NaN or infinite values", tmp_path)
    with pytest.raises(ValueError, match="NaN or infinite"):
        load(tmp_path / "released")
    allowed = str(tmp_path / "allowed")
    assert main([str(tmp_path / "released"), allowed]) == 1
    shown = capsys.readouterr().err
    assert f"{KEY}: 3 of" in shown and "mlp1.1.bias: 1 of" in shown
    assert main([str(tmp_path / "released"), allowed, "--allow_nonfinite", "--verify"]) == 0
    assert main([allowed, str(tmp_path / "exported"), "--to", "hf"]) == 1
    assert "language/layers/up/kernel: 3 of" in capsys.readouterr().err


def test_a_tokenizer_larger_than_the_model_is_refused(sound, tmp_path):
    shutil.copytree(sound, tmp_path / "released")
    ids = json.loads((sound / "added_tokens.json").read_text())
    ids |= {f"<new{number}>": 460 + number for number in range(5)}
    (tmp_path / "released" / "added_tokens.json").write_text(json.dumps(ids))
    with pytest.raises(
        ValueError, match="the tokenizer has 465 tokens, the model's vocab_size is 463"
    ):
        open_model(tmp_path / "released")


# --- DST -----------------------------------------------------------------------------------------


def test_dst_is_looked_at_before_anything_is_read(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert check_target("~/ck", False) == tmp_path / "ck"
    (tmp_path / "file").write_text("")
    for target, message in {
        "a\0b": r"DST is 'a\x00b'",
        " ": "DST is ' '",
        str(tmp_path / "file" / "x"): "is not a directory",
    }.items():
        assert main([str(tmp_path / "nowhere"), target]) == 1
        assert message in capsys.readouterr().err
    assert main([str(tmp_path / "nowhere"), str(tmp_path / "file")]) == 1
    assert "file exists; choose another place" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["owner/name", "owner/name@main", "owner/name@" + "0" * 40])
def test_a_hub_id_may_have_a_revision(name, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda *names, **options: calls.append((*names, options["revision"])) or tmp_path,
    )
    assert resolve_checkpoint(name) == tmp_path
    assert calls == [("owner/name", name.partition("@")[2] or None)]


@pytest.mark.parametrize("start", ["https://huggingface.co/", "hf://", "http://huggingface.co/"])
def test_an_address_of_the_hub_is_answered_with_the_hub_id(start):
    with pytest.raises(
        FileNotFoundError, match="is an address of the hub; give the hub id, o/m-1 "
    ):
        resolve_checkpoint(f"{start}o/m-1/tree/main")


def test_a_folder_of_the_hubs_cache_is_answered_with_a_snapshot(tmp_path):
    snapshot = tmp_path / "models--owner--name" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    for folder in snapshot.parents[:2]:
        with pytest.raises(FileNotFoundError, match=f"hub's cache; give .* {snapshot}, or the hub"):
            resolve_checkpoint(folder)


@pytest.mark.parametrize("dtype", ["bf16", "int8", 5, "float64"])
def test_another_dtype_is_refused_before_anything_is_read(dtype):
    with pytest.raises(ValueError, match="dtype is .*; expected one of float32, bfloat16, float16"):
        load("nowhere", dtype=dtype)


def test_a_download_that_fails_is_one_line(monkeypatch):
    def failing(*names, **options):
        raise OSError("first line\n\n  second line")

    monkeypatch.setattr("huggingface_hub.snapshot_download", failing)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(
        FileNotFoundError, match="could not be downloaded from the hub: first line second line"
    ):
        resolve_checkpoint("owner/name")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="HF_HUB_OFFLINE is set and it is not in the cache"):
        resolve_hub_dir("owner/name@main")
    with pytest.raises(FileNotFoundError, match="does not exist; give a directory"):
        resolve_hub_dir("/nowhere/at/all")


def test_the_merges_of_the_slow_tokenizer_are_part_of_a_checkpoint(sound, tmp_path, capsys):
    slow, exported, back = (str(tmp_path / name) for name in ("slow", "exported", "back"))
    assert main([str(sound), slow, "--tokenizer_merges", "slow"]) == 0
    assert load(slow).tokenizer.merges == "slow"
    assert Manifest.read(tmp_path / "slow").fingerprint["tokenizer_merges"] == "slow"
    assert main([slow, exported, "--to", "internvl"]) == 0
    assert load(exported).tokenizer.merges == "slow"
    assert main([exported, back, "--tokenizer_merges", "all"]) == 0
    assert load(back).tokenizer.merges == "all"
    (tmp_path / "slow" / OPTIONS).unlink()
    with pytest.raises(ValueError, match="tokenizer_merges: made with 'slow', now None"):
        load(slow)
