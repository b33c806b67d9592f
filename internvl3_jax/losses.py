"""Weighted next-token cross-entropy."""

import jax
import jax.numpy as jnp


def cross_entropy(logits, targets, weights):
    """Sum of weighted losses and sum of weights, both f32[], so that the caller can normalise over devices and micro-batches.

    logits f32[B,T,V] (padding already masked), targets i32[B,T], weights f32[B,T]; positions with weight 0 add nothing.
    """
    log_normaliser = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    losses = jnp.where(weights > 0, (log_normaliser - picked) * weights, 0.0)
    return losses.sum(), weights.sum()
