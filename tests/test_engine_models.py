"""The engine on meshes, with a cache in 8 bits, a stretched rope, and over many requests."""

import dataclasses
import gc

import jax
import numpy as np
import pytest

from internvl3_jax.config import UNITS, MeshConfig
from internvl3_jax.inference.engine.engine import Engine
from internvl3_jax.inference.engine.request import Request, RowSampling
from internvl3_jax.inference.generation_config import GenerationConfig
from internvl3_jax.inference.generator import Generator
from internvl3_jax.inference.sampling import Sampling
from internvl3_jax.parallel.sharding import make_mesh, param_shardings
from tests.support.engine import LENGTH, alone, ask, forget
from tests.support.generation import PARAMS, RAGGED, generator, make_prompt, make_run
from tests.support.tiny_checkpoint import CONFIG, LANGUAGE


@pytest.mark.parametrize("mesh", [{"fsdp": 2}, {"fsdp": 2, "tensor": 2}, {"data": 2, "tensor": 2}])
def test_meshes_change_no_answer(mesh):
    devices = int(np.prod(list(mesh.values())))
    mesh = make_mesh(MeshConfig(**mesh), jax.devices()[:devices])
    params = jax.device_put(PARAMS, param_shardings(PARAMS, mesh))
    engine = Engine(Generator(CONFIG, params), rows=4, max_length=LENGTH)
    requests = [Request(prompt, max_new_tokens=12) for prompt in RAGGED]
    requests.append(Request(RAGGED[1], RowSampling(temperature=1.0, seed=4), max_new_tokens=12))
    *greedy, sampled = ask(engine, *requests)
    for index, ticket in enumerate(greedy):
        assert ticket.ids == alone(index, 20)[:12]
    assert sampled.ids == alone(1, 20, 4, temperature=1.0)[:12]


def test_an_int8_cache_gives_the_generators_answers():
    one = Generator(CONFIG, PARAMS, cache_dtype="int8")
    engine = Engine(one, rows=3, max_length=LENGTH)
    for index, ticket in enumerate(ask(engine, *(Request(p, max_new_tokens=12) for p in RAGGED))):
        assert ticket.ids == one.generate([RAGGED[index]], make_run(1, 12))[0]


def test_rows_with_a_stretched_rope_beside_others():
    """Dynamic NTK beyond the model's positions, and V2PE in the same batch, which switches it off."""
    language = dataclasses.replace(
        LANGUAGE, rope_scaling="dynamic", rope_factor=2.0, max_position=64
    )
    one = Generator(dataclasses.replace(CONFIG, language=language), PARAMS)
    prompts = [
        (make_prompt(seed=1, text=80), "dynamic"),  # stretched from the beginning
        (make_prompt(seed=2, text=55), "dynamic"),  # stretched while it decodes
        (make_prompt([(4, 1)], seed=3, text=20), "none"),
        (make_prompt([(1, UNITS)], seed=4, text=9), "dynamic"),
    ]
    engine = Engine(one, rows=4, max_length=LENGTH)
    expected = [
        one.generate([prompt], GenerationConfig(20, Sampling(), (0,), scaling))[0]
        for prompt, scaling in prompts
    ]
    requests = [Request(prompt, max_new_tokens=20, scaling=scaling) for prompt, scaling in prompts]
    # The second time what was run with a stretched rope is not used again.
    for _ in range(2):
        assert [ticket.ids for ticket in ask(engine, *requests)] == expected
    reused = [ticket.reused_tokens for ticket in ask(engine, *requests)]
    assert reused[0] == 0 and reused[1] > 0


def test_memory_is_constant_over_many_requests():
    engine = Engine(generator(), rows=4, max_length=LENGTH, image_bytes=1 << 12)
    rng = np.random.default_rng(0)
    sizes = []
    for _ in range(20):
        for number in range(100):
            images = [(1, UNITS)] if number % 4 == 0 else []
            prompt = make_prompt(images, seed=int(rng.integers(1 << 30)), text=6)
            engine.submit(Request(prompt, max_new_tokens=1 + number % 3))
        engine.run()
        gc.collect()
        sizes.append(sum(array.nbytes for array in jax.live_arrays()))
    assert engine.stats.finished == 2000
    assert max(sizes[5:]) <= sizes[4] + (1 << 14)
    forget(engine)
