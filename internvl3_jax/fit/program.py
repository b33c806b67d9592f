"""The programs that a run compiles, from shapes alone: the train step; and the three of generation."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from internvl3_jax.config import TrainConfig
from internvl3_jax.inference import programs
from internvl3_jax.inference.prompt_batch import bucket
from internvl3_jax.inference.sampling import Sampling
from internvl3_jax.model import kv_cache, language
from internvl3_jax.model.internvl import InternVL, abstract_params
from internvl3_jax.parallel.sharding import (
    BATCH_AXES,
    TILE_AXES,
    abstract,
    batch_sharding,
    check_batch,
    param_shardings,
)
from internvl3_jax.training import mpo
from internvl3_jax.training.optimizer import make_optimizer
from internvl3_jax.training.step import (
    TrainState,
    init_loss_state,
    init_state,
    make_model,
    make_step,
    shardings_of,
)


@dataclasses.dataclass(frozen=True)
class Requests:
    """What generation is asked for at a time."""

    rows: int  # answers side by side
    prompt: int  # tokens of each prompt, pictures included
    new: int  # tokens of each answer
    tiles: int  # encoded at a time

    @property
    def length(self) -> int:
        """Of the prompts as they are padded."""
        return bucket(self.prompt)

    @property
    def slots(self) -> int:
        """Of the cache, for each row."""
        return bucket(self.length + self.new + programs.TOKENS_PER_CALL)


# --- training ------------------------------------------------------------------------------------


def batch_shapes(config: TrainConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """A `Batch` (data/batch.py) of the configuration's size."""
    rows, tokens, tiles = config.data.rows, config.data.tokens_per_row, config.data.tiles_per_row
    size = config.model.vision.image_size
    names = ["tokens", "targets", "segments", "positions"]
    if config.data.pairs:
        names += ["answers", "features"] + ["until"] * config.data.share_question
    fields = {name: jax.ShapeDtypeStruct((rows, tokens), jnp.int32) for name in names}
    if config.data.ref_logps_file:
        fields["reference"] = jax.ShapeDtypeStruct((rows, tokens), jnp.float32)
    return fields | {
        "loss_weights": jax.ShapeDtypeStruct((rows, tokens), jnp.float32),
        "tiles": jax.ShapeDtypeStruct((rows, tiles, size, size, 3), jnp.uint8),
    }


def train_state_shapes(config: TrainConfig, model: InternVL, optimizer) -> TrainState:
    settings = {
        "param_dtype": jnp.dtype(config.param_dtype),
        "adapters": config.lora,
        "loss_state": init_loss_state(config),
    }
    init = functools.partial(init_state, model, optimizer, seed=0, **settings)
    return jax.eval_shape(init, batch_shapes(config))


def reference_shapes(config: TrainConfig, mesh):
    """Parameters of MPO's reference model as the step takes them, or None."""
    if not mpo.needs_model(config):
        return None
    params = abstract_params(config.model, jnp.dtype(mpo.reference_dtype(config)))
    return abstract(params, param_shardings(params, mesh))


def lower_train_step(config: TrainConfig, mesh):
    """The train step of train.py on a mesh, traced; `.compile()` compiles it. ValueError where
    something does not split.

    Without the losses by source, sums whose number only the data knows.
    """
    model, optimizer, data = (
        make_model(config),
        make_optimizer(config.optimizer, config.steps),
        config.data,
    )
    check_batch(mesh, data.rows, config.micro_batches, data.tokens_per_row, data.tiles_per_row)
    batch = batch_shapes(config)
    batch = abstract(batch, {name: batch_sharding(mesh, name) for name in batch})
    shapes = train_state_shapes(config, model, optimizer)
    places = shardings_of(shapes, mesh, config.offload_optimizer)
    with jax.set_mesh(mesh):
        step = make_step(config, model, optimizer, 0, places)
        return step.lower(
            abstract(shapes, places), batch, _key(places.step), reference_shapes(config, mesh)
        )


def _key(place):
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=place)


# --- generation ----------------------------------------------------------------------------------


def generation_params(config: TrainConfig, mesh):
    """The parameters as `generate.Generator` holds them: in the compute dtype, the decoder's layers
    one by one.
    """
    fused = mesh.shape["tensor"] == 1
    params = abstract_params(config.model, jnp.dtype(config.compute_dtype))
    unroll = functools.partial(language.unroll, config=config.model.language, fused=fused)
    params = params | {"language": jax.eval_shape(unroll, params["language"])}
    return abstract(params, param_shardings(params, mesh))


def cache_shapes(config: TrainConfig, mesh, requests: Requests):
    dtype = jnp.dtype(config.compute_dtype)
    cache = jax.eval_shape(
        lambda: kv_cache.init_cache(config.model.language, requests.rows, requests.slots, dtype)
    )
    return jax.tree.map(
        lambda leaf: _placed(mesh, leaf.shape, dtype, BATCH_AXES, None, "tensor"), cache
    )


def lower_generation(config: TrainConfig, mesh, requests: Requests) -> dict[str, object]:
    """The programs of generate.py, traced: "encode" of so many tiles, "prefill" of all prompts,
    "decode" of TOKENS_PER_CALL tokens a row.
    """
    model_config, dtype = config.model, jnp.dtype(config.compute_dtype)
    fused = mesh.shape["tensor"] == 1
    model = InternVL(model_config, dtype, unrolled=True, fused=fused)
    params = generation_params(config, mesh)
    scaling = model_config.language.rope_scaling
    place = functools.partial(_placed, mesh)
    rows, length, width = requests.rows, requests.length, model_config.language.hidden_size
    size = model_config.vision.image_size
    ids = place((rows, length), jnp.int32, BATCH_AXES)
    one, done = place((rows,), jnp.int32, BATCH_AXES), place((rows,), jnp.bool_, BATCH_AXES)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))
    keys = jax.ShapeDtypeStruct(keys.shape, keys.dtype, sharding=jax.NamedSharding(mesh, jax.P()))
    cache = cache_shapes(config, mesh, requests)
    tiles = place((requests.tiles, size, size, 3), jnp.uint8, TILE_AXES)
    visual = place((rows, length, width), dtype, BATCH_AXES)
    tower = {name: params[name] for name in ("vision", "projector")}
    with jax.set_mesh(mesh):
        return {
            "encode": programs.encode_tiles.lower(model, tower, tiles),
            "prefill": programs.prefill.lower(
                model, params, ids, visual, ids, ids, one, keys, cache, Sampling(), scaling
            ),
            "decode": programs.decode.lower(
                model,
                params,
                programs.DecodeState(cache, one, one, one, one, done),
                keys,
                programs.TOKENS_PER_CALL,
                (0,),
                Sampling(),
                scaling,
            ),
        }


def _placed(mesh, shape: tuple[int, ...], dtype, *axes):
    """A ShapeDtypeStruct; a dimension that does not divide over its axes is whole, as in
    `sharding.constrain`.
    """
    axes = axes + (None,) * (len(shape) - len(axes))
    names = [(axis,) if isinstance(axis, str) else axis or () for axis in axes]
    fitting = [
        each if size % _size(mesh, each) == 0 else None
        for size, each in zip(shape, names, strict=True)
    ]
    return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, jax.P(*fitting)))


def _size(mesh, axes: tuple[str, ...]) -> int:
    return functools.reduce(lambda size, axis: size * mesh.shape[axis], axes, 1)
