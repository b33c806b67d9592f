"""python -m convert --llm --vision: tower and decoder taken over bit for bit, everything new as
documented.
"""

import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert.__main__ import main
from convert.compose import NEW_TOKENS, open_parts
from convert.run import convert as convert_model
from examples.tiny_digits.recipe import tokenizer as tiny_tokenizer
from internvl3_jax.checkpoints import storage
from internvl3_jax.checkpoints.checkpoint import load
from tests.support.components import KNOWN, write_llm, write_tower
from tests.support.qwen_tokenizer import ADDED_IDS, INTERNVL, write_qwen_tokenizer
from tests.support.released import convert, reduce, same_tensors


def bf16_mean(rows: np.ndarray) -> np.ndarray:
    return rows.astype(np.float32).mean(axis=0, dtype=np.float32).astype(rows.dtype)


@pytest.mark.parametrize(
    ("kind", "size", "tied"),
    [
        ("bare", "1b", True),
        ("bare", "3.5-4b", True),  # untied, although the base ties
        ("prefixed", "38b", False),
        ("bare", "3.5-30b-a3b", False),
        ("internvl", "9b", False),
        ("hf", "38b", True),
    ],
)
def test_parts_are_taken_over_and_the_rest_is_as_documented(kind, size, tied, tmp_path):
    llm, language, base = write_llm(tmp_path / "llm", size, tied)
    tower, vision = write_tower(tmp_path / "tower", kind, size)
    convert_model(open_parts(llm, tower), tmp_path / "new", verify=True)
    opened = load(tmp_path / "new")
    assert opened.config.vision == reduce(size).vision
    assert opened.config.language == dataclasses.replace(
        base.language, vocab_size=KNOWN + 9, tie_embeddings=False
    )
    found = {path: np.asarray(leaf) for path, leaf in storage.by_path(opened.params).items()}
    same_tensors(
        {path: leaf for path, leaf in found.items() if path.startswith("vision/")},
        {p: v for p, v in vision.items() if p.startswith("vision/")},
    )
    kept = [
        path
        for path in found
        if path.startswith("language/") and "embedding" not in path and "head" not in path
    ]
    same_tensors({path: found[path] for path in kept}, {path: language[path] for path in kept})
    heads = language["language/embedding"] if tied else language["language/head/kernel"].T
    for rows, source in (
        (found["language/embedding"], language["language/embedding"]),
        (found["language/head/kernel"].T, heads),
    ):
        np.testing.assert_array_equal(rows[:KNOWN], source[:KNOWN])
        np.testing.assert_array_equal(
            rows[KNOWN : KNOWN + 9], np.tile(bf16_mean(source[:KNOWN]), (9, 1))
        )
        assert not rows[KNOWN + 9 :].any()


def test_projector_is_random_by_seed_only(tmp_path):
    llm, _, _ = write_llm(tmp_path / "llm")
    tower, _ = write_tower(tmp_path / "tower", "bare")
    projectors = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        convert_model(open_parts(llm, tower, "float32", seed), tmp_path / name)
        projectors[name] = storage.by_path(load(tmp_path / name).params["projector"])
    for path, leaf in projectors["a"].items():
        np.testing.assert_array_equal(leaf, projectors["b"][path])
        if path.endswith("kernel"):
            assert abs(float(leaf.std()) - 0.02) < 0.002
            assert not np.array_equal(leaf, projectors["c"][path])
        else:
            np.testing.assert_array_equal(
                leaf, np.full(leaf.shape, 1.0 if path == "norm/scale" else 0.0)
            )


def test_new_model_is_complete(tmp_path, capsys):
    llm, _, _ = write_llm(tmp_path / "llm")
    tower, _ = write_tower(tmp_path / "tower", "bare")
    assert main(["--llm", str(llm), "--vision", str(tower), str(tmp_path / "new"), "--verify"]) == 0
    out = capsys.readouterr().out
    assert "hashes equal" in out
    assert "vision: all " in out and "language: all " in out and "initialized as their mean" in out
    assert "projector: initialized at random, seed 0" in out
    opened = load(tmp_path / "new")
    assert [opened.tokenizer.token_id(token) for token in NEW_TOKENS] == list(
        range(KNOWN, KNOWN + 9)
    )
    assert opened.tokenizer.vocab_size == opened.config.language.vocab_size
    assert opened.config.image_token_id == KNOWN + 2
    assert not (tmp_path / "new" / "generation_config.json").exists()
    for layout in ("internvl", "hf"):
        convert(tmp_path / "new", tmp_path / layout, to=layout)
        assert load(tmp_path / layout).config == opened.config


@pytest.mark.parametrize("layout", ["vocab", "json"])
def test_real_tokenizer_gets_the_released_ids(layout, tmp_path):
    llm, _, _ = write_llm(tmp_path / "llm")
    for name in tiny_tokenizer.build():
        (llm / name).unlink()
    write_qwen_tokenizer(llm, layout)
    for path in llm.glob("*.json"):  # back to the plain language model's
        values = json.loads(path.read_text())
        values.pop("added_tokens_decoder", None)
        if path.name == "tokenizer.json":
            values["added_tokens"] = [
                entry for entry in values["added_tokens"] if entry["content"] not in INTERNVL
            ]
        if path.name == "added_tokens.json":
            values = {token: id for token, id in values.items() if token not in INTERNVL}
        if isinstance(values.get("additional_special_tokens"), list):
            values["additional_special_tokens"] = values["additional_special_tokens"][:-9]
        path.write_text(json.dumps(values, ensure_ascii=False))
    tensors = load_file(llm / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    tensors["model.embed_tokens.weight"] = np.resize(embedding, (151936, embedding.shape[1]))
    save_file(tensors, llm / "model.safetensors")
    config = json.loads((llm / "config.json").read_text())
    (llm / "config.json").write_text(json.dumps(config | {"vocab_size": 151936}))
    composed = open_parts(llm, write_tower(tmp_path / "tower", "bare")[0])
    assert composed.tokenizer.vocab_size == composed.config.language.vocab_size == 151674
    assert {token: composed.tokenizer.token_id(token) for token in INTERNVL} == {
        token: ADDED_IDS[token] for token in INTERNVL
    }
    assert (
        composed.tokenizer.decode(composed.tokenizer.encode("a <ref>cat</ref>"))
        == "a <ref>cat</ref>"
    )


def test_what_is_missing_or_unknown_is_named(tmp_path):
    llm, _, _ = write_llm(tmp_path / "llm")
    tower, _ = write_tower(tmp_path / "tower", "bare")
    tensors = load_file(tower / "model.safetensors")
    save_file(
        tensors | {"encoder.layers.9.ls1": tensors["encoder.layers.0.ls1"]},
        tower / "model.safetensors",
    )
    with pytest.raises(ValueError, match="encoder.layers.9.ls1"):
        open_parts(llm, tower)
    save_file(
        {name: tensor for name, tensor in tensors.items() if name != "encoder.layers.0.ls1"},
        tower / "model.safetensors",
    )
    with pytest.raises(ValueError, match="encoder.layers.0.ls1"):
        open_parts(llm, tower)
    save_file(
        {name: tensor.astype(np.float32) for name, tensor in tensors.items()},
        tower / "model.safetensors",
    )
    with pytest.raises(
        ValueError, match="the tower is float32, the language model bfloat16.*--dtype"
    ):
        open_parts(llm, tower)
    (tower / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="InternViT"):
        open_parts(llm, tower)
