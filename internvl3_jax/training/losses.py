"""Weighted next-token cross-entropy: from logits, or from hidden states without ever holding the
logits of more than a chunk.

A loss is a sum of weighted losses; the caller divides by the sum of the weights of everything that
belongs to one update, over devices, hosts and micro-batches alike.
"""

import functools
import math

import jax
import jax.numpy as jnp

from internvl3_jax.parallel.collectives import axis_size, constrain
from internvl3_jax.parallel.sharding import BATCH_AXES, SHARDED_AXES

GROUP_AXES = (*BATCH_AXES, "context")  # axes of the mesh that tokens are split over
_MASKED = -1e30


def cross_entropy(logits, targets, weights):
    """Sum of weighted losses and sum of weights, both f32[].

    logits f32[B,T,V] (padding already masked), targets i32[B,T], weights f32[B,T]; positions with
    weight 0 add nothing.
    """
    log_normaliser = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    losses = jnp.where(weights > 0, (log_normaliser - picked) * weights, 0.0)
    return losses.sum(), weights.sum()


def chunked_cross_entropy(
    hidden, kernel, targets, weights, vocab_size: int, chunk: int = 1024, groups: int | None = None
):
    """The same from hidden states, `chunk` tokens at a time and only for the tokens that have a
    weight.

    Args:
      hidden: [B,T,D] in the compute dtype, which the products take; logits, losses and sums are
          float32.
      kernel: [D, padded V], any float dtype; its gradient is summed in float32. Columns from
          `vocab_size` on are padding.
      targets: i32[B,T]; weights: f32[B,T], 0 where nothing is trained.
      groups: parts of the batch, one after the other, each of which does its own chunks: the number
          of devices that the tokens are split
        over, so that no token leaves its device. None: as many as the mesh in context
        (`jax.set_mesh`) has along `GROUP_AXES`.

    Returns (f32[] sum of weight * loss, f32[B,T] loss of each token that has a weight and 0
    elsewhere, without gradient).

    Memory: float32 logits of `chunk` tokens of each group, twice with gradients, and one float32
    matrix like `kernel` for each group.
    """
    rows, length, width = hidden.shape
    by_rows = math.gcd(rows, axis_size(*BATCH_AXES) if groups is None else groups)
    by_tokens = math.gcd(length, axis_size("context")) if groups is None else 1
    shape = (by_rows, rows // by_rows, by_tokens, length // by_tokens)

    def grouped(x):  # [B,T,...] -> [G,N,...]
        return (
            x.reshape(*shape, *x.shape[2:])
            .swapaxes(1, 2)
            .reshape(by_rows * by_tokens, -1, *x.shape[2:])
        )

    chunk = min(chunk, shape[1] * shape[3])
    total, losses = _grouped(
        grouped(hidden), kernel, grouped(targets), grouped(weights), vocab_size, chunk
    )
    losses = (
        losses.reshape(by_rows, by_tokens, shape[1], shape[3]).swapaxes(1, 2).reshape(rows, length)
    )
    return total, jax.lax.stop_gradient(losses)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _grouped(hidden, kernel, targets, weights, vocab_size, chunk):
    """hidden [G,N,D], kernel [D,V], targets and weights [G,N] -> (f32[], f32[G,N])"""
    losses, _, _ = _over_chunks(
        hidden, kernel, targets, weights, vocab_size, chunk, with_gradients=False
    )
    return (losses * weights).sum(), losses


def _grouped_forward(hidden, kernel, targets, weights, vocab_size, chunk):
    # The total is linear in what comes back to it, so the gradients can be made while the logits
    # are there (Hsu et al. 2024, Liger):
    # three products with the kernel in place of four.
    losses, d_hidden, d_kernel = _over_chunks(
        hidden, kernel, targets, weights, vocab_size, chunk, with_gradients=True
    )
    return ((losses * weights).sum(), losses), (d_hidden, d_kernel, losses)


def _grouped_backward(vocab_size, chunk, saved, cotangents):
    d_hidden, d_kernel, losses = saved
    scale, _ = cotangents
    return (
        (d_hidden * scale).astype(d_hidden.dtype),
        (d_kernel * scale).astype(d_kernel.dtype),
        None,
        losses * scale,
    )


_grouped.defvjp(_grouped_forward, _grouped_backward)


def _over_chunks(hidden, kernel, targets, weights, vocab_size, chunk, with_gradients: bool):
    """(losses f32[G,N], gradient by hidden [G,N,D], gradient by kernel [D,V]) of the weighted sum;
    the gradients None if not asked for.

    The tokens that have a weight are put first, so that as many chunks are computed as the group
    with most of them has.
    """
    groups, count, width = hidden.shape
    order, place = _weighted_first(weights)
    spare = -count % chunk  # the last chunk is filled up with a token without weight
    order = jnp.pad(order, ((0, 0), (0, spare)))
    valid = jnp.pad(jnp.take_along_axis(weights, order[:, :count], axis=1), ((0, 0), (0, spare)))
    chunks = -(-(weights != 0).sum(axis=1).max() // chunk)
    # Gathered once, in the compute dtype, where the parameters are split over the devices of the
    # batch; not once for each chunk.
    cast = constrain(kernel.astype(hidden.dtype), None, "tensor")
    real = (jnp.arange(kernel.shape[1]) < vocab_size)[None, None]

    def body(index, carry):
        picked, weight = (
            jax.lax.dynamic_slice_in_dim(x, index * chunk, chunk, axis=1) for x in (order, valid)
        )
        x = jnp.take_along_axis(hidden, picked[..., None], axis=1)
        target = jnp.take_along_axis(targets, picked, axis=1)
        found, *gradients = _chunk(x, cast, target, weight, real, with_gradients)
        losses = jax.lax.dynamic_update_slice_in_dim(carry[0], found, index * chunk, axis=1)
        if not with_gradients:
            return (losses,)
        d_hidden = jax.lax.dynamic_update_slice_in_dim(
            carry[1], gradients[0], index * chunk, axis=1
        )
        return losses, d_hidden, carry[2] + gradients[1]

    carry = (constrain(jnp.zeros(order.shape, jnp.float32), GROUP_AXES, None),)
    if with_gradients:
        carry += (
            constrain(jnp.zeros((*order.shape, width), hidden.dtype), GROUP_AXES, None, None),
            constrain(jnp.zeros((groups, *kernel.shape), jnp.float32), GROUP_AXES, None, "tensor"),
        )
    carry = jax.lax.fori_loop(0, chunks, body, carry)
    losses = jnp.take_along_axis(carry[0], place, axis=1)
    if not with_gradients:
        return losses, None, None
    d_hidden = jnp.take_along_axis(carry[1], place[..., None], axis=1)
    d_kernel = constrain(carry[2].sum(axis=0), SHARDED_AXES, "tensor")
    return losses, d_hidden, d_kernel.astype(kernel.dtype)


def _chunk(x, kernel, targets, weights, real, with_gradients: bool):
    """One chunk: x [G,C,D], targets and weights [G,C] -> losses f32[G,C] and, if asked for, d_x
    [G,C,D] and d_kernel f32[G,D,V].
    """
    logits = jnp.einsum("gcd,dv->gcv", x, kernel, preferred_element_type=jnp.float32)
    logits = jnp.where(real, logits, _MASKED)
    # Compared with a counter, not picked by index: that stays local where the vocabulary is
    # sharded.
    hit = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2) == targets[..., None]
    top = logits.max(axis=-1, keepdims=True)
    log_normaliser = top + jnp.log(jnp.exp(logits - top).sum(axis=-1, keepdims=True))
    losses = log_normaliser[..., 0] - jnp.where(hit, logits, 0.0).sum(axis=-1)
    losses = jnp.where(weights != 0, losses, 0.0)
    if not with_gradients:
        return (losses,)
    d_logits = ((jnp.exp(logits - log_normaliser) - hit) * weights[..., None]).astype(x.dtype)
    d_x = jnp.einsum("gcv,dv->gcd", d_logits, kernel, preferred_element_type=jnp.float32).astype(
        x.dtype
    )
    d_kernel = jnp.einsum("gcd,gcv->gdv", x, d_logits, preferred_element_type=jnp.float32)
    return losses, d_x, d_kernel


def _weighted_first(weights):
    """(order, place), both i32[G,N]: tokens with a weight first, each kind in its order; place[g,
    order[g, i]] = i.
    """
    weighted = weights != 0
    before = jnp.cumsum(weighted, axis=1)
    place = jnp.where(
        weighted, before - 1, before[:, -1:] + jnp.cumsum(~weighted, axis=1) - 1
    ).astype(jnp.int32)
    return jnp.argsort(~weighted, axis=1, stable=True).astype(jnp.int32), place
