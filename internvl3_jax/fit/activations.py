"""Bytes of a train step's activations on one device, with a TPU's padding."""

import math

from internvl3_jax.fit.per_device import PerDevice, tiled

LANES = 128  # the rows of a TPU's arrays are padded to multiples of it


def itemsize(device: PerDevice) -> int:
    return 2 if device.config.compute_dtype == "bfloat16" else 4


def array_bytes(device: PerDevice, rows: int, width: int, size: int | None = None) -> int:
    """Returns the bytes of an array [rows, width], in the compute dtype by default."""
    size = itemsize(device) if size is None else size
    return tiled((rows, width), size) if device.tpu else rows * width * size


def inner_bytes(device: PerDevice) -> int:
    """Returns the bytes of an array of the MLP's width, of all experts of all tokens."""
    language, tensor = device.config.model.language, device.tensor
    if not language.num_experts:
        return array_bytes(device, device.tokens, language.intermediate_size // tensor)
    rows = device.tokens * language.experts_per_token
    return array_bytes(device, rows, language.expert_size // tensor)


def dispatched_bytes(device: PerDevice) -> int:
    """Returns the bytes of an array with the tokens that experts take; 0 without experts."""
    language = device.config.model.language
    rows = device.tokens * language.experts_per_token * (language.num_experts > 0)
    return array_bytes(device, rows, language.hidden_size)


def heads_per_device(device: PerDevice) -> tuple[int, int]:
    """Returns the decoder's query heads and key heads per device, padding and repeats included.

    See `ops.context_parallel.pad_heads`.
    """
    language, tensor = device.config.model.language, device.tensor
    repeats = tensor // math.gcd(language.num_kv_heads, tensor)
    group = language.num_heads // language.num_kv_heads
    group += -group % repeats
    return language.num_kv_heads * group // tensor, language.num_kv_heads * repeats // tensor


def row_sum_bytes(device: PerDevice, rows: int) -> int:
    """Returns the bytes of attention's float32 row sums; the TPU kernel writes one per lane."""
    return rows * 4 * (LANES if device.tpu else 1)


def tower_array_bytes(device: PerDevice, width: int) -> int:
    """Returns the bytes of an array [tiles, P, width] in the compute dtype."""
    vision = device.config.model.vision
    length = 1 + vision.grid**2
    shape = (math.ceil(device.tiles), length, width)
    return tiled(shape, itemsize(device)) if device.tpu else math.prod(shape) * itemsize(device)


def tower_attention_bytes(device: PerDevice) -> tuple[int, int]:
    """Returns the bytes of an attention input with all heads, and of the row sums.

    The TPU kernel pads to whole blocks.
    """
    vision = device.config.model.vision
    length, width = 1 + vision.grid**2, vision.head_dim
    if device.tpu and length >= 256:
        length, width = -(-length // 384) * 384, -(-width // LANES) * LANES
    rows = math.ceil(device.tiles) * vision.num_heads * length
    return rows * width * itemsize(device), row_sum_bytes(device, rows)
