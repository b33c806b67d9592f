"""Weights of fewer bits for inference: what is quantized, what is computed with it, on one device
and on several, with adapters and as a critic.
"""

import dataclasses
import functools
import logging
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internvl3_jax import Chat, Critic, load
from internvl3_jax.checkpoints import checkpoint as checkpoint_module
from internvl3_jax.checkpoints import storage
from internvl3_jax.config import MeshConfig
from internvl3_jax.fit.lowering import Requests, lower_generation
from internvl3_jax.inference import layout, programs
from internvl3_jax.inference.generator import Generator
from internvl3_jax.model import lora, weights
from internvl3_jax.model.internvl import InternVL, abstract_params
from internvl3_jax.model.ops import linear
from internvl3_jax.model.ops.quantize import FORMATS, dequantize, quantize
from internvl3_jax.parallel.sharding import make_mesh, param_shardings
from internvl3_jax.sizes import SIZES
from tests.support.batches import batch
from tests.support.generation import PARAMS, RAGGED, make_run
from tests.support.lora_setup import SETTINGS, config_of, drawn, start
from tests.support.tiny_checkpoint import CONFIG, directory, make_image, train_config

PER_COLUMN = ("int8", "fp8")


@functools.cache
def packed(kind, tower=True):
    leaves = storage.by_path(PARAMS)
    return storage.nest(
        {
            path: weights.quantize_leaf(path, jnp.asarray(leaf), kind, tower)
            for path, leaf in leaves.items()
        }
    )


@functools.partial(jax.jit, static_argnums=2)
def logits(params, values, dtype=jnp.float32):
    return InternVL(CONFIG, dtype).apply({"params": params}, values)


# --- the numbers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("stacked", [False, True])
def test_a_column_keeps_its_largest_value(stacked):
    """int8 is within half a step of absmax / 127, fp8 within 2^-4 of each value and the smallest
    number of float8; zeros stay zeros.
    """
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((3, 64, 24), np.float32) * np.logspace(-6, 3, 24, dtype=np.float32)
    kernel[..., 5] = 0
    kernel = kernel if stacked else kernel[0]
    largest = np.abs(kernel).max(axis=-2, keepdims=True)
    for kind, count in (("int8", 127), ("fp8", 448)):
        few = quantize(jnp.asarray(kernel), kind)
        assert few[kind].shape == kernel.shape and few[kind].dtype.itemsize == 1
        assert few["scales"].shape == largest.shape and few["scales"].dtype == jnp.float32
        scales = np.where(largest > 0, largest / count, 1)
        np.testing.assert_allclose(few["scales"], scales, rtol=1e-6)
        back = np.asarray(dequantize(few, jnp.float32))
        bound = scales / 2 if kind == "int8" else np.abs(kernel) / 16 + scales / 512
        assert (np.abs(back - kernel) <= 1.0001 * bound).all() and not back[..., 5].any()
        reached = np.abs(np.asarray(few[kind].astype(jnp.float32))).max(axis=-2)
        assert set(np.unique(reached)) == {0.0, float(count)}


@pytest.mark.parametrize("kind", FORMATS)
def test_the_model_computes_with_the_kernels_that_are_kept(kind):
    """As one whose kernels are those, unpacked, but for the order of rounding in float32."""
    few = packed(kind)
    plain = lora.merged(few)
    assert jax.tree.structure(plain) == jax.tree.structure(PARAMS)
    expected = logits(plain, batch(2))
    np.testing.assert_allclose(logits(few, batch(2)), expected, atol=3e-5, rtol=1e-5)
    assert np.abs(np.asarray(expected) - logits(PARAMS, batch(2))).max() > 1e-2


def test_bfloat16_scales_are_not_rounded():
    """The float32 product is scaled and then rounded once: closer to float32 than kernels that are
    unpacked to bfloat16 first.
    """
    few = packed("int8")
    exact = logits(few, batch(2))
    in_bfloat16 = logits(weights.cast(few, jnp.bfloat16), batch(2), jnp.bfloat16)
    unpacked = logits(lora.merged(few, dtype=jnp.bfloat16), batch(2), jnp.bfloat16)
    ours, theirs = (np.abs(np.asarray(x) - exact).mean() for x in (in_bfloat16, unpacked))
    assert ours < theirs


# --- generation ----------------------------------------------------------------------------------


@functools.cache
def tokens_of(kind):
    return Generator(CONFIG, lora.merged(packed(kind))).generate(RAGGED, make_run(len(RAGGED)))


@pytest.mark.parametrize("is_large", [True, False])
@pytest.mark.parametrize("kind", FORMATS)
def test_generated_tokens_are_those_of_the_unpacked_kernels(monkeypatch, kind, is_large):
    """In the layout of a large model on a CPU, and with the merged kernels of others."""
    expected = tokens_of(kind)
    monkeypatch.setattr(layout, "LARGE", 0 if is_large else layout.LARGE)
    generator = Generator(CONFIG, packed(kind))
    names = {leaf.dtype.name for leaf in jax.tree.leaves(generator.params)}
    stored = {"int8": "int8", "fp8": "float8_e4m3fn", "nf4": "uint8"}[kind]
    assert names == {"float32", stored}
    assert ("q" if is_large else "qkv") in generator.params["language"]["layer_0"]
    assert generator.generate(RAGGED, make_run(len(RAGGED))) == expected


@pytest.mark.parametrize("kind", PER_COLUMN)
@pytest.mark.parametrize(
    "axes", [{"fsdp": 1, "tensor": 2}, {"fsdp": 2, "tensor": 1}, {"fsdp": 2, "tensor": 2}], ids=str
)
def test_several_devices_generate_the_same(kind, axes):
    mesh = make_mesh(MeshConfig(**axes), jax.devices()[: axes["fsdp"] * axes["tensor"]])
    params = jax.device_put(packed(kind), param_shardings(packed(kind), mesh))
    generator = Generator(CONFIG, params)
    assert generator.generate(RAGGED, make_run(len(RAGGED))) == tokens_of(kind)
    kernel = generator.params["language"]["layer_0"]["down"]["kernel"][kind]
    assert kernel.addressable_shards[0].data.size * mesh.size == kernel.size


def test_what_8b_takes():
    """A byte a parameter, but for embedding, tower and the small ones, which stay in bfloat16."""
    base = storage.by_path(abstract_params(SIZES["8b"], jnp.bfloat16))
    decoder = {path: leaf for path, leaf in base.items() if path.startswith("language/")}
    read = [path for path in decoder if path != "language/embedding"]  # for each token
    few = weights.abstract_quantized({path: decoder[path] for path in read}, "int8")
    sizes = [
        sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
        for leaves in (few.values(), [decoder[path] for path in read])
    ]
    assert sizes[0] < 0.502 * sizes[1]


@pytest.mark.parametrize("kind", PER_COLUMN)
def test_blocks_of_rows_are_the_product(kind):
    """As a CPU decodes; kernels of more than a block, and rows that no block but 1 divides."""
    rng = np.random.default_rng(0)
    for rows, columns in ((96, 2**13), (7, 24), (101, 2**12)):
        x = jnp.asarray(rng.standard_normal((2, 1, rows)), jnp.float32)
        values = quantize(jnp.asarray(rng.standard_normal((rows, columns)), jnp.float32), kind)[
            kind
        ]
        expected = np.asarray(x) @ np.asarray(values.astype(jnp.float32))
        found = jax.jit(linear.decoding_dot, static_argnums=0)(None, x, values)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_two_rows_are_one(monkeypatch):
    """The form of a GPU, for one answer and for several."""
    monkeypatch.setattr(linear, "platform", lambda: "gpu")
    programs.decode.clear_cache()
    generator = Generator(CONFIG, packed("int8"))
    for prompt, answer in zip(RAGGED, tokens_of("int8"), strict=True):
        assert generator.generate([prompt], make_run()) == [answer]
    programs.decode.clear_cache()


@pytest.mark.optimized
def test_decoding_keeps_no_unpacked_kernel():
    """The compiled loop over tokens has less in temporaries than one layer's kernels unpacked, and
    half of the arguments of float16 kernels or less.
    """
    wide = dataclasses.replace(
        CONFIG.language, hidden_size=256, intermediate_size=2048, vocab_size=8192, num_layers=4
    )
    config = dataclasses.replace(train_config(), model=dataclasses.replace(CONFIG, language=wide))
    config = dataclasses.replace(config, compute_dtype="float32")
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    layer = 4 * 3 * 256 * 2048

    def memory(kind):
        requests = Requests(rows=1, prompt=64, new=32, tiles=1, weights=kind)
        compiled = lower_generation(config, mesh, requests)["decode"].compile()
        memory = compiled.memory_analysis()
        return memory.argument_size_in_bytes, memory.temp_size_in_bytes

    full, few = memory(None), memory("int8")
    embedding = 4 * 256 * 8192  # stays in float32
    assert few[1] < full[1] + layer / 2
    assert few[0] - embedding < 0.3 * (full[0] - embedding)


# --- loading -------------------------------------------------------------------------------------


def kinds(params):
    return {path: leaf.dtype.name for path, leaf in storage.by_path(params).items()}


def test_load_quantizes_layers_and_head():
    plain, few = load(directory()), load(directory(), weights="int8")
    tower = load(directory(), weights="int8", quantize_tower=True)
    assert few.weights == "int8" and plain.weights is None and "int8" in repr(few)
    small = {path for path, dtype in kinds(few.params).items() if dtype == "int8"}
    layers = [f"language/layers/{name}/kernel/int8" for name in "q k v o gate up down".split()]
    assert small == {*layers, "language/head/kernel/int8"}
    more = {path for path, dtype in kinds(tower.params).items() if dtype == "int8"} - small
    names = [f"vision/layers/{name}" for name in "qkv proj fc1 fc2".split()]
    names += ["projector/fc1", "projector/fc2"]
    assert more == {f"{name}/kernel/int8" for name in names}
    before = storage.by_path(plain.params)
    for path, leaf in storage.by_path(few.params).items():
        if not weights.is_part(path):
            np.testing.assert_array_equal(leaf, before[path])
    # NF4 is for layers alone.
    nf4 = {path for path, dtype in kinds(load(directory(), weights="nf4").params).items()}
    assert "language/head/kernel" in nf4 and "language/layers/q/kernel/nf4" in nf4


def test_load_onto_devices_keeps_shards():
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4])
    few = load(directory(), weights="int8", mesh=mesh).params
    for leaf, sharding in zip(
        jax.tree.leaves(few), jax.tree.leaves(param_shardings(few, mesh)), strict=True
    ):
        assert leaf.sharding == sharding


def test_what_cannot_be_computed_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="weights is 'int4'; it must be one of int8, fp8, nf4"):
        load(directory(), weights="int4")
    with pytest.raises(ValueError, match="quantize_tower is set and weights is not"):
        load(directory(), quantize_tower=True)
    mesh = make_mesh(MeshConfig(fsdp=1, tensor=2), jax.devices()[:2])
    with pytest.raises(ValueError, match="weights is nf4, which several devices would unpack"):
        load(directory(), weights="nf4", mesh=mesh)
    old = types.SimpleNamespace(platform="gpu", device_kind="A100", compute_capability="8.0")
    with pytest.raises(ValueError, match=r"A100 \(compute capability 8.0\) has no float8.*int8"):
        weights._check_float8(old, "weights")

    def fails(device):
        raise NotImplementedError("no such type\nand a trace")

    monkeypatch.setattr(weights, "_try_float8", fails)
    with pytest.raises(ValueError, match=r"cannot multiply float8 on cpu \(no such type\)"):
        load(directory(), weights="fp8")


# --- adapters and the critic ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMATS)
def test_adapters_work_on_quantized_kernels(kind):
    """As on the unpacked kernels, also one that replaces a kernel."""
    adapter = lora.scaled(drawn(PARAMS), SETTINGS)
    whole = {
        "language": {"head": {"kernel": 2 * jnp.asarray(PARAMS["language"]["head"]["kernel"])}}
    }
    adapters = {
        "a": checkpoint_module.Adapter(adapter),
        "b": checkpoint_module.Adapter(adapter, whole),
    }
    few = Generator(CONFIG, packed(kind), named_adapters=adapters)
    plain = Generator(CONFIG, lora.merged(packed(kind)), named_adapters=adapters)
    answers = {}
    for name in (None, "a", "b"):
        few.use(name), plain.use(name)
        answers[name] = few.generate(RAGGED, make_run(len(RAGGED)))
        assert answers[name] == plain.generate(RAGGED, make_run(len(RAGGED)))
    assert answers["a"] != answers[None]


def test_adapters_are_compared_with_their_base_before_it_is_quantized(lora_base, tmp_path, caplog):
    config = config_of(lora_base, steps=3)
    start(config, tmp_path / "run")
    with caplog.at_level(logging.WARNING):
        few = load(lora_base, adapters={"a": tmp_path / "run"}, weights="int8")
    assert not caplog.records
    chat = Chat(few, "a", max_new_tokens=6)
    with_adapter = chat("What?", images=[make_image(20, 20)])
    chat.use(None)
    assert isinstance(with_adapter, str) and isinstance(chat("What?"), str)
    other = load(lora_base)
    other.params["language"]["norm"]["scale"] += 1e-6
    files = other.processor, other.tokenizer.files()
    checkpoint_module.save_checkpoint(tmp_path / "other", other.params, other.config, *files)
    with pytest.raises(ValueError, match="this base has other parameters"):
        load(tmp_path / "other", adapters={"a": tmp_path / "run"}, weights="int8")
    # A LoRA run opens merged, and is quantized then.
    merged = load(tmp_path / "run", weights="int8")
    assert merged.weights == "int8"
    expected = weights.quantize_leaf(
        "language/layers/q/kernel",
        load(tmp_path / "run").params["language"]["layers"]["q"]["kernel"],
        "int8",
    )
    jax.tree.map(
        np.testing.assert_array_equal, merged.params["language"]["layers"]["q"]["kernel"], expected
    )


def test_a_critic_scores_with_quantized_kernels():
    few = load(directory(), weights="int8", quantize_tower=True)
    plain = load(directory())
    plain.params = lora.merged(few.params)
    question, images = "How many?", [make_image(40, 20)]
    solutions = ["1, 2\n\n1 + 2 = 3\n\nAnswer: 3", "7"]
    for ours, theirs in zip(
        Critic(few).score(question, images, solutions),
        Critic(plain).score(question, images, solutions),
        strict=True,
    ):
        np.testing.assert_allclose(ours.scores, theirs.scores, atol=1e-5)


def test_infer_takes_weights(ask):
    answer, _ = ask(prompt="What?", weights="int8", quantize_tower=True)
    assert answer.strip()
    plain, _ = ask(prompt="What?")
    assert plain.strip()
