"""The values of tensors: which are no numbers, which a dtype cannot hold; and the error that names
tensors.
"""

from collections.abc import Iterable

import numpy as np

from internvl3_jax.checkpoints.hf.mapping import bits
from internvl3_jax.io.terminal import one_line

_SHOWN = 12  # names listed in an error before "and n more"
# bits that are all set in NaN and infinities alone
_EXPONENTS = {"float32": 0x7F800000, "bfloat16": 0x7F80, "float16": 0x7C00}
_BLOCK = 1 << 22  # values that `nonfinite` looks at together
# Parts of tensors' names that say what kind of file they come from.
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
    """A checkpoint that does not fit its configuration; the message names every tensor concerned
    (up to a dozen of a kind).
    """


def listing(kind: str, found: list[str]) -> str:
    shown = "".join(f"\n  {one_line(name)}" for name in found[:_SHOWN])
    more = f"\n  and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return f"{len(found)} tensor(s) {kind}:{shown}{more}"


def kind_of(names) -> str:
    """What files with such names are, if they are known not to be plain weights."""
    if any(name.endswith(_QUANTIZED) for name in names):
        return (
            "\nThese are quantized weights, which are not read; take the model's original weights"
        )
    if any(part in name for name in names for part in _ADAPTERS):
        return "\nThese weights hold adapters that are not merged; merge them first (tools/merge_lora.py in the InternVL repository)"
    return ""


def nonfinite(tensor: np.ndarray) -> int:
    """How many values of a float tensor are NaN or infinite. Memory: of a block of it."""
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
    """Raises ConversionError naming all tensors that hold NaN or infinities, and how many; nothing
    happens where none does.
    """
    found = [
        f"{name}: {count:,} of {tensor.size:,} values"
        for name, tensor in tensors
        if (count := nonfinite(tensor))
    ]
    if found:
        raise ConversionError(
            f"{listing('with NaN or infinite values', found)}\nThe weights are damaged or come "
            "from a training that diverged; download or "
            f"train them again. To look at them as they are, allow it (--allow_nonfinite)"
        )


def cast(tensor: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """Casts with round to nearest even; a finite value that the new dtype cannot hold is an error."""
    with np.errstate(over="ignore"):
        result = tensor.astype(dtype)
    if dtype.itemsize < 4 and nonfinite(result) > nonfinite(tensor):
        others = "bfloat16 or float32" if dtype == np.float16 else "float32"
        raise ConversionError(
            f"{one_line(name)} holds values beyond the range of {dtype.name}; choose {others}"
        )
    return result
