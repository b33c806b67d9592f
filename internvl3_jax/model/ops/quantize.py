"""Quantization of kernels to int8, fp8 or NF4, as plain arrays in the parameter tree.

Two leaves replace a kernel [..., in, out]; the first is named after the format:

    {"int8": i8[..., in, out],   "scales": f32[..., 1, out]}      one scale per column
    {"fp8":  f8[..., in, out],   "scales": f32[..., 1, out]}      the same, in float8_e4m3fn
    {"nf4":  u8[..., in/2, out], "scales": f32[..., in/64, out]}  one scale per 64 rows of a column

A scale per column multiplies the product, not the kernel: x @ (q * s) = (x @ q) * s. NF4 (Dettmers
et al. 2023, QLoRA) packs two rows into a byte; qwix computes its codes.
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

FORMATS = ("int8", "fp8", "nf4")
KINDS = ("int8", "nf4")  # those of the frozen base of a LoRA run
# Formats with one scale per column: dtype, and the number that stands for a column's largest value.
PER_COLUMN = {"int8": (jnp.int8, 127.0), "fp8": (jnp.float8_e4m3fn, 448.0)}
_TILE = 64  # rows of a column that share a scale in NF4


def quantize(kernel: Float[Array, "*L d_in d_out"], kind: str) -> dict[str, Array]:
    """Quantizes a kernel, stacked ones matrix by matrix: the intermediates are several times that.

    Args:
      kind: One of FORMATS.

    Returns:
      The two leaves of the module docstring. A column of zeros has the scale 1.

    Raises:
      ValueError: NF4 of an odd number of rows.
      ImportError: NF4, and qwix is not installed.
    """
    quantize_layer = _quantize_nf4 if kind == "nf4" else _quantize_columns
    if kernel.ndim == 2:
        return quantize_layer(kernel, kind)
    return jax.lax.map(lambda layer: quantize(layer, kind), kernel)


def _quantize_columns(kernel: Float[Array, "d_in d_out"], kind: str) -> dict[str, Array]:
    """Divides each column by its largest absolute value and rounds to nearest even."""
    dtype, largest = PER_COLUMN[kind]
    kernel = kernel.astype(jnp.float32)
    scales = jnp.abs(kernel).max(axis=0, keepdims=True) / largest
    scales = jnp.where(scales > 0, scales, 1.0)
    values = jnp.clip(kernel / scales, -largest, largest)
    values = jnp.round(values) if kind == "int8" else values
    return {kind: values.astype(dtype), "scales": scales}


def _quantize_nf4(kernel: Float[Array, "d_in d_out"], kind: str) -> dict[str, Array]:
    qwix, rows = library(), kernel.shape[0]
    if rows % 2:
        raise ValueError(
            f"a kernel of {rows} rows: nf4 packs two rows into a byte, so the number must be even; "
            "use int8"
        )
    packed = qwix.quantize(
        kernel.astype(jnp.float32),
        kind,
        channelwise_axes=(1,),
        tiled_axes={0: math.gcd(rows, _TILE)},
    )
    return {kind: _pack(packed.qvalue), "scales": packed.scale}


def dequantize(
    kernel: Mapping[str, Array] | Float[Array, "*L d_in d_out"], dtype: DTypeLike
) -> Float[Array, "*L d_in d_out"]:
    """Returns the kernel [..., in, out] in `dtype`, from its quantized leaves or a plain array."""
    if not isinstance(kernel, Mapping):
        return kernel.astype(dtype)
    kind = format_of(kernel)
    if kind in PER_COLUMN:
        return (kernel[kind].astype(jnp.float32) * kernel["scales"]).astype(dtype)
    qwix = library()
    values = _unpack(kernel[kind])
    return qwix.dequantize(qwix.QArray(values, kernel["scales"], qtype=kind)).astype(dtype)


def format_of(kernel: Mapping[str, Array]) -> str:
    """Returns which of FORMATS a quantized kernel has."""
    return next(name for name in FORMATS if name in kernel)


def is_quantized(node) -> bool:
    """Returns whether a node of a parameter tree is a quantized kernel."""
    return isinstance(node, Mapping) and "scales" in node


def split_scales(
    kernel: Mapping[str, Array] | Float[Array, "d_in d_out"],
) -> tuple[Shaped[Array, "d_in d_out"], Float[Array, "1 d_out"] | None]:
    """Returns the values and the scales of a kernel of PER_COLUMN, or a plain kernel and None."""
    if not is_quantized(kernel):
        return kernel, None
    return kernel[format_of(kernel)], kernel["scales"]


def scale_columns(
    product: Float[Array, "*rows d_out"], scales: Float[Array, "1 d_out"]
) -> Float[Array, "*rows d_out"]:
    """Multiplies x @ q by the scales of the columns of q."""
    return product * scales.reshape((1,) * (product.ndim - 1) + (-1,))


def _pack(codes: Shaped[Array, "d_in d_out"]) -> Shaped[Array, "d_packed d_out"]:
    """Packs u4[in,out] -> u8[in/2,out]; adjacent rows share a byte, so that rows can be sharded."""
    low, high = codes[0::2].astype(jnp.uint8), codes[1::2].astype(jnp.uint8)
    return low | (high << 4)


def _unpack(packed: Shaped[Array, "*L d_packed d_out"]) -> Shaped[Array, "*L d_in d_out"]:
    """Unpacks u8[...,in/2,out] -> u4[...,in,out], the inverse of `_pack`."""
    codes = jnp.stack([packed & 15, packed >> 4], axis=-2)
    shape = *packed.shape[:-2], 2 * packed.shape[-2], packed.shape[-1]
    return codes.reshape(shape).astype(jnp.uint4)


def library():
    """Returns the module qwix. Raises ImportError with the command that installs it."""
    try:
        import qwix  # an optional extra, slow to import
    except ImportError as error:
        raise ImportError("nf4 needs qwix: pip install -e '.[quant]'") from error
    return qwix
