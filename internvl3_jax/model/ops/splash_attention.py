"""Attention on TPUs: the Pallas kernel "splash attention" that comes with jax, given the blocks
that packed rows need.

jax's own front end knows masks that are fixed at compile time. Which blocks a packed row needs is
known only when it is there, so the kernel's tables of blocks are made here, for each row: blocks of
other samples cost nothing.

B batch, T queries, S keys, N query heads, K key/value heads (N is a multiple of K), H head width.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

from internvl3_jax.model.ops.context_parallel import gather_keys
from internvl3_jax.model.ops.masks import Mask, block_mask, in_order, pad_mask

LANES = 128  # blocks are multiples of it
_SAVED = "attention_output"


def splash(q, k, v, mask: Mask | None, axis: str | None = None, interpret: bool = False):
    """[B,T,N,H] in q's dtype. H is a multiple of 64.

    axis: of the mesh, inside a shard_map, that the keys are split over. interpret: emulates the
        kernel, on any backend.
    """
    if q.shape[-1] % 64:
        raise ValueError(
            f"attention implementation 'splash' takes heads of a multiple of 64; these are {q.shape[-1]} wide; use 'blockwise'"
        )
    length, scale = q.shape[1], q.shape[-1] ** -0.5
    q = (q.astype(jnp.float32) * scale).astype(q.dtype)
    if mask is not None:
        if mask.kv_until is not None:
            raise ValueError(
                "attention implementation 'splash' knows no answers that share a question (data.share_question)"
            )
        k, v, mask = gather_keys(k, v, mask, axis)
        k, v = in_order(k, mask.parts), in_order(v, mask.parts)
    block_q, block_kv = block_size(q.shape[1]), block_size(k.shape[1])
    q, k, v = (_blocked(x, block) for x, block in ((q, block_q), (k, block_kv), (v, block_kv)))
    if mask is None:
        mixed = _unmasked(q, k, v, length, _options(block_q, block_kv, interpret))
    else:
        mixed = _masked(q, k, v, _ordered(mask), _options(block_q, block_kv, interpret))
    return mixed.transpose(0, 2, 1, 3)[:, :length]


def block_size(length: int) -> int:
    """The largest block with which the fewest tokens are added: 384 for the tower's 1,025 (to
    1,152), 512 for 16,384.
    """
    # the tables of blocks must fit into the scalar memory
    largest = 512 if length <= 65_536 else 1024
    return min(
        range(LANES, largest + 1, LANES), key=lambda block: (-(-length // block) * block, -block)
    )


def _blocked(x, block: int):
    """[B,T,N,H] -> [B,N,T',H]"""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % block), (0, 0), (0, 0))).transpose(0, 2, 1, 3)


def _options(block_q: int, block_kv: int, interpret: bool) -> dict:
    compute = min(block_kv, 512) if block_kv % 512 == 0 else block_kv
    sizes = kernels.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_kv_compute=compute,
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        block_kv_dkv_compute=compute,
        block_q_dq=block_q,
        block_kv_dq=block_kv,
    )
    return {
        "block_sizes": sizes,
        "is_mqa": False,
        "save_residuals": False,
        "mask_value": kernels.DEFAULT_MASK_VALUE,
        "attn_logits_soft_cap": None,
        "residual_checkpoint_name": _SAVED,
        "interpret": interpret,
    }


def _unmasked(q, k, v, length: int, options: dict):
    """Every query sees the first `length` keys: those added are a segment of their own."""
    info = MaskInfo(None, None, None, None, None)
    kernel = kernels.SplashAttentionKernel(info, info, info, mask_function=None, **options)
    segments = None
    if k.shape[2] > length:
        segments = kernels.SegmentIds(
            *(jnp.asarray(jnp.arange(x.shape[2]) >= length, jnp.int32) for x in (q, k))
        )
    return jax.vmap(lambda q, k, v: kernel(q, k, v, segment_ids=segments))(q, k, v)


def _ordered(mask: Mask) -> Mask:
    """The mask for keys in the order of their slots."""
    kv_segments = None if mask.kv_segments is None else in_order(mask.kv_segments, mask.parts)
    return Mask(mask.q_slots, in_order(mask.kv_slots, mask.parts), mask.q_segments, kv_segments)


def _masked(q, k, v, mask: Mask, options: dict):
    mask = pad_mask(mask, q.shape[2], k.shape[2])
    sizes = options["block_sizes"]
    needed = block_mask(mask, sizes.block_q, sizes.block_kv)
    # The kernel divides by the sum of at least one block.
    needed = needed.at[:, :, 0].set(needed[:, :, 0] | ~needed.any(axis=-1))

    def row(q, k, v, needed, slots, segments):
        by_queries = _info(needed, 1, slots)
        kernel = kernels.SplashAttentionKernel(
            by_queries, by_queries, _info(needed, 0, slots), mask_function=_at_or_before, **options
        )
        return kernel(q, k, v, segment_ids=segments)

    segments = (
        None if mask.q_segments is None else kernels.SegmentIds(mask.q_segments, mask.kv_segments)
    )
    return jax.vmap(row)(q, k, v, needed, mask.q_slots, segments)


def _at_or_before(q_slots, kv_slots):
    return q_slots >= kv_slots


def _info(needed, axis: int, slots) -> MaskInfo:
    """Tables for a kernel that runs over blocks of keys (axis 1) or of queries (axis 0) in its
    inner loop.

    Beside each block stands the one that is loaded then: at a block that is not needed, the next
    one that is, or else the last.
    """
    count = needed.shape[axis]
    index = jnp.broadcast_to(jnp.expand_dims(jnp.arange(count), 1 - axis), needed.shape)
    following = jax.lax.cummin(jnp.where(needed, index, count), axis=axis, reverse=True)
    last = jnp.where(needed, index, 0).max(axis=axis, keepdims=True)
    load = jnp.where(following == count, last, following)
    small = jnp.int8 if count <= 127 else jnp.int16
    return MaskInfo(
        data_next=load.astype(small)[None],
        mask_next=None,
        block_mask=needed.astype(jnp.int8)[None],
        partial_mask_blocks=None,
        q_sequence=slots,
        is_dynamic_mask=True,
    )
