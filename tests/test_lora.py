"""Adapters: what they compute, what is trained, how they are split, merged, switched and refused."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internvl3_jax.checkpoints import adapters, storage
from internvl3_jax.checkpoints.adapters import Adapter
from internvl3_jax.config import LoraConfig, MeshConfig, OptimizerConfig
from internvl3_jax.data.batch import Prompt
from internvl3_jax.inference.generation_config import GenerationConfig
from internvl3_jax.inference.generator import Generator
from internvl3_jax.inference.sampling import Sampling
from internvl3_jax.model import language, lora, vision
from internvl3_jax.model.internvl import InternVL, abstract_params
from internvl3_jax.parallel import sharding
from internvl3_jax.sizes import SIZES
from internvl3_jax.training.param_table import component_table
from internvl3_jax.training.step import trained_paths
from tests.support.batches import batch
from tests.support.lora_setup import EVERYWHERE, SETTINGS, adapted, logits, step_of
from tests.support.meshes import MESHES, PLANNED, STYLES, mesh_of
from tests.support.tiny_checkpoint import CONFIG, random_params, train_config
from tests.support.train_step import GRADIENT, assert_close, by_path

SOME = dataclasses.replace(SETTINGS, targets=("vision/layers/fc2", "language/layers/(q|v|up|down)"))


# --- what they compute ---------------------------------------------------------------------------


def test_new_adapters_change_nothing():
    params = random_params(CONFIG)
    new = params | {lora.SUBTREE: lora.init(params, SETTINGS, jax.random.key(0))}
    expected = logits(CONFIG, {"params": params}, batch(2))
    np.testing.assert_array_equal(logits(CONFIG, lora.variables(new, SETTINGS), batch(2)), expected)
    np.testing.assert_array_equal(
        logits(CONFIG, lora.variables(lora.base_params(adapted()), SETTINGS), batch(2)), expected
    )


def test_a_is_drawn_as_peft_draws_it():
    """Uniform within 1 / sqrt(in), whatever other layers have adapters."""
    params = abstract_params(SIZES["tiny"])
    wide = dataclasses.replace(SETTINGS, rank=64)
    every = lora.init(params, wide, jax.random.key(0))
    few = lora.init(params, dataclasses.replace(wide, targets=EVERYWHERE[2:]), jax.random.key(0))
    np.testing.assert_array_equal(
        every["language"]["layers"]["down"]["a"], few["language"]["layers"]["down"]["a"]
    )
    a = np.asarray(every["language"]["layers"]["down"]["a"]) * 256**0.5
    assert (
        a.shape == (4, 256, 64)
        and 0.999 < np.abs(a).max() <= 1
        and a.std() == pytest.approx(3**-0.5, rel=0.01)
    )
    assert not any(leaf.any() for path, leaf in by_path(every).items() if path.endswith("b"))


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("rslora", [False, True])
def test_merged_is_the_same_model(style, rslora):
    settings = dataclasses.replace(SETTINGS, rslora=rslora)
    params = adapted(style)
    merged = lora.merged(params, settings)
    assert jax.tree.structure(merged) == jax.tree.structure(lora.base_params(params))
    found = logits(STYLES[style], {"params": merged}, batch(2))
    expected = logits(STYLES[style], lora.variables(params, settings), batch(2))
    base = logits(STYLES[style], {"params": lora.base_params(params)}, batch(2))
    np.testing.assert_allclose(found, expected, atol=2e-5, rtol=1e-5)
    assert np.abs(expected - base).max() > 1
    scale = 6 / 3**0.5 if rslora else 2
    layer = params["language"]["layers"]["k"]["kernel"]
    adapter = params["lora"]["language"]["layers"]["k"]
    np.testing.assert_allclose(
        merged["language"]["layers"]["k"]["kernel"],
        layer + scale * adapter["a"] @ adapter["b"],
        atol=1e-6,
    )


def test_dropout_drops_inputs_of_adapters_in_training_alone():
    """Kept ones grow by what is dropped, so that the mean over many draws is the output without."""
    settings = LoraConfig(rank=3, alpha=6.0, targets=("projector/fc2",), dropout=0.4)
    params = adapted(settings=settings)
    tiles = batch(2)["tiles"].reshape(-1, 16, 16, 3)[:2]

    def encode(variables, key):
        return InternVL(CONFIG).apply(
            variables, tiles, rngs={"dropout": key}, method=InternVL.encode
        )

    plain = encode(lora.variables(params, settings), jax.random.key(0))
    base = InternVL(CONFIG).apply(
        {"params": lora.base_params(params)}, tiles, method=InternVL.encode
    )
    training = jax.jit(
        jax.vmap(functools.partial(encode, lora.variables(params, settings, training=True)))
    )
    draws = np.asarray(training(jax.random.split(jax.random.key(1), 1000))) - np.asarray(base)
    spread = np.std(draws, axis=0)
    assert (spread > 0.01).mean() > 0.9
    assert (
        np.abs(draws.mean(0) - np.asarray(plain - base)) / (spread / 1000**0.5)
    ).mean() == pytest.approx((2 / np.pi) ** 0.5, rel=0.1)


# --- what is trained -----------------------------------------------------------------------------


def test_adapters_and_what_is_named_are_trained():
    settings = dataclasses.replace(SOME, full=("projector/.*",))
    before, after, metrics, optimizer = step_of(settings)
    changed = {
        path
        for path, leaf in by_path(after.params).items()
        if (leaf != by_path(before.params)[path]).any()
    }
    assert changed == set(trained_paths(before.params, optimizer))
    assert {path.split("/")[0] for path in changed} == {"lora", "projector"}
    moments = {
        path.split("/mu/")[-1]
        for path in by_path(jax.tree.map(np.asarray, after.opt_state))
        if "/mu/" in path
    }
    assert moments == changed, "the optimizer knows nothing else"
    assert (
        set(metrics) >= {"grad_norm_lora", "grad_norm_projector"}
        and int(metrics["zero_gradient"]) == -1
    )


def test_the_table_names_adapters():
    params = adapted()
    rows = {
        row.name: row
        for row in component_table(
            params, OptimizerConfig(freeze=("(?!lora/).*",), vision_lr_scale=0.5)
        )
    }
    count = sum(leaf.size for leaf in jax.tree.leaves(params["lora"]))
    assert (
        rows["all"].trained
        == count
        == sum(rows[f"{part} adapters"].trained for part in ("vision", "projector", "language"))
    )
    assert rows["language layers"].trained == rows["vision"].state_bytes == 0
    assert rows["vision adapters"].rates == pytest.approx((2e-5, 2e-5)) and rows[
        "language adapters"
    ].rates == pytest.approx((4e-5, 4e-5))


def test_a_may_stand_still_only_while_b_is_zero():
    params = random_params(CONFIG)
    new = params | {lora.SUBTREE: lora.init(params, SETTINGS, jax.random.key(0))}
    _, after, metrics, _ = step_of(SETTINGS, params=new)
    assert int(metrics["zero_gradient"]) == -1
    assert by_path(after.params)["lora/language/layers/q/b"].any()
    # A layer that nothing reaches: its adapter's a does not change although its b is not zero.
    dead = jax.tree.map(np.asarray, adapted())
    dead["vision"]["layers"]["layer_scale2"] = np.zeros_like(
        dead["vision"]["layers"]["layer_scale2"]
    )
    before, _, metrics, optimizer = step_of(SETTINGS, params=dead)
    assert (
        trained_paths(before.params, optimizer)[int(metrics["zero_gradient"])]
        == "lora/vision/layers/fc1/a"
    )


@functools.cache
def descended():
    """(parameters, metrics) after a plain step along the gradient, of a batch of eight rows on one
    device.
    """
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    _, after, metrics, _ = step_of(SETTINGS, GRADIENT, mesh=mesh)
    return jax.device_get((after.params, metrics))


def test_micro_batches_are_the_batch():
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    _, after, metrics, _ = step_of(SETTINGS, GRADIENT, mesh=mesh, micro_batches=2)
    assert_close(jax.device_get((after.params, metrics)), descended())


# --- how they are split --------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("quantized", ["none", "int8", "nf4"])
def test_every_parameter_matches_one_rule(size, quantized):
    base = abstract_params(SIZES[size], jnp.bfloat16)
    settings = dataclasses.replace(SETTINGS, rank=16, quantize=quantized)
    shapes = jax.eval_shape(
        lambda base: (
            lora.prepare_base(base, settings)
            | {"lora": lora.init(base, settings, jax.random.key(0))}
        ),
        base,
    )
    for name in storage.by_path(shapes):
        assert sum(bool(re.fullmatch(pattern, name)) for pattern, _ in sharding.RULES) == 1, name
    if size == "tiny":
        return
    kernels = storage.by_path(base)
    for sizes in PLANNED:
        if quantized == "nf4" and sizes["fsdp"] > 64:
            # rows in pairs: of 3200 there are 1600, and the error says what does divide them
            continue
        mesh = mesh_of(sizes)
        places = storage.by_path(sharding.param_shardings(shapes, mesh))
        for name, leaf in storage.by_path(shapes["lora"]).items():
            layer, part = name.rsplit("/", 1)
            rows, columns = sharding.spec(
                f"{layer}/kernel", kernels[f"{layer}/kernel"].shape, mesh
            )[-2:]
            wanted = (rows, None) if part == "a" else (None, columns)
            assert tuple(places[f"lora/{name}"].spec)[-2:] == wanted and leaf.dtype == jnp.float32


@pytest.mark.parametrize("name", ["fsdp", "all"])
def test_every_mesh_is_one_device(name):
    mesh = sharding.make_mesh(MESHES[name])
    _, after, metrics, _ = step_of(SETTINGS, GRADIENT, mesh=mesh)
    assert_close(jax.device_get((after.params, metrics)), descended())
    places = storage.by_path(sharding.param_shardings(after.params, mesh))
    assert all(any(places[f"lora/language/layers/{part}"].spec) for part in ("q/a", "down/b"))


# --- in generation -------------------------------------------------------------------------------


@pytest.mark.parametrize("style, settings", [("300m", SETTINGS), ("300m", SOME), ("qwen3", SOME)])
@pytest.mark.parametrize("fused", [True, False])
def test_the_generation_layout_computes_the_same(style, settings, fused):
    """Also where only some of the merged products have an adapter."""
    config, params = STYLES[style], adapted(style, settings)
    scaled = lora.scaled(params["lora"], settings)
    tower, decoder = (
        vision.unroll(params["vision"], config.vision),
        language.unroll(params["language"], config.language, fused),
    )
    unrolled = lora.base_params(params) | {"vision": tower, "language": decoder}
    unrolled |= {"lora": adapters.unroll(scaled, config, fused, True)}
    model = InternVL(config, unrolled=True, unrolled_vision=True, fused=fused)
    found = jax.jit(model.apply)(lora.variables(unrolled), batch(2))
    expected = logits(config, lora.variables(params, settings), batch(2))
    np.testing.assert_allclose(found, expected, atol=2e-5, rtol=1e-5)


def prompt_of(seed=0):
    tokens = np.random.default_rng(seed).integers(0, 400, 9).astype(np.int32)
    return Prompt(tokens, 256 * np.arange(9, dtype=np.int32), [], [])


def test_one_generator_answers_with_each_adapter():
    """As one that has it merged; and the base afterwards as before."""
    params = random_params(CONFIG)
    projector = jax.tree.map(lambda leaf: 2 * leaf, params["projector"])
    named = {
        "one": Adapter(lora.scaled(adapted(seed=1)["lora"], SETTINGS), {"projector": projector}),
        "two": Adapter(lora.scaled(adapted(settings=SOME, seed=2)["lora"], SOME)),
    }
    generator = Generator(CONFIG, params, named_adapters=named)
    run = GenerationConfig(6, Sampling(), (0,), "none")
    expected = {None: Generator(CONFIG, params)}
    for name, adapter in named.items():
        expected[name] = Generator(
            CONFIG, lora.merged(params | adapter.whole | {"lora": adapter.lora})
        )
    answers = {name: other.generate([prompt_of()], run) for name, other in expected.items()}
    assert len({str(answer) for answer in answers.values()}) == 3
    for name in (None, "one", "two", None, "one"):
        generator.use(name)
        assert generator.generate([prompt_of()], run) == answers[name]
        tiles = batch(1)["tiles"][0, :1]
        features = [
            each.model.apply(lora.variables(each.params), tiles, method=InternVL.encode)
            for each in (generator, expected[name])
        ]
        np.testing.assert_allclose(*features, atol=2e-5)
    with pytest.raises(ValueError, match="there is no adapter 'three'; loaded are: one, two"):
        generator.use("three")


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": -1}, "lora.rank is -1; it must be 0"),
        ({"dropout": 1.0}, "lora.dropout is 1.0; it must be at least 0 and below 1"),
        ({"quantize": "int3"}, "lora.quantize is 'int3'; it must be none, int8 or nf4"),
    ],
)
def test_settings_that_make_no_sense(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        lora.freeze_base(
            dataclasses.replace(train_config(), lora=dataclasses.replace(SETTINGS, **changes))
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"targets": ("language/layers/(q_proj)",)},
            "lora.targets: 'language/layers/(q_proj)' matches no full path of a linear layer; similar",
        ),
        ({"targets": ("language/head",)}, "matches no full path of a linear layer"),
        ({"targets": ("language/(",)}, "lora.targets: 'language/(' is not a regular expression"),
        (
            {"full": ("projectr/.*",)},
            "lora.full: 'projectr/.*' matches no full path of a parameter; similar paths: projector/",
        ),
        (
            {"full": ("projector/.*",)},
            "lora.full: 'projector/.*' trains all of projector/fc1, which lora.targets gives an adapter",
        ),
    ],
)
def test_patterns_that_match_nothing_or_twice(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        lora.init(
            abstract_params(CONFIG), dataclasses.replace(SETTINGS, **changes), jax.random.key(0)
        )


def test_what_is_frozen_follows_from_the_settings():
    config = dataclasses.replace(
        train_config(), lora=dataclasses.replace(SOME, full=("projector/.*", "language/norm/scale"))
    )
    assert lora.freeze_base(train_config()) == train_config()
    resolved = lora.freeze_base(config)
    assert lora.freeze_base(resolved) == resolved
    paths = storage.by_path(adapted(settings=SOME))
    trained = {path for path in paths if not re.fullmatch(resolved.optimizer.freeze[0], path)}
    assert trained == {
        path
        for path in paths
        if path.startswith(("lora/", "projector/")) or path == "language/norm/scale"
    }
