"""Products of sorted rows with the kernels of their experts, on each kind of device.

    blocks   blocks of rows of one expert, one kernel at a time: CPUs and GPUs, and everywhere where
             rows are so few that only the kernels that they need should be read
    ragged   XLA's ragged product; the kernels' gradient by Pallas' megablox: TPUs

XLA computes a ragged product densely on CPUs and GPUs, and so does it the kernels' gradient on
TPUs: every row by every expert, 128 times the work of a layer of 128 experts.

Axes: rows are sorted by expert, and `block` rows of one expert make a block; E experts.
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Shaped

from internvl3_jax.model.ops.linear import scaled_dot
from internvl3_jax.model.ops.quantize import PER_COLUMN, dequantize, format_of, is_quantized
from internvl3_jax.parallel.collectives import platform

Kernel = Shaped[Array, "E d_in d_out"] | Mapping[str, Array]

_BLOCKS = {"cpu": (8, 128), "gpu": (16, 512), "tpu": (8, 8)}  # fewest and most rows of a block
_KERNELS_AT_ONCE = 16  # of blocks on a GPU, where a batched product needs a copy of each kernel
_UNROLL = 8  # blocks per step of the loop: all of a decoded token
_TILE = 512, 1024, 1024  # of the TPU's kernel: rows, inputs, outputs


def rows_per_block(pairs: int, num_experts: int) -> int:
    """Returns the rows of a block, of `pairs` rows in all; 1 where each row reads its own kernel.

    Returns 0 where a ragged product takes the rows as they are.
    """
    if pairs <= num_experts:
        return 1
    if platform() == "tpu":
        return 0
    least, most = _BLOCKS[platform()]
    return min(most, max(least, 2 ** round(math.log2(pairs / num_experts))))


def grouped_dot(
    x: Float[Array, "rows d_in"],
    kernel: Kernel,
    sizes: Int32[Array, " E"],
    experts: Int32[Array, " blocks"],
) -> Float[Array, "rows d_out"]:
    """Returns each row times the kernel of its expert, in x's dtype.

    Args:
      kernel: Plain, or with the leaves of ops/quantize.py.
      sizes: Rows of each expert, of a ragged product.
      experts: The expert of each block; empty for a ragged product.
    """
    if len(experts) == 0:
        return _ragged(x, kernel, sizes)
    return _in_blocks(x, kernel, experts)


# --- blocks --------------------------------------------------------------------------------------


@jax.custom_vjp
def _in_blocks(x, kernel, experts):
    return _over_blocks(_dot, kernel, experts, x)


def _in_blocks_forward(x, kernel, experts):
    return _in_blocks(x, kernel, experts), (x, kernel, experts)


def _in_blocks_backward(saved, slope):
    x, kernel, experts = saved

    def to_rows(slope, taken):
        like = jax.ShapeDtypeStruct((len(slope), x.shape[-1]), x.dtype)
        return jax.linear_transpose(lambda rows: _dot(rows, taken), like)(slope)[0]

    d_x = _over_blocks(to_rows, kernel, experts, slope)
    if is_quantized(kernel):
        return d_x, None, None
    return d_x, _kernel_gradient(x, slope, kernel, experts), None


_in_blocks.defvjp(_in_blocks_forward, _in_blocks_backward)


def _over_blocks(product, kernel, experts, x):
    """Returns product(rows of a block, kernel of its expert) of all blocks, one after the other."""
    at_once = _at_once(experts)
    x = x.reshape(-1, at_once, len(x) // len(experts), x.shape[-1])

    def step(_, inputs):
        rows, chosen = inputs
        if at_once == 1:
            return None, product(rows[0], _take(kernel, chosen[0]))[None]
        return None, jax.vmap(product)(rows, _take(kernel, chosen))

    unroll = min(len(x), _UNROLL) if x.shape[2] == 1 else 1
    _, y = jax.lax.scan(step, None, (x, experts.reshape(-1, at_once)), unroll=unroll)
    return y.reshape(-1, y.shape[-1])


def _kernel_gradient(x, slope, kernel, experts):
    at_once = _at_once(experts)
    shape = len(experts) // at_once, at_once, len(x) // len(experts)

    def add(total, inputs):
        rows, slopes, chosen = inputs
        part = jnp.einsum("crd,crf->cdf", rows, slopes, preferred_element_type=jnp.float32)
        return total.at[chosen].add(part), None

    inputs = x.reshape(*shape, -1), slope.reshape(*shape, -1), experts.reshape(shape[:2])
    total, _ = jax.lax.scan(add, jnp.zeros(kernel.shape, jnp.float32), inputs)
    return total.astype(kernel.dtype)


def _at_once(experts) -> int:
    if platform() != "gpu":
        return 1
    return max(size for size in range(1, _KERNELS_AT_ONCE + 1) if len(experts) % size == 0)


def _take(kernel: Kernel, chosen):
    """Returns the kernels of one expert, i32[], or of several, i32[n]."""

    def take(leaf):
        # Float8 is copied as bytes: a CPU would widen all of it.
        bits = jnp.uint8 if leaf.dtype.itemsize == 1 else leaf.dtype
        if leaf.dtype != bits:
            return jax.lax.bitcast_convert_type(
                take(jax.lax.bitcast_convert_type(leaf, bits)), leaf.dtype
            )
        if chosen.ndim == 0:
            return jax.lax.dynamic_index_in_dim(leaf, chosen, keepdims=False)
        return jnp.take(leaf, chosen, axis=0)

    return jax.tree.map(take, kernel)


def _dot(x: Float[Array, "rows d_in"], kernel) -> Float[Array, "rows d_out"]:
    """Returns x @ kernel of one expert."""
    if not is_quantized(kernel):
        if len(x) == 1 and platform() == "gpu":
            # A sum, which reads the kernel in place; a product would copy it first.
            return (x.astype(jnp.float32).T * kernel).sum(axis=0, keepdims=True).astype(x.dtype)
        return jnp.dot(x, kernel.astype(x.dtype))
    kind = format_of(kernel)
    if kind in PER_COLUMN:
        return scaled_dot(x, kernel[kind], kernel["scales"])
    return jnp.dot(x, dequantize(kernel, x.dtype))


# --- ragged --------------------------------------------------------------------------------------


def _ragged(x, kernel, sizes):
    if not is_quantized(kernel):
        return _ragged_dot(x, kernel, sizes)
    # Dequantized for the product, and again in the backward pass.
    plain = jax.checkpoint(lambda x, kernel: _ragged_dot(x, dequantize(kernel, x.dtype), sizes))
    return plain(x, kernel)


@jax.custom_vjp
def _ragged_dot(x, kernel, sizes):
    return jax.lax.ragged_dot(x, kernel.astype(x.dtype), sizes)


def _ragged_forward(x, kernel, sizes):
    return _ragged_dot(x, kernel, sizes), (x, kernel, sizes)


def _ragged_backward(saved, slope):
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    x, kernel, sizes = saved
    d_x = jax.lax.ragged_dot(slope, kernel.astype(x.dtype).swapaxes(1, 2), sizes)
    rows = math.gcd(len(x), _TILE[0])
    tiling = rows, min(x.shape[1], _TILE[1]), min(slope.shape[1], _TILE[2])
    d_kernel = tgmm(x.T, slope, sizes, kernel.dtype, tiling, interpret=platform() != "tpu")
    return d_x, d_kernel, None


_ragged_dot.defvjp(_ragged_forward, _ragged_backward)
