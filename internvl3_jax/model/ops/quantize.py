"""Quantization of frozen kernels to int8 or NF4, by qwix, as plain arrays in the parameter tree.

Two leaves replace a kernel [..., in, out]; the first is named after the format:

    {"int8": i8[..., in, out],   "scales": f32[..., 1, out]}      one scale per column
    {"nf4":  u8[..., in/2, out], "scales": f32[..., in/64, out]}  one scale per 64 rows of a column

NF4 (Dettmers et al. 2023, QLoRA) packs two rows into a byte.
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

KINDS = ("int8", "nf4")
_TILE = 64  # rows of a column that share a scale in NF4


def quantize(kernel: Float[Array, "L d_in d_out"], kind: str) -> dict[str, Array]:
    """Quantizes stacked kernels, layer by layer: the intermediates are several times a layer.

    Args:
      kind: "int8" or "nf4".

    Returns:
      The two leaves of the module docstring.

    Raises:
      ValueError: NF4 of an odd number of rows.
      ImportError: qwix is not installed.
    """
    qwix = library()
    rows = kernel.shape[-2]
    tiles = {0: math.gcd(rows, _TILE)} if kind == "nf4" else {}
    if kind == "nf4" and rows % 2:
        raise ValueError(
            f"a kernel of {rows} rows: nf4 packs two rows into a byte, so the number must be even; "
            "use int8"
        )

    def quantize_layer(layer):
        layer = qwix.quantize(
            layer.astype(jnp.float32), kind, channelwise_axes=(1,), tiled_axes=tiles
        )
        return {kind: _pack(layer.qvalue) if kind == "nf4" else layer.qvalue, "scales": layer.scale}

    return jax.lax.map(quantize_layer, kernel)


def dequantize(
    kernel: Mapping[str, Array] | Float[Array, "*L d_in d_out"], dtype: DTypeLike
) -> Float[Array, "*L d_in d_out"]:
    """Returns the kernel [..., in, out] in `dtype`, from its quantized leaves or a plain array."""
    if not isinstance(kernel, Mapping):
        return kernel.astype(dtype)
    qwix = library()
    kind = next(name for name in KINDS if name in kernel)
    values = _unpack(kernel[kind]) if kind == "nf4" else kernel[kind]
    return qwix.dequantize(qwix.QArray(values, kernel["scales"], qtype=kind)).astype(dtype)


def _pack(codes: Shaped[Array, "d_in d_out"]) -> Shaped[Array, "d_packed d_out"]:
    """u4[in,out] -> u8[in/2,out]; adjacent rows share a byte, so that rows can be sharded."""
    low, high = codes[0::2].astype(jnp.uint8), codes[1::2].astype(jnp.uint8)
    return low | (high << 4)


def _unpack(packed: Shaped[Array, "*L d_packed d_out"]) -> Shaped[Array, "*L d_in d_out"]:
    """u8[...,in/2,out] -> u4[...,in,out], the inverse of `_pack`."""
    codes = jnp.stack([packed & 15, packed >> 4], axis=-2)
    shape = *packed.shape[:-2], 2 * packed.shape[-2], packed.shape[-1]
    return codes.reshape(shape).astype(jnp.uint4)


def library():
    """Returns the module qwix. Raises ImportError with the command that installs it."""
    try:
        import qwix  # an optional extra, slow to import
    except ImportError as error:
        raise ImportError("lora.quantize needs qwix: pip install -e '.[quant]'") from error
    return qwix
