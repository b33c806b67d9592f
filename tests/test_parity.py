"""The same numbers as PyTorch: every intermediate, logits and greedy tokens of tiny random
transformers models, in float32.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import torch

from internvl3_jax.checkpoints.hf.assemble import params_from_tensors
from internvl3_jax.checkpoints.hf.config import from_hf
from internvl3_jax.config import UNITS
from internvl3_jax.inference.generator import Generator
from internvl3_jax.model.internvl import InternVL
from internvl3_jax.model.projector import pixel_shuffle
from internvl3_jax.model.vision import VisionTower, interpolate_positions
from tests.support.expert_names import in_files
from tests.support.parity import (
    TOLERANCE,
    as_prompt,
    assert_gradients,
    greedy,
    loss_gradients,
    make_row,
    pair,
    pixels,
    torch_logits,
)
from tests.support.torch_reference import (
    build_reference,
    original_config,
    original_state_dict,
)

pytestmark = pytest.mark.optimized

FAMILIES = [
    ("300m", "qwen2", False),
    ("300m", "qwen2", True),
    ("6b", "qwen2", False),
    ("300m", "internlm3", False),
    ("6b", "internlm3", True),
    ("300m", "qwen3", False),
    ("6b", "qwen3", False),
    ("300m", "qwen3", True),
    ("300m", "qwen3_moe", False),
    ("6b", "qwen3_moe", True),
]


@functools.partial(jax.jit, static_argnums=(0, 3))
def apply(model, params, batch, scaling=None):
    return model.apply({"params": params}, batch, scaling=scaling)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: "-".join(map(str, family)))
@pytest.mark.parametrize("tiles", [(), (1,), (3, 1)], ids=["text", "one image", "several images"])
def test_logits(family, tiles):
    reference, config, params = pair(*family)
    batch, values = make_row(config, tiles, seed=len(tiles))
    ours = apply(InternVL(config), params, batch)
    np.testing.assert_allclose(ours, torch_logits(reference, batch["tokens"], values), **TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: "-".join(map(str, family)))
def test_every_intermediate(family):
    """In the order of computation, so that the first failure names the part that is wrong."""
    reference, config, params = pair(*family)
    batch, values = make_row(config, (2,), seed=7)
    _, state = jax.jit(
        lambda: InternVL(config).apply({"params": params}, batch, mutable=["intermediates"])
    )()
    ours = state["intermediates"]
    seen = {}

    def keep(name):
        def hook(module, inputs, output):
            seen[name] = (output[0] if isinstance(output, tuple) else output).detach().numpy()

        return hook

    parts = reference.model
    hooks = [parts.vision_tower.embeddings.register_forward_hook(keep("embedded"))]
    hooks += [
        layer.register_forward_hook(keep(f"vision {i}"))
        for i, layer in enumerate(parts.vision_tower.encoder.layer)
    ]
    hooks += [parts.multi_modal_projector.register_forward_hook(keep("projected"))]
    hooks += [
        layer.register_forward_hook(keep(f"language {i}"))
        for i, layer in enumerate(parts.language_model.layers)
    ]
    first = parts.language_model.layers[0]
    hooks += [
        first.register_forward_pre_hook(
            lambda module, args, kwargs: seen.update(
                merged=(args or [kwargs["hidden_states"]])[0].detach().numpy()
            ),
            with_kwargs=True,
        )
    ]
    torch_logits(reference, batch["tokens"], values)
    for hook in hooks:
        hook.remove()
    expected = {"embedded": ours["vision"]["embedded"][0]}
    expected |= {
        f"vision {i}": value for i, value in enumerate(ours["vision"]["layers"]["block"][0])
    }
    expected |= {"projected": ours["projector"]["projected"][0], "merged": ours["merged"][0]}
    expected |= {
        f"language {i}": value for i, value in enumerate(ours["language"]["layers"]["block"][0])
    }
    assert set(expected) == set(seen)
    for name, value in expected.items():
        np.testing.assert_allclose(value, seen[name], err_msg=name, **TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: "-".join(map(str, family)))
def test_gradients(family):
    """Of every parameter, through a row with several images and text."""
    reference, config, params = pair(*family)
    batch, values = make_row(config, (2, 1), seed=13)
    shape = (*batch["tokens"].shape, config.language.vocab_size)
    weights = np.random.default_rng(0).standard_normal(shape, np.float32)
    ids = torch.from_numpy(batch["tokens"].astype(np.int64))
    reference.zero_grad()
    loss_gradients(lambda: reference(input_ids=ids, pixel_values=values).logits, batch, weights)
    gradients = {
        name: tensor.grad
        for name, tensor in reference.named_parameters()
        if tensor.grad is not None
    }
    gradients = {name: tensor.numpy() for name, tensor in in_files(gradients).items()}
    expected = params_from_tensors(config, gradients)
    assert_gradients(config, params, batch, weights, expected)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: "-".join(map(str, family)))
def test_greedy_tokens(family):
    """Prefill, cache and decode loop against transformers' generate."""
    reference, config, params = pair(*family)
    batch, values = make_row(config, (2, 1), seed=11)
    with torch.no_grad():
        ids = torch.from_numpy(batch["tokens"].astype(np.int64))
        mask = torch.ones_like(ids)
        out = reference.generate(
            input_ids=ids,
            pixel_values=values,
            attention_mask=mask,
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    ours = Generator(config, params).generate(
        [as_prompt(config, batch, (2, 1))], greedy(24, 1, config)
    )
    assert ours[0] == out[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize(
    "family",
    [*FAMILIES[:4], FAMILIES[5], FAMILIES[8]],
    ids=lambda family: "-".join(map(str, family)),
)
def test_ragged_batch_is_one_by_one(family):
    """Rows of different lengths, with and without images, against transformers' left-padded rows
    alone and ours alone.
    """
    _, config, params = pair(*family)
    shapes = [((1,), 3), ((), 9), ((2, 1), 5), ((3,), 1)]
    prompts = [
        as_prompt(config, make_row(config, tiles, seed=i, text=text, lead=text + 1)[0], tiles)
        for i, (tiles, text) in enumerate(shapes)
    ]
    generator = Generator(config, params)
    together = generator.generate(prompts, greedy(20, len(prompts), config))
    alone = [generator.generate([prompt], greedy(20, 1, config))[0] for prompt in prompts]
    assert together == alone


@pytest.mark.parametrize("llm", ["qwen2", "qwen3", "qwen3_moe"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_matches(side, llm):
    """A padded batch in transformers and the same rows here give the same logits at the real
    tokens.
    """
    reference, config, params = pair(llm=llm)
    rows = [make_row(config, (1,), seed=3)[0], make_row(config, (2,), seed=4, text=9)[0]]
    longest = max(row["tokens"].shape[1] for row in rows)
    tokens, mask = np.zeros((2, 2, longest), np.int64)
    values = torch.cat([pixels(row["tiles"][0], config) for row in rows])
    for i, row in enumerate(rows):
        length = row["tokens"].shape[1]
        place = slice(longest - length, None) if side == "left" else slice(0, length)
        tokens[i, place], mask[i, place] = row["tokens"][0], 1
    theirs = torch_logits(reference, tokens, values, attention_mask=torch.from_numpy(mask))
    positions = np.maximum(mask.cumsum(1) - 1, 0).astype(np.int32) * UNITS
    tiles = np.zeros((2, 2, *rows[0]["tiles"].shape[2:]), np.uint8)
    for i, row in enumerate(rows):
        tiles[i, : row["tiles"].shape[1]] = row["tiles"][0]
    batch = {
        "tokens": tokens.astype(np.int32),
        "positions": positions,
        "segments": mask.astype(np.int32),
        "tiles": tiles,
    }
    ours = np.asarray(apply(InternVL(config), params, batch))
    np.testing.assert_allclose(ours[mask > 0], theirs[mask > 0], **TOLERANCE)


@pytest.mark.parametrize("llm", ["qwen2", "qwen3", "qwen3_moe"])
def test_packed_rows_are_separate_rows(llm):
    reference, config, params = pair(llm=llm)
    rows = [make_row(config, tiles, seed=i)[0] for i, tiles in enumerate([(1,), (), (2, 1)])]
    packed = {
        "tokens": np.concatenate([row["tokens"] for row in rows], axis=1),
        "positions": np.concatenate([row["positions"] for row in rows], axis=1),
        "segments": np.concatenate(
            [row["segments"] * (i + 1) for i, row in enumerate(rows)], axis=1
        ),
        "tiles": np.concatenate([row["tiles"] for row in rows], axis=1),
    }
    ours = np.asarray(apply(InternVL(config), params, packed))[0]
    theirs = [
        torch_logits(reference, row["tokens"], pixels(row["tiles"][0], config))[0] for row in rows
    ]
    np.testing.assert_allclose(ours, np.concatenate(theirs), **TOLERANCE)


@pytest.mark.parametrize("llm", ["qwen3", "qwen3_moe"])
def test_a_released_file_of_qwen3_converts_to_the_same_model(llm):
    """The original layout of the same weights: no head_dim, id or tying by default."""
    reference, config, params = pair("300m", llm)
    original = from_hf(original_config(reference), image_token_id=120, has_head=True)
    assert original.language == config.language and config.language.head_dim == 12
    assert (config.language.qk_norm, config.language.rope_theta) == (True, 5e5)
    tensors = {name: tensor.numpy() for name, tensor in original_state_dict(reference).items()}
    for leaf, other in zip(
        jax.tree.leaves(params_from_tensors(original, tensors)),
        jax.tree.leaves(params),
        strict=True,
    ):
        np.testing.assert_array_equal(leaf, other)


@pytest.mark.parametrize("length", [24, 60])
def test_dynamic_scaling_beyond_the_trained_length(length):
    """Dynamic NTK with a maximum of 32 positions: off below it, on above it, as transformers 5
    does.
    """
    text = {
        "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
        "max_position_embeddings": 32,
    }
    reference, hf = build_reference(text=text)
    config = from_hf(hf)
    assert (
        config.language.rope_scaling,
        config.language.rope_factor,
        config.language.max_position,
    ) == ("dynamic", 2.0, 32)
    params = params_from_tensors(
        config, {name: tensor.numpy() for name, tensor in reference.state_dict().items()}
    )
    batch, values = make_row(config, (), seed=1, lead=length)
    theirs = torch_logits(reference, batch["tokens"], values)
    np.testing.assert_allclose(apply(InternVL(config), params, batch), theirs, **TOLERANCE)
    plain = dataclasses.replace(
        config, language=dataclasses.replace(config.language, rope_scaling="none")
    )
    off = apply(InternVL(config), params, batch, "none")
    np.testing.assert_array_equal(off, apply(InternVL(plain), params, batch))
    assert (length > 32) == (np.abs(np.asarray(off) - theirs).max() > 1e-2)


def test_positions_table_of_another_resolution():
    """A tile of other proportions: torch's bicubic interpolation of the position table."""
    reference, config, params = pair()
    rng = np.random.default_rng(0)
    for grid in [(4, 4), (6, 6), (3, 8)]:
        tile = torch.from_numpy(
            rng.normal(size=(1, 3, 4 * grid[0], 4 * grid[1])).astype(np.float32)
        )
        with torch.no_grad():
            embeddings = reference.model.vision_tower.embeddings
            theirs = embeddings.interpolate_pos_encoding(
                torch.zeros(1, 1 + grid[0] * grid[1], 32), 4 * grid[0], 4 * grid[1]
            )[0].numpy()
            tower = reference.model.vision_tower(tile).last_hidden_state.numpy()
        table = interpolate_positions(params["vision"]["position_embedding"], grid)
        np.testing.assert_allclose(table, theirs, rtol=1e-5, atol=1e-5)
        ours = VisionTower(config.vision, np.float32).apply(
            {"params": params["vision"]}, tile.permute(0, 2, 3, 1).numpy()
        )
        np.testing.assert_allclose(ours, tower, **TOLERANCE)


def test_pixel_shuffle_order():
    """v2 against transformers; v1 is v2 with the two spatial axes swapped."""
    reference, _, _ = pair()
    x = np.random.default_rng(0).normal(size=(2, 6, 4, 5)).astype(np.float32)
    theirs = reference.model.pixel_shuffle(torch.from_numpy(x).contiguous(), 0.5).numpy()
    ours = np.asarray(pixel_shuffle(x, 2))
    np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(pixel_shuffle(x, 2, "v1"), ours.swapaxes(1, 2))
    # (2 * row parity + column parity) * channels + channel = (2 * 1 + 0) * 5 + 3
    assert ours[1, 2, 1, 13] == x[1, 5, 2, 3]


@pytest.mark.parametrize("llm", ["internlm3", "qwen3", "qwen3_moe"])
def test_scanned_and_unrolled_layouts_agree(llm):
    _, config, params = pair("6b", llm, False)
    batch, _ = make_row(config, (2,), seed=5)
    generator = Generator(config, params)
    unrolled = apply(generator.model, generator.params, batch)
    np.testing.assert_allclose(
        unrolled, apply(InternVL(config), params, batch), rtol=1e-5, atol=1e-5
    )
    assert jax.tree.leaves(generator.params)[0].dtype == np.float32
