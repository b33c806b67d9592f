"""Sends tokens to the experts that their router chose, without dropping any, and back.

    weights, chosen = route(logits, count, normalize)
    groups = group(chosen, num_experts)
    rows = dispatch(x, groups, count)       a copy of each token per chosen expert, by expert
    rows = product(rows, kernel, groups)    each row times its expert's kernel
    x = combine(rows, weights, groups)      the weighted sum of each token's rows

A token and one of its experts are a pair. Pairs become rows, which are sorted by expert; an
expert's rows are padded to whole blocks. Both directions of the rows' permutation are gathers, also
in the backward pass: accelerators scatter slowly.

Axes: tokens; A experts of a token; pairs = tokens * A; rows: pairs with padding; E experts.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from internvl3_jax.model.ops.grouped_product import Kernel, grouped_dot, rows_per_block


class Groups(NamedTuple):
    """The rows of pairs.

    Attributes:
      pairs: i32[rows], the pair of each row; the number of pairs where a row is padding.
      rows: i32[pairs], the row of each pair.
      sizes: i32[E], pairs of each expert.
      experts: i32[blocks], the expert of each block; empty where rows are in no blocks.
    """

    pairs: Array
    rows: Array
    sizes: Array
    experts: Array


def route(
    logits: Float32[Array, "*tokens E"], count: int, normalize: bool
) -> tuple[Float32[Array, "*tokens A"], Int32[Array, "*tokens A"]]:
    """Returns the weights of the `count` most probable experts of each token, and their numbers.

    Args:
      normalize: Whether a token's weights are divided by their sum (Qwen3's norm_topk_prob).
    """
    weights, chosen = jax.lax.top_k(jax.nn.softmax(logits), count)
    return weights / weights.sum(axis=-1, keepdims=True) if normalize else weights, chosen


def group(chosen: Int32[Array, "tokens A"], num_experts: int) -> Groups:
    """Sorts the pairs by expert."""
    chosen, count = chosen.reshape(-1), chosen.size
    block = rows_per_block(count, num_experts)
    index = jnp.arange(count, dtype=jnp.int32)
    sizes = (chosen[:, None] == jnp.arange(num_experts, dtype=jnp.int32)[None]).sum(
        axis=0, dtype=jnp.int32
    )
    if block == 1:  # every row is a block
        return Groups(index, index, sizes, chosen)

    # The first pair of each expert in the order of experts, and its first row.
    order = jnp.argsort(chosen, stable=True).astype(jnp.int32)
    padded = -(-sizes // block) * block if block else sizes
    first_pair, first_row = jnp.cumsum(sizes) - sizes, jnp.cumsum(padded) - padded
    by_expert = chosen[order]
    row = first_row[by_expert] + index - first_pair[by_expert]
    rows = jnp.zeros(count, jnp.int32).at[order].set(row, unique_indices=True)
    if not block:
        return Groups(order, rows, sizes, jnp.zeros(0, jnp.int32))

    # Each expert has less than a block of padding. The blocks that are left over are the last
    # expert's.
    blocks = min(count, count // block + num_experts)
    pairs = jnp.full(blocks * block, count, jnp.int32).at[row].set(order, unique_indices=True)
    starts = jnp.arange(blocks, dtype=jnp.int32) * block
    experts = jnp.searchsorted(jnp.cumsum(padded), starts, side="right").astype(jnp.int32)
    return Groups(pairs, rows, sizes, jnp.minimum(experts, num_experts - 1))


def product(
    rows: Float[Array, "rows d_in"], kernel: Kernel, groups: Groups
) -> Float[Array, "rows d_out"]:
    """Returns each row times its expert's kernel, which may be quantized."""
    return grouped_dot(rows, kernel, groups.sizes, groups.experts)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def dispatch(x: Float[Array, "tokens D"], groups: Groups, count: int) -> Float[Array, "rows D"]:
    """Returns the token of each row, zeros where the row is padding.

    Args:
      count: Experts of a token.
    """
    return jnp.take(x, groups.pairs // count, axis=0, mode="fill", fill_value=0)


def _dispatch_forward(x, groups, count):
    return dispatch(x, groups, count), groups


def _dispatch_backward(count, groups, slope):
    return slope[groups.rows].reshape(-1, count, slope.shape[-1]).sum(axis=1), None


dispatch.defvjp(_dispatch_forward, _dispatch_backward)


def combine(
    rows: Float[Array, "rows D"], weights: Float32[Array, "tokens A"], groups: Groups
) -> Float[Array, "tokens D"]:
    """Returns the sum over a token's experts of weight times row, added in float32."""
    pairs = _collect(rows, groups).reshape(*weights.shape, -1).astype(jnp.float32)
    return (pairs * weights[..., None]).sum(axis=1).astype(rows.dtype)


@jax.custom_vjp
def _collect(rows: Float[Array, "rows D"], groups: Groups) -> Float[Array, "pairs D"]:
    return rows[groups.rows]


def _collect_backward(groups, slope):
    return jnp.take(slope, groups.pairs, axis=0, mode="fill", fill_value=0), None


_collect.defvjp(lambda rows, groups: (_collect(rows, groups), groups), _collect_backward)
