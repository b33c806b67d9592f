"""Frozen matrices in 8 or 4 bits. qwix does the arithmetic; here they become plain arrays in the
parameter tree.

In the place of a kernel [..., in, out] stand two leaves, of which the first is named after its
kind:

    {"int8": i8[..., in, out],   "scales": f32[..., 1, out]}          one scale for each column
    {"nf4":  u8[..., in/2, out], "scales": f32[..., in/tile, out]}    one for 64 rows of a column (Dettmers et al. 2023); two rows a byte
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

KINDS = ("int8", "nf4")
_TILE = 64


def quantize(kernel, kind: str) -> dict:
    """kernel [L,in,out] -> the two leaves. Layer by layer, since what lies between is several times
    as large as a layer.
    """
    qwix = library()
    tile = {0: math.gcd(kernel.shape[-2], _TILE)} if kind == "nf4" else {}
    if kind == "nf4" and kernel.shape[-2] % 2:
        raise ValueError(f"nf4 keeps two rows in a byte; a matrix has {kernel.shape[-2]}")

    def one(layer):
        layer = qwix.quantize(
            layer.astype(jnp.float32), kind, channelwise_axes=(1,), tiled_axes=tile
        )
        return {kind: _pack(layer.qvalue) if kind == "nf4" else layer.qvalue, "scales": layer.scale}

    return jax.lax.map(one, kernel)


def dequantize(kernel, dtype):
    """What `quantize` made, with or without leading axes, or a kernel as it is -> [..., in, out] in
    `dtype`.
    """
    if not isinstance(kernel, Mapping):
        return kernel.astype(dtype)
    qwix = library()
    kind = next(name for name in KINDS if name in kernel)
    values = _unpack(kernel[kind]) if kind == "nf4" else kernel[kind]
    return qwix.dequantize(qwix.QArray(values, kernel["scales"], qtype=kind)).astype(dtype)


def _pack(codes):
    """u4[in,out] -> u8[in/2,out]. Neighbouring rows share a byte, so that rows can be split over
    devices.
    """
    low, high = codes[0::2].astype(jnp.uint8), codes[1::2].astype(jnp.uint8)
    return low | (high << 4)


def _unpack(packed):
    """The inverse, with any leading axes."""
    codes = jnp.stack([packed & 15, packed >> 4], axis=-2)
    return codes.reshape(*packed.shape[:-2], 2 * packed.shape[-2], packed.shape[-1]).astype(
        jnp.uint4
    )


def library():
    """qwix. ImportError saying how to have it."""
    try:
        import qwix  # an optional extra, which takes long to import
    except ImportError as error:
        raise ImportError("lora.quantize needs qwix: pip install -e '.[quant]'") from error
    return qwix
