"""One attention function; the rest of the code reaches every implementation through it.
docs/attention.md says which runs where.

B batch, T queries, S keys, N query heads, K key/value heads (N is a multiple of K), H head width.
"""

import functools

import jax
import jax.numpy as jnp

from internvl3_jax.model.ops import cudnn_attention
from internvl3_jax.model.ops.context_parallel import gather_keys, over_mesh
from internvl3_jax.model.ops.flash_attention import flash_attention
from internvl3_jax.model.ops.masks import MASKED, Mask, cache_mask, causal
from internvl3_jax.model.ops.remat import checkpoint_name
from internvl3_jax.model.ops.xla_attention import xla_attention, xla_attention_per_head

__all__ = ["IMPLEMENTATIONS", "MASKED", "Mask", "attention", "causal", "cache_mask", "platform"]

IMPLEMENTATIONS = ("auto", "xla", "heads", "blockwise", "ring", "splash", "cudnn")

# scores per head (T * S) from which one head at a time is faster on a CPU
_MAP_HEADS_FROM = 128 * 1024
_BLOCKS_FROM = 2048 * 2048  # and from which blocks are, and take less memory
# bytes of float32 scores of a device's part that an accelerator may hold at once
_SCORES = 256 * 2**20
# bytes of a table of masked pairs that cuDNN is given; without remat every layer keeps one
_TABLE = 64 * 2**20
_FUSED_FROM = 256  # queries from which a fused kernel is called


def attention(q, k, v, mask: Mask | None = None, implementation: str = "auto"):
    """Softmax(q k^T / sqrt(H)) v with a float32 softmax; under a mesh, each device's part of it
    (ops/context.py).

    Args:
      q: [B,T,N,H]; k, v: [B,S,K,H] of the same dtype.
      mask: from `causal` (rows among themselves) or `cache_mask` (against a cache); None where
          every query sees every key (the vision
        tower).
      implementation: one of IMPLEMENTATIONS:
        "xla" all scores at once, "heads" one head at a time (on CPUs), "blockwise" flash attention in plain JAX, "ring" the same with
        the keys of split rows passed round, "splash" the TPU kernel, "cudnn" the NVIDIA kernel;
        "auto" chooses by the devices of the mesh, or else the default ones, and by sizes.

    Returns [B,T,N,H] in q's dtype, named "attention_output" for ops/remat.py. A query that sees no
    key gives finite numbers.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"attention implementation {implementation!r} is not one of {', '.join(IMPLEMENTATIONS)}"
        )
    return over_mesh(functools.partial(_local, implementation=implementation), q, k, v, mask)


def _local(q, k, v, mask: Mask | None, axis: str | None, implementation: str):
    """On one device, or of one device's part. `axis`: see `over_mesh`."""
    devices = platform()
    if implementation == "auto":
        implementation = choose(devices, q, k, mask, axis)
    needed = {"splash": "tpu", "cudnn": "gpu"}.get(implementation, devices)
    # a CPU emulates that one
    if devices != needed and (implementation, devices) != ("splash", "cpu"):
        raise ValueError(
            f"attention implementation {implementation!r} is for {needed}; these devices are {devices}; use 'auto'"
        )
    if implementation in ("blockwise", "ring"):
        return flash_attention(q, k, v, mask, axis, ring=implementation == "ring")
    if implementation == "splash":
        # Pallas takes a quarter of a second to import
        from internvl3_jax.model.ops.splash_attention import splash

        return splash(q, k, v, mask, axis, interpret=devices == "cpu")
    if implementation == "cudnn":
        return cudnn_attention.cudnn(q, k, v, mask, axis)
    if mask is not None:
        k, v, mask = gather_keys(k, v, mask, axis)
    return checkpoint_name(
        (xla_attention if implementation == "xla" else xla_attention_per_head)(q, k, v, mask),
        "attention_output",
    )


def platform() -> str:
    """ "cpu", "gpu" or "tpu": what the mesh in context is made of, be it there or only compiled
    for; else the default devices.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    name = jax.default_backend() if device is None or device.platform is None else device.platform
    return "gpu" if name in ("cuda", "rocm") else name


def choose(platform: str, q, k, mask: Mask | None, axis: str | None) -> str:
    """The implementation for a device's part of q and k. `axis`: the keys are split over it and
    will be gathered.
    """
    batch, length, heads, width = q.shape
    parts = 1 if axis is None else jax.lax.axis_size(axis)
    scores = length * k.shape[1] * parts
    if platform == "cpu":
        return (
            "xla" if scores < _MAP_HEADS_FROM else "heads" if scores < _BLOCKS_FROM else "blockwise"
        )
    if (
        platform == "tpu"
        and length >= _FUSED_FROM
        and width % 64 == 0
        and (mask is None or mask.kv_until is None)
    ):
        return "splash"
    if platform == "gpu" and length >= _FUSED_FROM and width % 8 == 0 and width <= 128:
        # Over split rows cuDNN would need a table.
        if (
            q.dtype in (jnp.bfloat16, jnp.float16)
            and axis is None
            and cudnn_attention.table_bytes(q, k, mask) <= _TABLE
        ):
            return "cudnn"
    return "xla" if 4 * batch * heads * scores <= _SCORES else "blockwise"
