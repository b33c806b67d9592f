"""Checks the values of tensors: non-finite ones, and those that a dtype cannot hold."""

from collections.abc import Iterable

import numpy as np

from internvl3_jax.checkpoints.hf.mapping import bits
from internvl3_jax.io.terminal import one_line

_SHOWN = 12  # names listed in an error before "and n more"
# Bits that are all set only in NaN and infinities.
_EXPONENTS = {"float32": 0x7F800000, "bfloat16": 0x7F80, "float16": 0x7C00}
_BLOCK = 1 << 22  # values that `nonfinite` tests at once
# Parts of tensor names of quantized weights and of adapters.
_QUANTIZED = (
    "qweight",
    "qzeros",
    "weight_packed",
    "weight_scale",
    "absmax",
    "quant_state",
    "g_idx",
    "SCB",
    "weight_scale_inv",
)
_ADAPTERS = (".lora_A.", ".lora_B.", ".base_layer.")


class ConversionError(ValueError):
    """A checkpoint does not fit its configuration; up to 12 tensors of each kind are named."""


def listing(kind: str, names: list[str]) -> str:
    shown = "".join(f"\n  {one_line(name)}" for name in names[:_SHOWN])
    more = f"\n  and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{len(names)} tensor(s) {kind}:{shown}{more}"


def kind_of(names) -> str:
    """Returns a hint if the names are those of quantized weights or adapters, else ""."""
    if any(name.endswith(_QUANTIZED) for name in names):
        return (
            "\nThese are quantized weights, which are not read; take the model's original weights"
        )
    if any(part in name for name in names for part in _ADAPTERS):
        return (
            "\nThese weights hold adapters that are not merged; merge them first "
            "(tools/merge_lora.py in the InternVL repository)"
        )
    return ""


def nonfinite(tensor: np.ndarray) -> int:
    """Returns how many values of a float tensor are NaN or infinite, with little memory."""
    mask, flat, count = _EXPONENTS[tensor.dtype.name], bits(np.asarray(tensor)), 0
    flat = (
        flat.reshape(-1, order="A")
        if flat.flags.c_contiguous or flat.flags.f_contiguous
        else flat.ravel()
    )
    mask = flat.dtype.type(mask)
    for start in range(0, flat.size, _BLOCK):
        masked = flat[start : start + _BLOCK] & mask
        if masked.size and masked.max() == mask:
            count += int(np.count_nonzero(masked == mask))
    return count


def refuse_nonfinite(tensors: Iterable[tuple[str, np.ndarray]]) -> None:
    """Raises ConversionError naming the tensors that hold NaN or infinities, with their counts."""
    problems = [
        f"{name}: {count:,} of {tensor.size:,} values"
        for name, tensor in tensors
        if (count := nonfinite(tensor))
    ]
    if problems:
        raise ConversionError(
            f"{listing('with NaN or infinite values', problems)}\nThe weights are damaged or come "
            "from a training that diverged; download or "
            f"train them again. To look at them as they are, allow it (--allow_nonfinite)"
        )


def cast(tensor: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """Casts with round to nearest even; raises if a finite value exceeds the new dtype's range."""
    with np.errstate(over="ignore"):
        result = tensor.astype(dtype)
    if dtype.itemsize < 4 and nonfinite(result) > nonfinite(tensor):
        others = "bfloat16 or float32" if dtype == np.float16 else "float32"
        raise ConversionError(
            f"{one_line(name)} holds values beyond the range of {dtype.name}; choose {others}"
        )
    return result
