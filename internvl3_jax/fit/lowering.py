"""Lowers the programs of a run from shapes alone: the train step, and the three of generation."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator
from unittest import mock

import jax
import jax.numpy as jnp

from internvl3_jax.checkpoints.storage import by_path, nest
from internvl3_jax.config import TrainConfig
from internvl3_jax.inference import programs
from internvl3_jax.inference.prompt_batch import bucket
from internvl3_jax.inference.sampling import Sampling
from internvl3_jax.model import kv_cache, language, weights
from internvl3_jax.model.internvl import InternVL, abstract_params
from internvl3_jax.parallel.collectives import platform
from internvl3_jax.parallel.sharding import (
    BATCH_AXES,
    TILE_AXES,
    abstract,
    batch_sharding,
    check_batch,
    param_shardings,
)
from internvl3_jax.training import mpo
from internvl3_jax.training.loss_choice import init_loss_state
from internvl3_jax.training.optimizer import make_optimizer
from internvl3_jax.training.step import (
    TrainState,
    init_state,
    make_model,
    make_step,
    shardings_of,
)


@dataclasses.dataclass(frozen=True)
class Requests:
    """A batch of generation requests.

    Attributes:
      rows: Answers generated together.
      prompt: Tokens of each prompt, images included.
      new: Tokens of each answer.
      tiles: Tiles encoded per call.
      weights: Format of quantized kernels (model/weights.py); None: there are none.
      quantize_tower: Whether those of the vision tower and the projector are quantized, too.
      cache: "int8" for keys and values in 8 bits; None: the compute dtype.
    """

    rows: int
    prompt: int
    new: int
    tiles: int
    weights: str | None = None
    quantize_tower: bool = False
    cache: str | None = None

    @property
    def length(self) -> int:
        """Tokens of the padded prompts."""
        return bucket(self.prompt)

    @property
    def slots(self) -> int:
        """Slots of each row's cache."""
        return bucket(self.length + self.new + programs.TOKENS_PER_CALL)


# --- training ------------------------------------------------------------------------------------


def batch_shapes(config: TrainConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of the config's `Batch` (data/batch.py)."""
    rows, tokens, tiles = config.data.rows, config.data.tokens_per_row, config.data.tiles_per_row
    size = config.model.vision.image_size
    names = ["tokens", "targets", "segments", "positions"]
    if config.data.pairs:
        names += ["answers", "features"] + ["last_query"] * config.data.share_question
    fields = {name: jax.ShapeDtypeStruct((rows, tokens), jnp.int32) for name in names}
    if config.data.ref_logps_file:
        fields["reference"] = jax.ShapeDtypeStruct((rows, tokens), jnp.float32)
    return fields | {
        "loss_weights": jax.ShapeDtypeStruct((rows, tokens), jnp.float32),
        "tiles": jax.ShapeDtypeStruct((rows, tiles, size, size, 3), jnp.uint8),
    }


def train_state_shapes(config: TrainConfig, model: InternVL, optimizer) -> TrainState:
    """Returns the shapes of the train state that `init_state` would return."""
    settings = {
        "param_dtype": jnp.dtype(config.param_dtype),
        "adapters": config.lora,
        "loss_state": init_loss_state(config),
    }
    init = functools.partial(init_state, model, optimizer, seed=0, **settings)
    return jax.eval_shape(init, batch_shapes(config))


def reference_shapes(config: TrainConfig, mesh):
    """Returns the parameters of MPO's reference model as ShapeDtypeStructs, or None without one."""
    if not mpo.needs_model(config):
        return None
    params = abstract_params(config.model, jnp.dtype(mpo.reference_dtype(config)))
    return abstract(params, param_shardings(params, mesh))


def lower_train_step(config: TrainConfig, mesh):
    """Lowers the train step of train.py on a mesh; `.compile()` compiles it.

    It lacks the losses per source, whose number only the data determines.

    Raises:
      ValueError: The model or the batch does not divide over the mesh.
    """
    model, data = make_model(config), config.data
    optimizer = make_optimizer(config.optimizer, config.steps)
    check_batch(mesh, data.rows, config.micro_batches, data.tokens_per_row, data.tiles_per_row)
    batch = batch_shapes(config)
    batch = abstract(batch, {name: batch_sharding(mesh, name) for name in batch})
    shapes = train_state_shapes(config, model, optimizer)
    shardings = shardings_of(shapes, mesh, config.offload_optimizer)
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=shardings.step)
    with _for_devices_of(mesh):
        step = make_step(config, model, optimizer, 0, shardings)
        return step.lower(abstract(shapes, shardings), batch, key, reference_shapes(config, mesh))


# --- generation ----------------------------------------------------------------------------------


def generation_params(config: TrainConfig, mesh, requests: Requests | None = None):
    """Returns the parameters as `Generator` holds them: in the compute dtype, decoder unrolled."""
    fused = mesh.shape["tensor"] == 1
    params = abstract_params(config.model, jnp.dtype(config.compute_dtype))
    if requests and requests.weights:
        quantized = (requests.weights, requests.quantize_tower)
        params = nest(weights.abstract_quantized(by_path(params), *quantized))
    unroll = functools.partial(language.unroll, config=config.model.language, fused=fused)
    params = params | {"language": jax.eval_shape(unroll, params["language"])}
    return abstract(params, param_shardings(params, mesh))


def cache_shapes(config: TrainConfig, mesh, requests: Requests):
    """Returns the key/value cache of the requests as ShapeDtypeStructs."""
    dtype = jnp.dtype(requests.cache or config.compute_dtype)
    cache = jax.eval_shape(
        lambda: kv_cache.init_cache(config.model.language, requests.rows, requests.slots, dtype)
    )
    return jax.tree.map(
        lambda leaf: _sharded(mesh, leaf.shape, leaf.dtype, BATCH_AXES, "tensor"), cache
    )


def lower_generation(config: TrainConfig, mesh, requests: Requests) -> dict[str, object]:
    """Lowers the programs of inference/generator.py.

    Returns:
      "encode" (the tiles of a call), "prefill" (all prompts), and "decode" (TOKENS_PER_CALL tokens
      per row).
    """
    model_config, dtype = config.model, jnp.dtype(config.compute_dtype)
    fused = mesh.shape["tensor"] == 1
    model = InternVL(model_config, dtype, unrolled=True, fused=fused)
    scaling = model_config.language.rope_scaling

    # Parameters and cache.
    params = generation_params(config, mesh, requests)
    tower = {name: params[name] for name in ("vision", "projector")}
    cache = cache_shapes(config, mesh, requests)

    # Inputs: token ids, positions and slots [B,T]; one number per row [B]; tiles and features.
    sharded = functools.partial(_sharded, mesh)
    rows, length, width = requests.rows, requests.length, model_config.language.hidden_size
    size = model_config.vision.image_size
    ids = sharded((rows, length), jnp.int32, BATCH_AXES)
    per_row = sharded((rows,), jnp.int32, BATCH_AXES)
    done = sharded((rows,), jnp.bool_, BATCH_AXES)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))
    keys = jax.ShapeDtypeStruct(keys.shape, keys.dtype, sharding=jax.NamedSharding(mesh, jax.P()))
    tiles = sharded((requests.tiles, size, size, 3), jnp.uint8, TILE_AXES)
    visual = sharded((rows, length, width), dtype, BATCH_AXES)

    with _for_devices_of(mesh):
        return {
            "encode": programs.encode_tiles.lower(model, tower, tiles),
            "prefill": programs.prefill.lower(
                model,
                params,
                ids,
                visual,
                ids,
                ids,
                per_row,
                keys,
                cache,
                Sampling(),
                scaling,
                True,
            ),
            "decode": programs.decode.lower(
                model,
                params,
                programs.DecodeState(cache, per_row, per_row, per_row, per_row, done),
                keys,
                programs.TOKENS_PER_CALL,
                (0,),
                Sampling(),
                scaling,
            ),
        }


@contextlib.contextmanager
def _for_devices_of(mesh) -> Iterator[None]:
    """Puts the mesh in context, and answers for its GPUs what jax would ask a device.

    jax asks for the GPU's generation before it takes cuDNN's packed layout.
    """
    with jax.set_mesh(mesh), contextlib.ExitStack() as stack:
        if platform() == "gpu" and jax.default_backend() != "gpu":
            from jax._src.cudnn import fused_attention_stablehlo as cudnn

            for name, answer in (
                ("check_compute_capability", True),
                ("is_cuda_compute_capability_equal", False),
            ):
                stack.enter_context(mock.patch.object(cudnn, name, lambda _, answer=answer: answer))
        yield


def _sharded(mesh, shape: tuple[int, ...], dtype, *axes):
    """Returns a ShapeDtypeStruct sharded over `axes`.

    Dimensions that do not divide are replicated, as in `collectives.constrain`.
    """
    axes = axes + (None,) * (len(shape) - len(axes))
    names = [(axis,) if isinstance(axis, str) else axis or () for axis in axes]
    dividing = [
        group if size % math.prod(mesh.shape[axis] for axis in group) == 0 else None
        for size, group in zip(shape, names, strict=True)
    ]
    return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, jax.P(*dividing)))
