"""Where an answer ends: its limit, its stop ids and the context, on one device and on a mesh."""

import dataclasses

import jax
import numpy as np
import pytest

from internvl3_jax.config import MeshConfig
from internvl3_jax.data.batch import Prompt
from internvl3_jax.inference.generation_config import GenerationConfig
from internvl3_jax.inference.generator import ContextError, Generator
from internvl3_jax.inference.programs import TOKENS_PER_CALL
from internvl3_jax.inference.sampling import Sampling
from internvl3_jax.parallel import sharding
from internvl3_jax.positions import build_positions
from tests.support.generation import IMAGE, PARAMS, RAGGED, generator, make_prompt, make_run
from tests.support.tiny_checkpoint import CONFIG, LANGUAGE


@pytest.mark.parametrize(
    "mesh",
    [
        MeshConfig(fsdp=1, tensor=8),
        MeshConfig(data=2, fsdp=1, tensor=4),
        MeshConfig(fsdp=4, tensor=2),
        MeshConfig(fsdp=8),
    ],
    ids=str,
)
def test_a_mesh_draws_the_same_tokens(mesh):
    """Weights and cache split over the devices; 2 key heads on up to 4 of them. Also for sampled
    tokens, and one row alone.
    """
    mesh = sharding.make_mesh(mesh)
    split = jax.device_put(PARAMS, sharding.param_shardings(PARAMS, mesh))
    ours = Generator(CONFIG, split)
    down = ours.params["language"]["layer_0"]["down"]["kernel"]
    assert (
        down.sharding.shard_shape(down.shape)[0]
        == CONFIG.language.intermediate_size // mesh.shape["tensor"]
    )
    for prompts, sampling in ((RAGGED, {}), (RAGGED[:1], {"temperature": 1.0})):
        run = make_run(len(prompts), limit=20, **sampling)
        assert ours.generate(prompts, run) == generator().generate(prompts, run)


@pytest.mark.parametrize("limit", [1, 2, 16, 17, 18, 40])
def test_the_limit_is_kept(limit):
    longest = generator().generate(RAGGED[:1], make_run(limit=40))[0]
    assert generator().generate(RAGGED[:1], make_run(limit=limit))[0] == longest[:limit]


def test_a_stop_id_ends_its_row_alone():
    free = generator().generate(RAGGED, make_run(len(RAGGED)))
    stops = (free[0][0], free[2][7], 9_999)
    stopped = generator(stops).generate(RAGGED, make_run(len(RAGGED)))
    ends = [
        min((place for place, token in enumerate(answer) if token in stops), default=None)
        for answer in free
    ]
    assert ends[0] == 0 and 0 < ends[2] <= 7 and None in ends
    assert stopped == [
        answer if end is None else answer[: end + 1] for answer, end in zip(free, ends, strict=True)
    ]


def test_pieces_come_as_they_are_drawn():
    run = make_run(len(RAGGED), limit=20)
    expected = generator().generate(RAGGED, run)
    state = generator().start(RAGGED, run)
    pieces = list(generator().stream(state, run))
    assert [len(piece) for piece, *_ in pieces] == [1, TOKENS_PER_CALL, 3]
    assert [
        [token for piece in pieces for token in piece[row]] for row in range(len(RAGGED))
    ] == expected


def test_prompts_beyond_the_context_are_refused():
    prompt, limit = make_prompt(text=LANGUAGE.max_position - 20), 20
    generator().check_context_length(prompt, make_run(limit=limit))
    with pytest.raises(
        ContextError,
        match=r"^line 3: the prompt of 2,029 tokens and 20 new ones reach position 2,049; the model knows 2,048\.",
    ):
        generator().check_context_length(
            make_prompt(text=LANGUAGE.max_position - 19), make_run(limit=limit), "line 3"
        )
    # Under V2PE positions count, not tokens.
    tokens = np.full(8 * LANGUAGE.max_position, IMAGE, np.int32)
    generator().check_context_length(
        Prompt(tokens, build_positions(len(tokens), [(0, len(tokens))], [16]), [], []),
        make_run(limit=limit),
    )


def test_dynamic_scaling_makes_room():
    config = dataclasses.replace(
        CONFIG, language=dataclasses.replace(LANGUAGE, rope_scaling="dynamic", rope_factor=2.0)
    )
    run = GenerationConfig(20, Sampling(), (0,), "dynamic")
    stretched = Generator(config, PARAMS)
    stretched.check_context_length(make_prompt(text=2 * LANGUAGE.max_position - 20), run)
    with pytest.raises(ContextError, match="the model knows 4,096"):
        stretched.check_context_length(make_prompt(text=2 * LANGUAGE.max_position - 19), run)
    with pytest.raises(ContextError, match="the model knows 2,048"):
        stretched.check_context_length(
            make_prompt(text=2 * LANGUAGE.max_position - 20), make_run(limit=20)
        )
