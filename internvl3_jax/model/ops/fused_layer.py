"""The products of a decoder layer for a few rows, each with the operations before it in one kernel.

See fused_product.py. B rows, D decoder width, F width of the MLP, N heads of width H; P, Q and R
parts of products, C chunks of the cache.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float, Float32

from internvl3_jax.model.ops.fused_product import (
    ROWS,
    Split,
    heads_layout,
    norm_factor,
    product,
    vector_layout,
)


def _summed(partials, row, start, window):
    """Returns the sum of a product's parts, of `window` outputs from `start` on."""
    layout = vector_layout(window)
    parts = [
        plgpu.load(partials.at[part, row, pl.ds(start, window)], layout=layout)
        for part in range(partials.shape[0])
    ]
    return functools.reduce(jnp.add, parts)


@functools.partial(jax.jit, static_argnames=("split", "interpret"))
def norm_product(
    stream: BFloat16[Array, "B D"],
    partials: Float32[Array, "P 8 D"],
    scale: Float[Array, " D"],
    weight: BFloat16[Array, "D F"],
    split: Split,
    interpret=None,
) -> tuple[Float32[Array, "Q 8 F"], BFloat16[Array, "B D"], Float32[Array, "Q 8"]]:
    """Adds a product to the residual stream, and multiplies the norm of that with a weight.

    Returns:
      (the product's parts, still to be multiplied by the norm's factor; the new stream; the sums of
      squares of it, from which `norm_factor` is computed)
    """
    rows = stream.shape[0]

    def prepare(ins, row, span):
        stream, partials, scale = ins
        layout, here = vector_layout(span.window), pl.ds(span.start, span.window)
        x = plgpu.load(stream.at[row, here], layout=layout).astype(jnp.float32)
        x = (x + _summed(partials, row, span.start, span.window)).astype(jnp.bfloat16)
        scale = plgpu.load(scale.at[here], layout=layout).astype(jnp.float32)
        return x.astype(jnp.float32) * scale, x

    def finish(extras, row, prepared, part, span):
        new_stream, squares = extras
        _, x = prepared
        index = span.start + plgpu.broadcasted_iota(
            jnp.int32, x.shape, 0, layout=vector_layout(span.window)
        )
        new_stream[row, pl.ds(span.start, span.window)] = x
        own = (index >= span.first) & (index < span.last)
        x = jnp.where(own, x.astype(jnp.float32), 0.0)
        squares[part, row] = jnp.sum(x * x)

    extra = (
        jax.ShapeDtypeStruct(stream.shape, stream.dtype),
        jax.ShapeDtypeStruct((split.parts, ROWS), jnp.float32),
    )
    inputs = stream, partials, scale
    name = "norm_product"
    return product(inputs, weight, rows, split, prepare, finish, extra, name, interpret)


@functools.partial(jax.jit, static_argnames=("rows", "epsilon", "split", "interpret"))
def swiglu_product(
    partials: Float32[Array, "P 8 F2"],
    squares: Float32[Array, "Q 8"],
    weight: BFloat16[Array, "F D"],
    rows: int,
    epsilon: float,
    split: Split,
    interpret=None,
) -> Float32[Array, "R 8 D"]:
    """Returns the parts of (silu(gate) * up) @ weight.

    Args:
      partials: What `norm_product` returns of the kernel [gate, up].
      squares: The same.
    """
    width = weight.shape[1]

    def prepare(ins, row, span):
        partials, squares = ins
        factor = norm_factor(squares, row, width, epsilon)
        half = partials.shape[-1] // 2
        gate = _summed(partials, row, span.start, span.window) * factor
        up = _summed(partials, row, half + span.start, span.window) * factor
        return (gate / (1.0 + jnp.exp(-gate)) * up,)

    inputs, name = (partials, squares), "swiglu_product"
    return product(inputs, weight, rows, split, prepare, name=name, interpret=interpret)[0]


@functools.partial(jax.jit, static_argnames=("split", "interpret"))
def attended_product(
    out: Float32[Array, "B C N H"],
    lse: Float32[Array, "B C N _"],
    weight: BFloat16[Array, "NH D"],
    split: Split,
    interpret=None,
) -> Float32[Array, "P 8 D"]:
    """Returns the parts of attention @ weight; see fused_attention.py for the arguments."""
    width = out.shape[-1]

    def prepare(ins, row, span):
        out, lse = ins
        layout, shape = heads_layout(width), (span.window // width, width)
        heads = pl.ds(span.start // width, shape[0])

        def wide(x):
            return plgpu.layout_cast(jax.lax.broadcast_in_dim(x, shape, (0,)), layout)

        # The softmax over chunks.
        exponents = [
            plgpu.load(lse.at[row, chunk, heads, 0], layout=layout.reduce(1), optimized=False)
            for chunk in range(out.shape[1])
        ]
        largest = functools.reduce(jnp.maximum, exponents)
        weights = [jnp.exp2(exponent - largest) for exponent in exponents]
        total = functools.reduce(jnp.add, weights)
        result = None
        for chunk, weight in enumerate(weights):
            values = plgpu.load(out.at[row, chunk, heads], layout=layout, optimized=False)
            share = wide(weight / total)
            # A chunk that no token of the row is in was not written.
            values = jnp.where(share > 0, values, 0.0) * share
            result = values if result is None else result + values
        return (result,)

    rows, name = out.shape[0], "attended_product"
    return product((out, lse), weight, rows, split, prepare, name=name, interpret=interpret)[0]
