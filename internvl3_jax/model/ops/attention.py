"""Attention: one function for the whole code base, and the choice of its backend.

    backend       runs on    what it is                                  float32 scores in memory
    xla           all        plain products, all heads at once           B * N * T * S
    xla_per_head  all        plain products, one head after another      T * S
    flash         all        FlashAttention in plain JAX                 N * 512 * 512
    ring          all        flash; keys of sharded rows go round a ring N * 512 * 512
    splash        TPU        Pallas kernel of jax, heads of k * 64       none
    cudnn         NVIDIA     cuDNN kernel, bfloat16 or float16           none

"auto" takes the fused kernel of the accelerator where it supports the mask and the sizes. Elsewhere
it takes xla for few scores, as in decoding, and flash for many; see `choose`. All backends agree to
1e-5 in float32 (tests/test_attention.py). docs/attention.md has the reasons and the measurements.

Axis letters are those of model/__init__.py.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int8

from internvl3_jax.model.ops import cudnn_attention
from internvl3_jax.model.ops.context_parallel import gather_keys, over_mesh
from internvl3_jax.model.ops.cudnn_attention import padding_works
from internvl3_jax.model.ops.flash_attention import flash_attention
from internvl3_jax.model.ops.masks import MASKED, Mask, cache_mask, causal_mask
from internvl3_jax.model.ops.remat import checkpoint_name
from internvl3_jax.model.ops.xla_attention import xla_attention, xla_attention_per_head
from internvl3_jax.parallel.collectives import platform

__all__ = ["IMPLEMENTATIONS", "MASKED", "Mask", "attention", "cache_mask", "causal_mask"]
__all__ += ["choose", "int8_attention", "padding_works"]

IMPLEMENTATIONS = ("auto", "xla", "xla_per_head", "flash", "ring", "splash", "cudnn")

# On a CPU: scores per head (T * S) from which one head after another is faster than all at once.
_PER_HEAD_FROM = 128 * 1024
# On a CPU: scores per head from which blocks are faster, and take less memory.
_FLASH_FROM = 2048 * 2048
# On an accelerator: bytes of float32 scores that a device may hold at once.
_MAX_SCORE_BYTES = 256 * 2**20
# Bytes of the dense mask that cuDNN may be given. Without remat every layer keeps one.
_MAX_MASK_BYTES = 64 * 2**20
# Queries from which a fused kernel is called.
_KERNEL_FROM = 256


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Mask | None = None,
    implementation: str = "auto",
    num_keys: int | None = None,
) -> Float[Array, "B T N H"]:
    """Computes softmax(q k^T / sqrt(H)) v with a float32 softmax, sharded over the mesh in context.

    Args:
      q: Queries. k and v have the same dtype.
      k: Keys; each of the K heads serves N / K query heads.
      v: Values.
      mask: From `causal_mask` (tokens of rows among themselves) or `cache_mask` (against a cache).
          None: every query sees every key, as in the vision tower.
      num_keys: Without a mask, the number of keys that are seen; None: all.
      implementation: One of IMPLEMENTATIONS. "auto" decides by the devices of the mesh, or the
          default devices where no mesh is in context, and by the sizes.

    Returns:
      Outputs in q's dtype, named "attention_output" for ops/remat.py, but for cuDNN's. A query that
      sees no key gets finite numbers.

    Raises:
      ValueError: The implementation is unknown, or does not support the devices, sizes or mask.
    """
    if implementation not in IMPLEMENTATIONS:
        known = ", ".join(IMPLEMENTATIONS)
        raise ValueError(f"attention implementation {implementation!r} is not one of {known}")
    num_keys = k.shape[1] if num_keys is None else num_keys
    local = functools.partial(_local, implementation=implementation, num_keys=num_keys)
    return over_mesh(local, q, k, v, mask)


def int8_attention(
    q: Float[Array, "B T N H"],
    k: Int8[Array, "B S K H"],
    v: Int8[Array, "B S K H"],
    scales: tuple[Float32[Array, "B K S"], Float32[Array, "B K S"]],
    mask: Mask,
) -> Float[Array, "B T N H"]:
    """Computes attention against an int8 cache, for few queries: all scores are in memory.

    On a mesh the compiler shards it as its arguments are.

    Args:
      k: Keys as stored; `scales` has the scale of each vector of keys, and of values.
    """
    return xla_attention(q, k, v, mask, scales)


def _local(q, k, v, mask: Mask | None, axis: str | None, implementation: str, num_keys: int):
    """Computes the shard of one device. `axis`: the mesh axis that keys are sharded over."""
    devices = platform()
    if implementation == "auto":
        implementation = choose(devices, q, k, mask, axis)

    # Pallas emulates splash on a CPU, which the tests use.
    supported = {"splash": ("tpu", "cpu"), "cudnn": ("gpu",)}.get(implementation, (devices,))
    if devices not in supported:
        raise ValueError(
            f"attention implementation {implementation!r} runs on {supported[0]}; these devices "
            f"are {devices}; use 'auto'"
        )

    if implementation == "cudnn":
        return cudnn_attention.cudnn(q, k, v, mask, axis, num_keys)
    if mask is None:
        k, v = k[:, :num_keys], v[:, :num_keys]
    if implementation in ("flash", "ring"):
        return flash_attention(q, k, v, mask, axis, ring=implementation == "ring")
    if implementation == "splash":
        # Importing Pallas takes a quarter of a second.
        from internvl3_jax.model.ops.splash_attention import splash

        return splash(q, k, v, mask, axis, interpret=devices == "cpu")
    if mask is not None:
        k, v, mask = gather_keys(k, v, mask, axis)
    backend = xla_attention if implementation == "xla" else xla_attention_per_head
    return checkpoint_name(backend(q, k, v, mask), "attention_output")


def choose(platform: str, q, k, mask: Mask | None, axis: str | None) -> str:
    """Returns the implementation for one device's shards of q and k (arrays or their shapes).

    Args:
      platform: "cpu", "gpu" or "tpu".
      axis: The mesh axis over which keys are sharded and will be gathered, or None.
    """
    batch, num_queries, heads, width = q.shape
    shards = 1 if axis is None else jax.lax.axis_size(axis)
    scores = num_queries * k.shape[1] * shards

    if platform == "cpu":
        if scores < _PER_HEAD_FROM:
            return "xla"
        return "xla_per_head" if scores < _FLASH_FROM else "flash"

    # A fused kernel, where there are enough queries and it supports the mask.
    if num_queries >= _KERNEL_FROM:
        if platform == "tpu" and width % 64 == 0 and (mask is None or mask.kv_last_query is None):
            return "splash"
        if platform == "gpu" and axis is None and _cudnn_supports(q, k, mask):
            return "cudnn"
    return "xla" if 4 * batch * heads * scores <= _MAX_SCORE_BYTES else "flash"


def _cudnn_supports(q, k, mask: Mask | None) -> bool:
    """Returns whether cuDNN's kernel supports the sizes and, in little memory, the mask."""
    width, dtype = q.shape[-1], q.dtype
    if width % 8 or width > 128 or dtype not in (jnp.bfloat16, jnp.float16):
        return False
    if cudnn_attention.is_packed(mask):
        return cudnn_attention.packed_works(width, dtype)
    return cudnn_attention.dense_mask_bytes(q, k, mask) <= _MAX_MASK_BYTES
