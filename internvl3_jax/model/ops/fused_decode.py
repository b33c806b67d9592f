"""The decoder's layers for one new token of each row, in five kernels a layer, on Hopper GPUs.

    norm_product      sum, residual, norm; product with q, k and v
    attend            sum, bias, rotation; attention to a chunk of the cache, new keys and values
    attended_product  softmax over the chunks; output product
    norm_product      sum, residual, norm; product with gate and up
    swiglu_product    sum, activation; product with down

XLA's kernels for the same are about 21, most of them shorter than the time between two kernels.

The kernels use parts of jax (Pallas Mosaic GPU) that change between versions. `decodes_here` tries
them on the device before they are used. This module imports them only then.

B rows, D decoder width, S slots, N query heads and K key heads of width H.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, BFloat16, Int32

from internvl3_jax.config import LanguageConfig
from internvl3_jax.model import kv_cache
from internvl3_jax.model.ops import device_trial
from internvl3_jax.model.ops.masks import cache_mask
from internvl3_jax.model.ops.rope import Rope, rope_tables
from internvl3_jax.parallel.collectives import platform

ROWS = 8  # at most
_JAX = 0, 11, 2  # the first version that the kernels were tried on; 0.10 lacks what they use
# Bytes of a layer's weights from which kernels take much longer than the time between them.
_MOST_BYTES = 128 * 2**20
_MOST_CHUNKS = 32  # of a cache; the kernel that joins them is unrolled
# Largest error in `_trial_error`, as a share of the norm. bfloat16 has 8 bits.
_TOLERANCE = 0.02
_KERNELS = ("gate_up", "qkv", "o", "down")


def decodes_here(
    config: LanguageConfig,
    layers: Sequence[Mapping],
    x: jax.Array,
    cache: kv_cache.Cache,
    reference: Callable,
) -> bool:
    """Returns whether `decode_layers` takes these layers and works on the devices in context.

    Args:
      layers: Variables of each layer, {"params": ...} in the unrolled and fused layout.
      x: Embeddings [B,T,D].
      reference: Computes a layer in float32, to compare with: (config, parameters, x, rope, mask,
          slots, cache of the layer) -> (x, cache of the layer).
    """
    rows, length, width = x.shape
    return (
        jax.__version_info__ >= _JAX
        and platform() == "gpu"
        and length == 1
        and rows <= ROWS
        and x.dtype == jnp.bfloat16
        and all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(cache))
        and all(_is_plain(layer) for layer in layers)
        and _fits(config)
        and _is_one_hopper()
        and _works(config, rows, reference)
    )


def _is_plain(layer: Mapping) -> bool:
    """Returns whether kernels are bfloat16 arrays (quantized ones are not), without adapters.

    A layer with norms of q and k (Qwen3) is not plain: the kernels do not compute them.
    """
    params = layer.get("params", {})
    if layer.get("lora") or "q_norm" in params or not set(_KERNELS) <= set(params):
        return False
    return all(
        getattr(params[name]["kernel"], "dtype", None) == jnp.bfloat16
        and ("bias" in params[name]) <= (name == "qkv")
        for name in _KERNELS
    )


def _fits(config: LanguageConfig) -> bool:
    """Returns whether the kernels take these sizes, and are faster than XLA's."""
    heads, kv_heads, width = config.num_heads, config.num_kv_heads, config.head_dim
    group = heads // kv_heads
    weights = config.hidden_size * (2 * (heads + kv_heads) * width + 3 * config.intermediate_size)
    return (
        width in (64, 128)
        and not config.qk_norm
        and heads >= 8
        # Eight heads from any key head's first query on.
        and group <= ROWS <= group + 2 * kv_heads
        and config.hidden_size == heads * width
        and config.hidden_size % 128 == 0
        and config.intermediate_size % 128 == 0
        and 2 * weights <= _MOST_BYTES
    )


def _is_one_hopper() -> bool:
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.abstract_device is None:
        device = jax.devices()[0]
        is_hopper = getattr(device, "compute_capability", "") == "9.0"
    else:
        kind = mesh.abstract_device.device_kind
        is_hopper = any(name in kind for name in ("H100", "H200", "GH200"))
    return is_hopper and (mesh.empty or mesh.size == 1)


# --- the layers ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Plan:
    """Division of a layer's products over blocks; see fused_product.Split."""

    qkv: object
    output: object
    gate_up: object
    down: object


@functools.cache
def plan(config: LanguageConfig, rows: int) -> Plan:
    """Returns splits that give each multiprocessor a block, with few parts to be added."""
    from internvl3_jax.model.ops.fused_product import MULTIPROCESSORS, SHARED_BYTES, Split

    width, head_width = config.hidden_size, config.head_dim

    def split(depth, outputs, most, unit=64, step=128):
        parts = max(1, min(most, MULTIPROCESSORS // (outputs // 64)))
        while True:
            result = Split(parts, unit=unit, step=step)
            is_whole = result.window(depth) % step == 0
            if is_whole and result.shared_bytes(depth, outputs) <= SHARED_BYTES:
                return result
            parts += 1

    def is_resident(choice):
        together = SHARED_BYTES // choice.shared_bytes(width, 2 * config.intermediate_size)
        blocks = choice.blocks(2 * config.intermediate_size)
        return MULTIPROCESSORS <= blocks <= together * MULTIPROCESSORS

    qkv = (config.num_heads + 2 * config.num_kv_heads) * head_width
    choices = [Split(2), Split(2, 128), Split(1), Split(1, 128)]
    return Plan(
        qkv=split(width, qkv, 8),
        # Every block of the next kernel, of which there are the most, reads these parts.
        output=split(width, width, 4 if rows <= 2 else 2, head_width, 4 * head_width),
        gate_up=next(filter(is_resident, choices), Split(2)),
        down=split(config.intermediate_size, width, 9),
    )


def chunk_of(config: LanguageConfig, rows: int, slots: int) -> int:
    """Returns the slots that a block attends to: a multiple of 64."""
    from internvl3_jax.model.ops.fused_product import MULTIPROCESSORS

    blocks = MULTIPROCESSORS // (rows * config.num_kv_heads)
    chunks = max(1, min(blocks, _MOST_CHUNKS))
    return max(128, -(-slots // (64 * chunks)) * 64)


def decode_layers(
    config: LanguageConfig,
    layers: Sequence[Mapping],
    x: BFloat16[Array, "B 1 D"],
    rope: Rope,
    slots: Int32[Array, "B 1"],
    cache: kv_cache.Cache,
    interpret=None,
) -> tuple[BFloat16[Array, "B 1 D"], kv_cache.Cache]:
    """Returns the residual stream after the layers, and the updated cache.

    Args:
      layers: Parameters of each layer.
      rope: cos and sin of the new tokens' positions.
      slots: Of the new tokens.
      interpret: plgpu.InterpretGPUParams to run on a CPU.
    """
    from internvl3_jax.model.ops.fused_attention import attend
    from internvl3_jax.model.ops.fused_layer import (
        attended_product,
        norm_product,
        swiglu_product,
    )

    rows, width, epsilon = len(x), config.hidden_size, config.norm_eps
    splits, chunk = plan(config, rows), chunk_of(config, rows, kv_cache.num_slots(cache))
    cos, sin = (table[:, 0] for table in rope)
    slots, stream = slots[:, 0], x[:, 0]
    partials = jnp.zeros((1, ROWS, width), jnp.float32)
    new_cache = []
    for layer, layer_cache in zip(layers, cache, strict=True):
        kernels = {name: layer[name]["kernel"] for name in _KERNELS}
        bias = layer["qkv"].get("bias", jnp.zeros(kernels["qkv"].shape[1], x.dtype))
        qkv, stream, squares = norm_product(
            stream, partials, layer["input_norm"]["scale"], kernels["qkv"], splits.qkv, interpret
        )
        k, v = layer_cache["k"], layer_cache["v"]
        inputs = qkv, squares, bias, cos, sin, slots, k, v
        out, lse, k, v = attend(*inputs, width, epsilon, chunk, interpret)
        partials = attended_product(out, lse, kernels["o"], splits.output, interpret)
        gate_up, stream, squares = norm_product(
            stream,
            partials,
            layer["post_norm"]["scale"],
            kernels["gate_up"],
            splits.gate_up,
            interpret,
        )
        partials = swiglu_product(
            gate_up, squares, kernels["down"], rows, epsilon, splits.down, interpret
        )
        new_cache.append({"k": k, "v": v})
    stream = stream.astype(jnp.float32) + partials.sum(axis=0)[:rows]
    return stream.astype(x.dtype)[:, None], new_cache


# --- the trial -----------------------------------------------------------------------------------


@functools.cache
def _works(config: LanguageConfig, rows: int, reference: Callable) -> bool:
    """Returns whether the kernels' error is small, in float32 terms; tried once per process."""
    return device_trial.works(
        functools.partial(_trial_error, config, rows, reference),
        _TOLERANCE,
        "they are wrong by {error:.1%}",
        "fused decoding kernels are not used here ({reason}); slower ones are",
    )


def _trial_error(
    config: LanguageConfig, rows: int, reference: Callable, slots: int = 512, interpret=None
) -> float:
    """Returns the largest error of two layers' output and cache, as a share of the norm."""
    config = dataclasses.replace(config, num_layers=2)
    lengths = np.linspace(0, slots - 1, rows + 1).astype(np.int32)[1:, None]
    x, params, cache = jax.device_put(_trial_inputs(config, rows, slots))

    def fused(x, params, cache):
        layers = [params[f"layer_{index}"] for index in range(2)]
        rope = rope_tables(config, jnp.asarray(256 * lengths))
        return decode_layers(config, layers, x, rope, jnp.asarray(lengths), cache, interpret)

    def expected(x, params, cache):
        x, params, cache = jax.tree.map(lambda y: y.astype(jnp.float32), (x, params, cache))
        rope = rope_tables(config, jnp.asarray(256 * lengths))
        mask, new_cache = cache_mask(lengths, slots), []
        for index, layer_cache in enumerate(cache):
            layer = params[f"layer_{index}"]
            x, new = reference(config, layer, x, rope, mask, jnp.asarray(lengths), layer_cache)
            new_cache.append(new)
        return x, new_cache

    with jax.default_matmul_precision("highest"):
        # Trying several products for each would take longer than all the rest.
        options = {"xla_gpu_autotune_level": 0}
        right, right_cache = jax.jit(expected, compiler_options=options)(x, params, cache)
    found, found_cache = jax.jit(fused)(x, params, cache)
    x, found, right = (np.asarray(y, np.float32) for y in (x, found, right))
    # The layers' sums, and what they write into the cache.
    pairs = [(found - x, right - x)]
    at = lengths[:, None, :, None]
    for new in zip(jax.tree.leaves(found_cache), jax.tree.leaves(right_cache), strict=True):
        pairs.append([np.take_along_axis(np.asarray(y, np.float32), at, axis=2) for y in new])
    errors = []
    for actual, wanted in pairs:
        errors.append(np.linalg.norm(actual - wanted) / np.linalg.norm(wanted))
    return max(float(error) if np.isfinite(error) else np.inf for error in errors)


def _trial_inputs(config: LanguageConfig, rows: int, slots: int) -> tuple:
    """Returns random x, parameters and cache, in bfloat16, from the host: compiling a program that
    makes them would take longer.
    """
    rng = np.random.default_rng(0)

    def random(shape):
        scale = shape[0] ** -0.5 if len(shape) == 2 else 1.0
        return (scale * rng.standard_normal(shape, np.float32)).astype(jnp.bfloat16)

    width = config.hidden_size
    heads = config.num_heads + 2 * config.num_kv_heads
    layer = {
        "input_norm": {"scale": (width,)},
        "qkv": {"kernel": (width, heads * config.head_dim)},
        "o": {"kernel": (width, width)},
        "post_norm": {"scale": (width,)},
        "gate_up": {"kernel": (width, 2 * config.intermediate_size)},
        "down": {"kernel": (config.intermediate_size, width)},
    }
    if config.qkv_bias:
        layer["qkv"]["bias"] = (heads * config.head_dim,)
    shapes = {f"layer_{index}": layer for index in range(2)}
    params = jax.tree.map(random, shapes, is_leaf=lambda leaf: isinstance(leaf, tuple))
    side = rows, config.num_kv_heads, slots, config.head_dim
    cache = [{name: random(side) for name in "kv"} for _ in range(2)]
    return random((rows, 1, width)), params, cache
