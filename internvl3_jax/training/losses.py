"""Weighted next-token cross-entropy, from logits or, chunk by chunk, from hidden states.

Both are sums of weighted losses. The caller divides by the sum of the weights of the full batch,
over devices, hosts and micro-batches.

Axes: B rows, T tokens, D width, V vocabulary with padding, G groups, N tokens of a group, C tokens
of a chunk.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from internvl3_jax.parallel.collectives import axis_size, constrain
from internvl3_jax.parallel.sharding import BATCH_AXES, SHARDED_AXES

# Axes of the mesh that shard the tokens.
GROUP_AXES = (*BATCH_AXES, "context")
_MASKED = -1e30


def cross_entropy(
    logits: Float[Array | np.ndarray, "B T V"],
    targets: Int[Array | np.ndarray, "B T"],
    weights: Float[Array | np.ndarray, "B T"],
) -> tuple[Float[Array, ""], Float[Array | np.ndarray, ""] | np.floating]:
    """Returns the sum of weighted losses and the sum of weights.

    Args:
      logits: float32, with the padding of the vocabulary masked.
      weights: Positions with weight 0 add nothing.
    """
    log_normalizer = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    losses = jnp.where(weights > 0, (log_normalizer - picked) * weights, 0.0)
    return losses.sum(), weights.sum()


def chunked_cross_entropy(
    hidden: Float[Array | np.ndarray, "B T D"],
    kernel: Float[Array | np.ndarray, "D V"],
    targets: Int[Array | np.ndarray, "B T"],
    weights: Float[Array | np.ndarray, "B T"],
    vocab_size: int,
    chunk: int = 1024,
    groups: int | None = None,
) -> tuple[Float[Array, ""], Float[Array, "B T"]]:
    """Computes the cross-entropy of the tokens that have a weight, `chunk` tokens at a time.

    Memory: float32 logits of `chunk` tokens of each group, twice with gradients, and one float32
    array like `kernel` per group.

    Args:
      hidden: Hidden states in the compute dtype, which the products take. Logits, losses and sums
        are float32.
      kernel: Of the output head; columns from `vocab_size` on are padding. Its gradient is summed
        in float32.
      weights: 0 where a token is not supervised.
      groups: Number of parts of the batch with chunks of their own: that of the devices that the
        tokens are sharded over, so that no token leaves its device. None takes the size of
        `GROUP_AXES` in the mesh in context (`jax.set_mesh`).

    Returns:
      The sum of weight * loss; and without gradient the loss of each token that has a weight, 0
      elsewhere.
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
    """Maps hidden [G,N,D], kernel [D,V], targets and weights [G,N] -> (f32[], f32[G,N])"""
    losses, _, _ = _over_chunks(
        hidden, kernel, targets, weights, vocab_size, chunk, with_gradients=False
    )
    return (losses * weights).sum(), losses


def _grouped_forward(hidden, kernel, targets, weights, vocab_size, chunk):
    # The total is linear in its cotangent, so that the gradients can be computed while the logits
    # are in memory (Hsu et al. 2024, Liger): three products with the kernel instead of four.
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
    """Returns losses f32[G,N] and the gradients of the weighted sum by hidden and kernel, or None.

    Tokens that have a weight come first, so that the number of chunks is that of the group with the
    most of them.
    """
    groups, count, width = hidden.shape
    order, place = _weighted_first(weights)
    # The last chunk is filled up with tokens without weight.
    spare = -count % chunk
    order = jnp.pad(order, ((0, 0), (0, spare)))
    valid = jnp.pad(jnp.take_along_axis(weights, order[:, :count], axis=1), ((0, 0), (0, spare)))
    chunks = -(-(weights != 0).sum(axis=1).max() // chunk)
    # All-gathered once, in the compute dtype, not once per chunk.
    cast = constrain(kernel.astype(hidden.dtype), None, "tensor")
    real = (jnp.arange(kernel.shape[1]) < vocab_size)[None, None]

    def body(index, carry):
        picked, weight = (
            jax.lax.dynamic_slice_in_dim(x, index * chunk, chunk, axis=1) for x in (order, valid)
        )
        x = jnp.take_along_axis(hidden, picked[..., None], axis=1)
        target = jnp.take_along_axis(targets, picked, axis=1)
        chunk_losses, *gradients = _chunk(x, cast, target, weight, real, with_gradients)
        losses = jax.lax.dynamic_update_slice_in_dim(carry[0], chunk_losses, index * chunk, axis=1)
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
    """Returns the losses of a chunk, f32[G,C], and with gradients d_x [G,C,D] and d_kernel [G,D,V].

    x is [G,C,D]; targets and weights are [G,C].
    """
    logits = jnp.einsum("gcd,dv->gcv", x, kernel, preferred_element_type=jnp.float32)
    logits = jnp.where(real, logits, _MASKED)
    # Compared with a counter, not picked by index: that needs no communication where the vocabulary
    # is sharded.
    hit = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2) == targets[..., None]
    top = logits.max(axis=-1, keepdims=True)
    log_normalizer = top + jnp.log(jnp.exp(logits - top).sum(axis=-1, keepdims=True))
    losses = log_normalizer[..., 0] - jnp.where(hit, logits, 0.0).sum(axis=-1)
    losses = jnp.where(weights != 0, losses, 0.0)
    if not with_gradients:
        return (losses,)
    d_logits = ((jnp.exp(logits - log_normalizer) - hit) * weights[..., None]).astype(x.dtype)
    d_x = jnp.einsum("gcv,dv->gcd", d_logits, kernel, preferred_element_type=jnp.float32).astype(
        x.dtype
    )
    d_kernel = jnp.einsum("gcd,gcv->gdv", x, d_logits, preferred_element_type=jnp.float32)
    return losses, d_x, d_kernel


def _weighted_first(weights):
    """Returns (order, place), both i32[G,N]: tokens with a weight first, otherwise in order.

    place[g, order[g, i]] = i.
    """
    weighted = weights != 0
    before = jnp.cumsum(weighted, axis=1)
    place = jnp.where(
        weighted, before - 1, before[:, -1:] + jnp.cumsum(~weighted, axis=1) - 1
    ).astype(jnp.int32)
    return jnp.argsort(~weighted, axis=1, stable=True).astype(jnp.int32), place
