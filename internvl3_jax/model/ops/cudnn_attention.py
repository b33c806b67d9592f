"""Attention on NVIDIA GPUs by cuDNN's fused kernel, through jax.nn.

It knows causal rows and rows of given lengths. Segments, or queries in the middle of a row, it
takes only as a table of queries by keys: 2 bytes for each pair of tokens, and no block is skipped.
`table_bytes` is what to judge by.

B batch, T queries, S keys, N query heads, K key/value heads (N is a multiple of K), H head width.
"""

import jax
import jax.numpy as jnp

from internvl3_jax.model.ops.context_parallel import gather_keys
from internvl3_jax.model.ops.masks import Mask
from internvl3_jax.model.ops.remat import checkpoint_name


def cudnn(q, k, v, mask: Mask | None, axis: str | None = None):
    """[B,T,N,H] in q's dtype, which is bfloat16 or float16."""
    if mask is not None:
        k, v, mask = gather_keys(k, v, mask, axis)
    batch, length, keys = q.shape[0], q.shape[1], k.shape[1]
    how = {}
    if needs_table(mask):
        how["mask"] = jnp.pad(mask.dense(), ((0, 0), (0, length % 2), (0, keys % 2)))[:, None]
    elif mask is not None:
        how["is_causal"] = True
    elif keys % 2:
        how["key_value_seq_lengths"] = jnp.full(batch, keys, jnp.int32)
    # Its backward pass refuses odd lengths. Behind a causal row, what is added is seen by nothing
    # else.
    q, k, v = (jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (q, k, v))
    mixed = jax.nn.dot_product_attention(q, k, v, implementation="cudnn", **how)[:, :length]
    return checkpoint_name(mixed, "attention_output")


def needs_table(mask: Mask | None) -> bool:
    plain = mask is None or (mask.own and mask.parts == 1 and mask.q_segments is None)
    return not plain


def table_bytes(q, k, mask: Mask | None) -> int:
    """Of the table for these (local) arrays; 0 where none is needed."""
    return 2 * q.shape[0] * q.shape[1] * k.shape[1] if needs_table(mask) else 0
