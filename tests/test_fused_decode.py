"""The fused kernels of decoding: their numbers, emulated on a CPU, and when they are used.

Compiling them needs jax's CUDA plugin, and running them a Hopper GPU, where `decodes_here` tries
them first.
"""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internvl3_jax.model import kv_cache, language
from internvl3_jax.model.language import float32_layer
from internvl3_jax.model.ops import fused_decode
from internvl3_jax.sizes import SIZES

# jax 0.10 emulates neither plgpu.load nor plgpu.layout_cast. With it, the kernels are not used.
if jax.__version_info__ >= fused_decode._JAX:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from internvl3_jax.model.ops.fused_attention import attend
    from internvl3_jax.model.ops.fused_layer import (
        attended_product,
        norm_product,
        swiglu_product,
    )
    from internvl3_jax.model.ops.fused_product import ROWS, Split

    EMULATED = plgpu.InterpretGPUParams()

EPSILON = 1e-6
CONFIG = dataclasses.replace(
    SIZES["1b"].language,
    num_layers=2,
    hidden_size=512,
    num_heads=8,
    num_kv_heads=2,
    intermediate_size=256,
    vocab_size=64,
)


def random(seed: int, *shape: int, dtype=np.float32) -> jax.Array:
    scale = shape[0] ** -0.5 if len(shape) == 2 and dtype == jnp.bfloat16 else 1.0
    return jnp.asarray(scale * np.random.default_rng(seed).normal(size=shape), dtype)


def error(found, expected) -> float:
    found, expected = (np.asarray(x, np.float64) for x in (found, expected))
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def double(*arrays) -> list[np.ndarray]:
    return [np.asarray(x, np.float64) for x in arrays]


if jax.__version_info__ >= fused_decode._JAX:

    @pytest.mark.parametrize(
        ("rows", "width", "inner", "up", "down"),
        [
            (1, 256, 512, Split(1), Split(2)),
            # Parts of unequal length, whose windows overlap; wider blocks.
            (3, 384, 640, Split(2), Split(3, 128)),
            (8, 128, 128, Split(1, 128), Split(1)),
        ],
    )
    def test_mlp(rows, width, inner, up, down):
        stream = random(0, rows, width).astype(jnp.bfloat16)
        partials, scale = random(1, 2, ROWS, width), random(2, width)
        first = random(3, width, 2 * inner, dtype=jnp.bfloat16)
        second = random(4, inner, width, dtype=jnp.bfloat16)
        parts, new, squares = norm_product(stream, partials, scale, first, up, EMULATED)
        out = swiglu_product(parts, squares, second, rows, EPSILON, down, EMULATED)

        x, added, scale, first, second = double(stream, partials, scale, first, second)
        x = x + added.sum(axis=0)[:rows]
        y = x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + EPSILON) * scale
        gate, value = np.split(y @ first, 2, axis=-1)
        assert error(new, x) < 3e-3
        assert error(squares.sum(axis=0)[:rows], np.square(double(new)[0]).sum(axis=-1)) < 1e-5
        expected = (gate / (1 + np.exp(-gate)) * value) @ second
        assert error(out.sum(axis=0)[:rows], expected) < 8e-3

    @pytest.mark.parametrize(
        ("heads", "width", "capacity", "chunk", "slots"),
        [
            (8, 64, 128, 64, [70]),
            # The first token; slots that end a chunk and a tile; chunks without tokens.
            (8, 128, 192, 128, [0, 128, 64]),
        ],
    )
    def test_attention(heads, width, capacity, chunk, slots):
        rows, kv_heads, all_heads = len(slots), 2, heads + 4
        partials = random(0, 3, ROWS, all_heads * width)
        squares = jnp.abs(random(1, 2, ROWS)) * heads * width
        bias = random(2, all_heads * width).astype(jnp.bfloat16)
        angle = np.random.default_rng(3).normal(size=(rows, width // 2))
        cos, sin = (jnp.asarray(f(angle), jnp.float32) for f in (np.cos, np.sin))
        caches = [
            random(seed, rows, kv_heads, capacity, width).astype(jnp.bfloat16) for seed in (4, 5)
        ]
        weight = random(6, heads * width, heads * width, dtype=jnp.bfloat16)
        at = jnp.asarray(slots, jnp.int32)
        inputs = partials, squares, bias, cos, sin, at, *caches
        out, lse, k_cache, v_cache = attend(*inputs, heads * width, EPSILON, chunk, EMULATED)
        split = Split(2, unit=width, step=4 * width)
        found = attended_product(out, lse, weight, split, EMULATED).sum(axis=0)[:rows]

        partials, squares, bias, keys, values, weight = double(
            partials, squares, bias, *caches, weight
        )
        rate = 1 / np.sqrt(squares.sum(axis=0)[:rows, None] / (heads * width) + EPSILON)
        x = (partials.sum(axis=0)[:rows] * rate + bias).reshape(rows, all_heads, width)
        first, second = np.split(x[:, : heads + kv_heads], 2, axis=-1)
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
        q = np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
        expected = np.zeros((rows, heads, width))
        for row, slot in enumerate(slots):
            keys[row, :, slot] = q[row, heads:]
            values[row, :, slot] = x[row, heads + kv_heads :]
            for head in range(heads):
                seen = keys[row, head // (heads // kv_heads), : slot + 1]
                weights = np.exp(seen @ q[row, head] * width**-0.5)
                seen = values[row, head // (heads // kv_heads), : slot + 1]
                expected[row, head] = weights / weights.sum() @ seen
        assert error(k_cache, keys) < 2e-3 and error(v_cache, values) < 2e-3
        assert error(found, expected.reshape(rows, -1) @ weight) < 8e-3

    def test_two_layers_agree_with_the_decoder():
        assert fused_decode._trial_error(CONFIG, 2, float32_layer, 192, EMULATED) < 0.01

    @pytest.mark.parametrize("rows", [1, 8])
    @pytest.mark.parametrize("size", ["1b", "2b", "8b"])
    def test_splits_of_the_released_sizes(size, rows):
        config = SIZES[size].language
        width, inner = config.hidden_size, config.intermediate_size
        plan = fused_decode.plan(config, rows)
        qkv = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        shapes = (width, qkv), (width, width), (width, 2 * inner), (inner, width)
        for name, (depth, outputs) in zip(
            ("qkv", "output", "gate_up", "down"), shapes, strict=True
        ):
            split = getattr(plan, name)
            assert depth % split.unit == 0 and outputs % split.width == 0
            assert split.window(depth) % split.step == 0
            assert split.most(depth) * 64 <= split.window(depth)
            assert split.shared_bytes(depth, outputs) <= 227 * 1024


# --- when they are used --------------------------------------------------------------------------


@pytest.fixture
def on_hopper(monkeypatch):
    """Lets this CPU pass for a GPU on which the kernels work."""
    monkeypatch.setattr(fused_decode, "_JAX", (0,))
    monkeypatch.setattr(fused_decode, "platform", lambda: "gpu")
    monkeypatch.setattr(fused_decode, "_is_one_hopper", lambda: True)
    monkeypatch.setattr(fused_decode, "_works", lambda *arguments: True)


def shapes_of(config, rows: int, dtype=jnp.bfloat16, length: int = 1):
    """Returns the layers' variables, embeddings and cache, as shapes."""

    def make():
        x, params, cache = fused_decode._trial_inputs(config, rows, 64)
        layers = [{"params": layer} for layer in params.values()]
        x = jnp.broadcast_to(x, (rows, length, config.hidden_size))
        return jax.tree.map(lambda y: y.astype(dtype), (layers, x, cache))

    return jax.eval_shape(make)


def test_bfloat16_layers_of_few_rows_are_taken(on_hopper):
    for size in ("1b", "2b"):
        config = SIZES[size].language
        for rows in (1, 8):
            assert fused_decode.decodes_here(config, *shapes_of(config, rows), float32_layer)


def test_what_the_kernels_do_not_take(on_hopper):
    def taken(config=CONFIG, change=lambda layer: layer, **arguments):
        layers, x, cache = shapes_of(config, **({"rows": 1} | arguments))
        layers = [change(layer) for layer in layers]
        return fused_decode.decodes_here(config, layers, x, cache, float32_layer)

    def with_params(name, **entries):
        return lambda layer: {"params": layer["params"] | {name: layer["params"][name] | entries}}

    vector = jax.ShapeDtypeStruct((512,), jnp.bfloat16)
    assert taken()
    assert not taken(rows=9)
    assert not taken(length=2)
    assert not taken(dtype=jnp.float32)
    assert not taken(change=lambda layer: layer | {"lora": {"q": {"a": vector}}})
    assert not taken(change=with_params("down", kernel={"quantized": vector}))
    assert not taken(change=with_params("o", bias=vector))
    # Norms of q and k.
    norm = {"q_norm": {"scale": vector}}
    assert not taken(change=lambda layer: {"params": layer["params"] | norm})
    assert not taken(dataclasses.replace(CONFIG, qk_norm=True))
    # Heads of a width that is no tile's, and weights that take longer than kernels to start.
    assert not taken(dataclasses.replace(CONFIG, num_heads=16, head_dim=32))
    assert not taken(SIZES["8b"].language)


def test_an_older_jax_does_not_import_the_kernels(on_hopper, monkeypatch):
    monkeypatch.setattr(fused_decode, "_JAX", (99,))
    assert not fused_decode.decodes_here(CONFIG, *shapes_of(CONFIG, 1), float32_layer)


@pytest.mark.parametrize(
    ("capability", "taken"), [("9.0", True), ("8.0", False), ("10.0", False), (None, False)]
)
def test_only_hopper(monkeypatch, capability, taken):
    device = types.SimpleNamespace()
    if capability:
        device.compute_capability = capability
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert fused_decode._is_one_hopper() == taken


def failing(*arguments):
    raise ValueError("no such layout\nand more")


@pytest.mark.parametrize(
    ("trial", "works", "note"),
    [
        (lambda *arguments: 0.007, True, ""),
        (lambda *arguments: 0.3, False, "they are wrong by 30.0%"),
        (failing, False, "ValueError: no such layout"),
    ],
)
def test_the_trial_decides(monkeypatch, capsys, trial, works, note):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(fused_decode, "_trial_error", trial)
    fused_decode._works.cache_clear()
    try:
        assert fused_decode._works(CONFIG, 1, float32_layer) == works
        assert fused_decode._works(CONFIG, 1, float32_layer) == works
    finally:
        fused_decode._works.cache_clear()
    printed = capsys.readouterr().err
    assert printed.count("note:") == (not works) and note in printed


def test_the_decoder_takes_them(monkeypatch):
    decoder = language.Decoder(CONFIG, jnp.bfloat16, unrolled=True)
    cache = kv_cache.init_cache(CONFIG, 2, 64, jnp.bfloat16)
    x = random(0, 2, 1, CONFIG.hidden_size).astype(jnp.bfloat16)
    ones = jnp.ones((2, 1), jnp.int32)
    arguments = x, 256 * ones, None, cache, ones
    variables = decoder.init(jax.random.key(0), *arguments)
    monkeypatch.setattr(language, "platform", lambda: "gpu")
    monkeypatch.setattr(fused_decode, "decodes_here", lambda *arguments: True)
    calls = []

    def layers(config, layers, x, rope, slots, cache):
        calls.append((layers, slots))
        return 2 * x, cache

    monkeypatch.setattr(fused_decode, "decode_layers", layers)
    hidden, _ = decoder.apply(variables, *arguments)
    [(given, slots)] = calls
    assert given[1]["o"]["kernel"] is variables["params"]["layer_1"]["o"]["kernel"]
    assert slots is ones
    mean = np.square(np.asarray(x, np.float32)).mean(axis=-1, keepdims=True)
    np.testing.assert_allclose(np.asarray(hidden, np.float32), x / np.sqrt(mean), rtol=0.02)
    # Not for several tokens.
    cache = kv_cache.init_cache(CONFIG, 1, 64, jnp.bfloat16)
    decoder.apply(variables, x.reshape(1, 2, -1), ones.T, None, cache, ones.T)
    assert len(calls) == 1
