"""Attention on TPUs: jax's Pallas kernel "splash attention", with block tables for packed rows.

jax's own front end takes masks that are fixed at compile time. The blocks that a packed row needs
are known only at run time, so this file builds the kernel's tables of blocks for each row, on the
device. Blocks of other samples cost nothing.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo
from jaxtyping import Array, Float

from internvl3_jax.model.ops.context_parallel import gather_keys
from internvl3_jax.model.ops.masks import Mask, block_mask, pad_mask, undo_zigzag

LANES = 128  # blocks are multiples of it
_CHECKPOINT_NAME = "attention_output"


def splash(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Mask | None,
    axis: str | None = None,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Computes attention with the TPU kernel; H is a multiple of 64.

    Args:
      axis: Mesh axis, inside a shard_map, that keys are sharded over; see `over_mesh`.
      interpret: Emulate the kernel, on any backend.

    Raises:
      ValueError: The kernel does not support the head width or the mask.
    """
    if q.shape[-1] % 64:
        raise ValueError(
            f"attention implementation 'splash' needs heads of a multiple of 64; these are "
            f"{q.shape[-1]} wide; use 'flash'"
        )
    if mask is not None and mask.kv_last_query is not None:
        raise ValueError(
            "attention implementation 'splash' does not support data.share_question; use "
            "attention_language=flash"
        )
    length, scale = q.shape[1], q.shape[-1] ** -0.5
    q = (q.astype(jnp.float32) * scale).astype(q.dtype)

    # The kernel needs keys in the order of their slots.
    if mask is not None:
        k, v, mask = gather_keys(k, v, mask, axis)
        k, v = undo_zigzag(k, mask.context_shards), undo_zigzag(v, mask.context_shards)

    # Pad to whole blocks and move heads to the front.
    block_q, block_kv = block_size(q.shape[1]), block_size(k.shape[1])
    options = _options(block_q, block_kv, interpret)
    q, k, v = (_to_kernel(x, block) for x, block in ((q, block_q), (k, block_kv), (v, block_kv)))
    if mask is None:
        out = _unmasked(q, k, v, length, options)
    else:
        out = _masked(q, k, v, _undo_zigzag_keys(mask), options)
    return out.transpose(0, 2, 1, 3)[:, :length]


def block_size(length: int) -> int:
    """Returns the largest block that needs the least padding of rows of `length` tokens.

    384 for the tower's 1,025 tokens (padded to 1,152), 512 for 16,384.
    """
    # The tables of blocks must fit into the scalar memory.
    largest = 512 if length <= 65_536 else 1024
    return min(
        range(LANES, largest + 1, LANES), key=lambda block: (-(-length // block) * block, -block)
    )


def _to_kernel(x, block: int):
    """Transposes [B,T,N,H] -> [B,N,T,H], with T padded to whole blocks."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % block), (0, 0), (0, 0))).transpose(0, 2, 1, 3)


def _options(block_q: int, block_kv: int, interpret: bool) -> dict:
    # The kernel may load larger blocks of keys than it multiplies at once.
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
        "residual_checkpoint_name": _CHECKPOINT_NAME,
        "interpret": interpret,
    }


def _unmasked(q, k, v, length: int, options: dict):
    """Attends to the first `length` keys; the padding is a segment of its own."""
    info = MaskInfo(None, None, None, None, None)
    kernel = kernels.SplashAttentionKernel(info, info, info, mask_function=None, **options)
    segments = None
    if k.shape[2] > length:
        segments = kernels.SegmentIds(
            *(jnp.asarray(jnp.arange(x.shape[2]) >= length, jnp.int32) for x in (q, k))
        )
    return jax.vmap(lambda q, k, v: kernel(q, k, v, segment_ids=segments))(q, k, v)


def _undo_zigzag_keys(mask: Mask) -> Mask:
    """Returns the mask for keys in the order of their slots."""
    shards, kv_segments = mask.context_shards, mask.kv_segments
    if kv_segments is not None:
        kv_segments = undo_zigzag(kv_segments, shards)
    return Mask(mask.q_slots, undo_zigzag(mask.kv_slots, shards), mask.q_segments, kv_segments)


def _masked(q, k, v, mask: Mask, options: dict):
    """Attends within each row's samples, skipping the blocks that no query needs."""
    mask = pad_mask(mask, q.shape[2], k.shape[2])
    sizes = options["block_sizes"]
    needed = block_mask(mask, sizes.block_q, sizes.block_kv)
    # The kernel divides by the softmax sum, so every block of queries needs at least one of keys.
    needed = needed.at[:, :, 0].set(needed[:, :, 0] | ~needed.any(axis=-1))

    # Each row has its own tables, so the kernel is built and mapped row by row.
    def row(q, k, v, needed, slots, segments):
        forward, backward = _mask_info(needed, 1, slots), _mask_info(needed, 0, slots)
        kernel = kernels.SplashAttentionKernel(
            forward, forward, backward, mask_function=_at_or_before, **options
        )
        return kernel(q, k, v, segment_ids=segments)

    segments = (
        None if mask.q_segments is None else kernels.SegmentIds(mask.q_segments, mask.kv_segments)
    )
    return jax.vmap(row)(q, k, v, needed, mask.q_slots, segments)


def _at_or_before(q_slots, kv_slots):
    return q_slots >= kv_slots


def _mask_info(needed, axis: int, slots) -> MaskInfo:
    """Returns the kernel's tables for an inner loop over key blocks (axis 1) or query blocks (0).

    `data_next` names the block to load at each step: the block itself if it is needed, else the
    next needed one, else the last.
    """
    count = needed.shape[axis]
    index = jnp.broadcast_to(jnp.expand_dims(jnp.arange(count), 1 - axis), needed.shape)
    following = jax.lax.cummin(jnp.where(needed, index, count), axis=axis, reverse=True)
    last = jnp.where(needed, index, 0).max(axis=axis, keepdims=True)
    load = jnp.where(following == count, last, following)
    index_dtype = jnp.int8 if count <= 127 else jnp.int16
    return MaskInfo(
        data_next=load.astype(index_dtype)[None],
        mask_next=None,
        block_mask=needed.astype(jnp.int8)[None],
        partial_mask_blocks=None,
        q_sequence=slots,
        is_dynamic_mask=True,
    )
