"""Attention on NVIDIA GPUs: cuDNN's fused kernel, through jax.nn.dot_product_attention.

The kernel supports causal rows and rows of given lengths. Segments, or queries in the middle of a
row, need a dense [T, S] mask: 2 bytes for each pair of tokens, and no block is skipped.
`dense_mask_bytes` is what `attention.choose` decides by.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from internvl3_jax.model.ops.context_parallel import gather_keys
from internvl3_jax.model.ops.masks import Mask
from internvl3_jax.model.ops.remat import checkpoint_name


def cudnn(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Mask | None,
    axis: str | None = None,
) -> Float[Array, "B T N H"]:
    """Computes attention of bfloat16 or float16 arrays; `axis` as in `over_mesh`."""
    if mask is not None:
        k, v, mask = gather_keys(k, v, mask, axis)
    batch, num_queries, num_keys = q.shape[0], q.shape[1], k.shape[1]

    # Express the mask in the kernel's terms.
    options = {}
    if needs_dense_mask(mask):
        dense = jnp.pad(mask.dense(), ((0, 0), (0, num_queries % 2), (0, num_keys % 2)))
        options["mask"] = dense[:, None]
    elif mask is not None:
        options["is_causal"] = True
    elif num_keys % 2:
        options["key_value_seq_lengths"] = jnp.full(batch, num_keys, jnp.int32)

    # The kernel's backward pass rejects odd lengths. No token of a causal row sees what is padded
    # behind it.
    q, k, v = (jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (q, k, v))
    out = jax.nn.dot_product_attention(q, k, v, implementation="cudnn", **options)
    return checkpoint_name(out[:, :num_queries], "attention_output")


def needs_dense_mask(mask: Mask | None) -> bool:
    """Returns whether the kernel cannot express the mask by causality and lengths."""
    if mask is None:
        return False
    return not (mask.self_attention and mask.context_shards == 1 and mask.q_segments is None)


def dense_mask_bytes(q, k, mask: Mask | None) -> int:
    """Returns the bytes of the dense mask for local arrays q and k; 0 if none is needed."""
    return 2 * q.shape[0] * q.shape[1] * k.shape[1] if needs_dense_mask(mask) else 0
