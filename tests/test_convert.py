"""python -m convert: bit-exact both ways for every size and layout, and files that other programs
open.
"""

import json

import ml_dtypes
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
)

from convert.__main__ import main, parse_size
from convert.hf_files import export_files
from examples.tiny_digits.recipe import tokenizer as tiny_tokenizer
from internvl3_jax.checkpoints import storage
from internvl3_jax.checkpoints.checkpoint import load, save_checkpoint
from internvl3_jax.checkpoints.hf.assemble import (
    ConversionError,
    padded_shape,
    params_from_tensors,
    tensors_from_params,
)
from internvl3_jax.checkpoints.hf.mapping import TABLE, active_rows
from internvl3_jax.checkpoints.hf.released import companion_files
from internvl3_jax.checkpoints.hf.safetensors import INDEX
from internvl3_jax.checkpoints.manifest import Manifest
from internvl3_jax.config import ProcessorConfig, from_dict, to_dict
from internvl3_jax.data.text.chat_template import encode_chat
from internvl3_jax.data.text.tokenizer import Tokenizer
from internvl3_jax.model.internvl import abstract_params
from internvl3_jax.sizes import SIZES
from tests.support import torch_reference
from tests.support.qwen_tokenizer import FRAGMENTS, write_qwen_tokenizer
from tests.support.released import (
    IMAGE_TOKEN_ID,
    RELEASED,
    VOCABULARY,
    convert,
    params_of,
    random_params,
    reduce,
    reduce_processor,
    same_tensors,
    stored_tensors,
    write_released,
)

pytestmark = pytest.mark.optimized


@pytest.mark.parametrize("size", list(SIZES))
def test_the_table_is_the_model(size):
    shapes = {
        path: leaf.shape for path, leaf in storage.by_path(abstract_params(SIZES[size])).items()
    }
    rows = {row.target: padded_shape(row, SIZES[size]) for row in active_rows(SIZES[size])}
    assert rows == shapes


def test_no_two_rows_share_a_leaf_or_a_tensor():
    for names in (
        [row.target for row in TABLE],
        [row.internvl for row in TABLE],
        [key for row in TABLE for key in row.hf],
    ):
        assert len(set(names)) == len(names)


@pytest.mark.parametrize("layout", ["internvl", "hf"])
@pytest.mark.parametrize("size", RELEASED)
def test_round_trip_is_bit_exact(size, layout, tmp_path):
    model = reduce(size)
    released = write_released(tmp_path / "released", model, layout)
    convert(released, tmp_path / "ours", verify=True)
    convert(tmp_path / "ours", tmp_path / "back", to=layout, verify=True, shard_size=60_000)
    same_tensors(stored_tensors(released), stored_tensors(tmp_path / "back"))
    assert (tmp_path / "back" / INDEX).exists()
    convert(tmp_path / "back", tmp_path / "again", verify=True)
    same_tensors(params_of(tmp_path / "ours"), params_of(tmp_path / "again"))
    same_tensors(params_of(tmp_path / "ours"), storage.by_path(random_params(model)))
    for name in ("ours", "again"):
        manifest = Manifest.read(tmp_path / name)
        assert (manifest.model, manifest.processor) == (model, reduce_processor(model))


@pytest.mark.parametrize(
    "family", ["300m qwen2 tied", "6b internlm3", "300m qwen3", "300m qwen3_moe"]
)
def test_transformers_model_survives_every_way(family, tmp_path):
    vit, llm, *tied = family.split()
    options = {"text": {"vocab_size": VOCABULARY}, "image_token_id": IMAGE_TOKEN_ID}
    reference, _ = torch_reference.build_reference(
        vit, llm, bool(tied), dtype=torch.bfloat16, **options
    )
    expected = {name: tensor.view(torch.int16) for name, tensor in reference.state_dict().items()}
    for layout in ("hf", "internvl"):
        torch_reference.save_reference(reference, tmp_path / layout, layout, max_shard_size="40KB")
        for name, content in tiny_tokenizer.build().items():
            (tmp_path / layout / name).write_bytes(content)
        convert(tmp_path / layout, tmp_path / f"{layout}-ours")
        convert(tmp_path / f"{layout}-ours", tmp_path / f"{layout}-hf", to="hf")
        loaded, report = AutoModelForImageTextToText.from_pretrained(
            tmp_path / f"{layout}-hf", output_loading_info=True
        )
        assert not any(report.values()), report
        assert loaded.config.tie_word_embeddings is (bool(tied) and layout == "hf")
        found = {name: tensor.view(torch.int16) for name, tensor in loaded.state_dict().items()}
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    # The layouts agree about our parameters, and the original one is written as its own code has
    # it.
    one, other = params_of(tmp_path / "hf-ours"), params_of(tmp_path / "internvl-ours")
    assert other.keys() - one.keys() == ({"language/head/kernel"} if tied else set())
    same_tensors(one, {path: other[path] for path in one})
    convert(tmp_path / "hf-ours", tmp_path / "original", to="internvl", verify=True)
    same_tensors(stored_tensors(tmp_path / "original"), stored_tensors(tmp_path / "internvl"))


def test_large_leaves_are_assembled_in_a_file(tmp_path, monkeypatch):
    released = write_released(tmp_path / "released", reduce("1b"), "hf")
    monkeypatch.setattr("internvl3_jax.checkpoints.hf.released._LARGE", 0)
    convert(released, tmp_path / "ours", verify=True)
    assert not (tmp_path / "ours" / "leaf.tmp").exists()
    same_tensors(params_of(tmp_path / "ours"), storage.by_path(random_params(reduce("1b"))))


def test_older_names_of_the_hf_layout_are_read():
    model = reduce("38b")
    params = random_params(model)
    tensors = tensors_from_params(model, params, "hf")
    renames = {
        "model.language_model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
    }
    renames |= {
        "model.vision_tower.": "vision_tower.",
        "model.multi_modal_projector.": "multi_modal_projector.",
    }
    older = {}
    for name, tensor in tensors.items():
        new, old = next((new, old) for new, old in renames.items() if name.startswith(new))
        older[old + name.removeprefix(new)] = tensor
    same_tensors(storage.by_path(params_from_tensors(model, older)), storage.by_path(params))
    with pytest.raises(
        ConversionError, match=r"given twice:\n  language_model.lm_head.weight and lm_head.weight"
    ):
        params_from_tensors(model, older | {"lm_head.weight": tensors["lm_head.weight"]})


def test_buffers_of_old_versions_are_ignored_and_a_tied_head_must_be_the_embedding():
    model = reduce("1b")
    model.language.tie_embeddings = True
    tensors = tensors_from_params(model, random_params(model), "hf")
    tensors["model.language_model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(1, np.float32)
    tensors["lm_head.weight"] = tensors["model.language_model.embed_tokens.weight"]
    params_from_tensors(model, tensors)
    with pytest.raises(ConversionError, match="lm_head.weight differs"):
        params_from_tensors(model, tensors | {"lm_head.weight": tensors["lm_head.weight"][::-1]})


# --- exported files ------------------------------------------------------------------------------


def test_exported_directory_opens_in_transformers(tmp_path):
    model = reduce("1b")
    write_released(tmp_path / "released", model, "internvl")
    convert(tmp_path / "released", tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "hf", to="hf")
    checkpoint, tokenizer = (load(tmp_path / "hf"), AutoTokenizer.from_pretrained(tmp_path / "hf"))
    messages = [
        {"role": "user", "content": "Where is the <ref>cat</ref>?"},
        {"role": "assistant", "content": "Là: 在这里\n"},
    ]
    messages.append({"role": "user", "content": "Sure?"})
    for start in (messages, [{"role": "system", "content": "Be brief."}, *messages]):
        ours = encode_chat(
            start, [], checkpoint.tokenizer, checkpoint.processor, add_generation_prompt=True
        ).tokens
        theirs = tokenizer.apply_chat_template(start, add_generation_prompt=True)["input_ids"]
        assert theirs == ours.tolist()
    parts = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=False
    )
    image_text = (
        tokenizer.start_image_token
        + tokenizer.context_image_token * 9 * 4
        + tokenizer.end_image_token
    )
    prompt = prompt.replace(tokenizer.context_image_token, image_text)
    question = [{"role": "user", "content": "<image>\nWhat is it?"}]
    ours = encode_chat(
        question, [9], checkpoint.tokenizer, checkpoint.processor, add_generation_prompt=True
    ).tokens
    assert tokenizer(prompt)["input_ids"] == ours.tolist()
    image_processor = AutoImageProcessor.from_pretrained(tmp_path / "hf")
    pixels = image_processor(Image.new("RGB", (64, 32), (255, 0, 0)), return_tensors="pt")[
        "pixel_values"
    ]
    assert pixels.shape == (9, 3, 16, 16)
    assert torch.allclose(
        pixels[0, :, 0, 0],
        (torch.tensor([1.0, 0, 0]) - torch.tensor(model.vision.mean))
        / torch.tensor(model.vision.std),
    )
    generation = GenerationConfig.from_pretrained(tmp_path / "hf")
    assert generation.eos_token_id == [checkpoint.tokenizer.token_id("<|im_end|>")]
    for name in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        assert (
            json.loads((tmp_path / "hf" / name).read_text())["processor_class"]
            == "InternVLProcessor"
        )


def test_processor_settings_survive_an_export(tmp_path):
    model = reduce("2b")
    model.vision.drop_path, model.vision.mean = 0.2, (0.5, 0.5, 0.5)
    processor = reduce_processor(
        model, delta=64, system_message=None, max_tiles=6, frame_label="Frame{}: ", apply_exif=True
    )
    save_checkpoint(
        tmp_path / "ours", random_params(model), model, processor, tiny_tokenizer.build()
    )
    for layout in ("internvl", "hf"):
        convert(tmp_path / "ours", tmp_path / layout, to=layout)
        checkpoint = load(tmp_path / layout)
        assert (checkpoint.config, checkpoint.processor) == (model, processor)
        values = json.loads((tmp_path / layout / "config.json").read_text())
        values["vision_config"]["layer_norm_eps"] = 1e-5
        (tmp_path / layout / "config.json").write_text(json.dumps(values))
        with pytest.raises(ValueError, match="disagree about vision.norm_eps"):
            load(tmp_path / layout)
    assert values.keys() & {"rope_pos_id_stride"} == set()
    assert (
        json.loads((tmp_path / "internvl" / "config.json").read_text())["rope_pos_id_stride"] == 64
    )


def test_model_code_is_copied_with_the_original_layout_only(tmp_path):
    released = write_released(tmp_path / "released", reduce("1b"), "internvl")
    (released / "modeling_internvl_chat.py").write_text("class InternVLChatModel: ...\n")
    values = json.loads((released / "config.json").read_text()) | {
        "auto_map": {"AutoModel": "modeling_internvl_chat.InternVLChatModel"}
    }
    (released / "config.json").write_text(json.dumps(values))
    convert(released, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "internvl", to="internvl")
    convert(tmp_path / "ours", tmp_path / "hf", to="hf")
    assert (tmp_path / "internvl" / "modeling_internvl_chat.py").exists()
    assert (
        json.loads((tmp_path / "internvl" / "config.json").read_text())["auto_map"]
        == values["auto_map"]
    )
    assert not list((tmp_path / "hf").glob("*.py"))
    assert "auto_map" not in json.loads((tmp_path / "hf" / "config.json").read_text())


def test_dtype_is_cast_and_what_does_not_fit_is_refused(tmp_path):
    model = reduce("1b")
    params = random_params(model, dtype=np.float32)
    save_checkpoint(
        tmp_path / "ours", params, model, reduce_processor(model), tiny_tokenizer.build()
    )
    convert(tmp_path / "ours", tmp_path / "half", dtype="bfloat16", to="hf", verify=True)
    expected = {
        path: leaf.astype(ml_dtypes.bfloat16) for path, leaf in storage.by_path(params).items()
    }
    same_tensors(params_of(tmp_path / "half"), expected)
    convert(tmp_path / "half", tmp_path / "single", dtype="float32", verify=True)
    same_tensors(
        params_of(tmp_path / "single"),
        {path: leaf.astype(np.float32) for path, leaf in expected.items()},
    )
    params["projector"]["fc1"]["bias"][0] = 1e6
    save_checkpoint(
        tmp_path / "ours",
        params,
        model,
        reduce_processor(model),
        tiny_tokenizer.build(),
        overwrite=True,
    )
    with pytest.raises(ConversionError, match="projector/fc1/bias.*float16"):
        convert(tmp_path / "ours", tmp_path / "float16", dtype="float16")
    assert not (tmp_path / "float16").exists()


# --- command line --------------------------------------------------------------------------------


def test_command_line(tmp_path, capsys):
    released = str(write_released(tmp_path / "released", reduce("1b"), "internvl"))
    ours, back = str(tmp_path / "ours"), str(tmp_path / "back")
    assert main([released, ours, "--verify"]) == 0
    assert "hashes equal" in capsys.readouterr().out
    assert main([ours, back, "--to", "hf", "--dtype", "float32", "--shard_size", "100KB"]) == 0
    assert "hf safetensors" in capsys.readouterr().out
    assert main([ours, back, "--to", "hf"]) == 1
    assert "exists" in capsys.readouterr().err
    assert main([str(tmp_path / "nothing"), str(tmp_path / "other")]) == 1
    assert "does not exist" in capsys.readouterr().err
    for wrong in ([ours], [ours, back, "--llm", ours], [ours, back, "--to", "onnx"]):
        with pytest.raises(SystemExit):
            main(wrong)


def test_sizes():
    assert [parse_size(text) for text in ("5GB", "1.5 mb", "200K", "77")] == [
        5 * 10**9,
        1_500_000,
        200_000,
        77,
    ]
    with pytest.raises(Exception, match="not a size"):
        parse_size("many")


def test_config_survives_json(tmp_path):
    for model in SIZES.values():
        assert from_dict(type(model), json.loads(json.dumps(to_dict(model)))) == model


@pytest.mark.parametrize("layout", ["vocab", "json"])
def test_real_tokenizer_is_the_same_in_transformers(layout, tmp_path):
    files = companion_files(write_qwen_tokenizer(tmp_path / "released", layout))
    ours = Tokenizer.from_files(files)
    (tmp_path / "hf").mkdir()
    for name, content in export_files(
        SIZES["1b"], ProcessorConfig(), ours, "hf", "bfloat16", files
    ).items():
        (tmp_path / "hf" / name).write_bytes(content)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert len(theirs) == ours.vocab_size == 151674
    # a token of its own would have no row in the embedding
    assert theirs.video_token == "<|video_pad|>"
    assert theirs.context_image_token_id == SIZES["1b"].image_token_id
    text = (
        "".join(FRAGMENTS)
        + "<img><IMG_CONTEXT></img><ref>猫</ref><box>[[1, 2, 3, 4]]</box><|im_end|>\n"
    )
    assert theirs(text)["input_ids"] == ours.encode(text)
