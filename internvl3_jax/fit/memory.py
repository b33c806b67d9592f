"""Predicts a device's memory use during a train step, from shapes alone.

Some arrays live through the whole step: parameters, optimizer state and batch (exact, with the
padding of a TPU's tiles); gradients; the layers' kernels in the compute dtype, cast once; the
head's kernel, all-gathered; and what each layer saves for the backward pass.

On top of that comes the work of one phase: a chunk of the loss; the head's gradient while it is
summed over devices; the backward pass of a decoder layer, or of a tower layer; the update. The peak
is the largest phase, with what is alive in it.

The sizes of the work were read from the compilers' own schedules of this train step, in arrays by
name; docs/fit.md compares them.
"""

import dataclasses
import math

from internvl3_jax.fit.activations import (
    LANES,
    array_bytes,
    dispatched_bytes,
    heads_per_device,
    inner_bytes,
    itemsize,
    row_sum_bytes,
    tower_array_bytes,
    tower_attention_bytes,
)
from internvl3_jax.fit.per_device import PerDevice, stored, tiled


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device.

    Attributes:
      params: Parameters.
      opt_state: Optimizer state on the device.
      batch: The batch.
      held: What else lives through the whole step.
      saved: What layers save between the passes of a micro-batch.
      work: For each phase what is alive in it, `saved` included as far as it is still needed.
      host: Bytes in the host's memory: an offloaded optimizer state, and the residual stream under
          remat "offload".
    """

    params: int
    opt_state: int
    batch: int
    held: dict[str, int]
    saved: dict[str, int]
    work: dict[str, int]
    host: int

    @property
    def arguments(self) -> int:
        return self.params + self.opt_state + self.batch

    @property
    def phase(self) -> str:
        """Returns the phase of the peak."""
        return max(self.work, key=self.work.get)

    @property
    def peak(self) -> int:
        return self.arguments + sum(self.held.values()) + self.work[self.phase]


def estimate(device: PerDevice) -> Memory:
    """Predicts the peak of a train step and its parts."""
    # Alive from the forward pass on.
    saved = {
        "decoder": _decoder_saved(device),
        "tower": _tower_saved(device),
        "projector": _projector_saved(device),
    }
    head = _head_gradient(device)
    gradients = {name: device.gradients(f"{name}/") for name in ("vision", "language")}
    hidden = 3 * array_bytes(
        device, device.tokens // device.tensor, device.config.model.language.hidden_size
    )
    alive = sum(saved.values()) + head + hidden
    gathered = _head_gathered(device)

    # The phases. With micro-batches the head is all-gathered once, before them.
    work = {
        "loss": alive + _loss_work(device) + (gathered if device.config.micro_batches == 1 else 0),
        # Where context is large it is summed in pieces, as in the compiled programs.
        "sum of the head's gradient": alive
        + head * min(4, device.mesh["context"]) // device.mesh["context"],
        "decoder": alive + gradients["language"] + _decoder_work(device),
        "tower": alive - saved["decoder"] + sum(gradients.values()) + _tower_work(device),
        "update": sum(gradients.values()) + device.gradients("projector/"),
    }
    if not device.learns("vision/"):
        work["tower"] = _tower_work(device)

    # What is offloaded returns to the device for the update.
    offloaded = device.opt_state if device.config.offload_optimizer else 0
    work["update"] += offloaded
    host = offloaded + _streams(device, "decoder", host=True) + _streams(device, "tower", host=True)
    return Memory(
        device.params, device.opt_state - offloaded, device.batch, _held(device), saved, work, host
    )


# --- held ----------------------------------------------------------------------------------------


def _held(device: PerDevice) -> dict[str, int]:
    """Returns what lives through the whole step, besides the arguments."""
    # Without a cast the kernels are used as they are stored.
    config = device.config
    held = {"matrices in the compute dtype": 0}
    size = itemsize(device)
    if config.compute_dtype != config.param_dtype:
        held["matrices in the compute dtype"] = sum(
            stored(leaf.shape, size, device.tpu)
            for path, leaf in device.leaves.items()
            if "/layers/" in path and path.endswith("/kernel")
        )
    # The sums over micro-batches, and what all of them use.
    if config.micro_batches > 1:
        held["head, gathered"] = _head_gathered(device)
        held["gradients"] = device.gradients("")
        held["micro-batches, cut"] = _micro_batch_tiles(device)
    held["reference model"] = device.reference
    held["embedding, in other tiles"] = _embedding_copies(device)
    return held


def _micro_batch_tiles(device: PerDevice) -> int:
    """Returns the bytes of all tiles, reshaped to micro-batches."""
    config = device.config
    pixels = config.model.vision.image_size**2
    channels = 8 if device.tpu else 3
    return round(device.tiles * config.micro_batches) * pixels * channels


def _embedding_copies(device: PerDevice) -> int:
    """Returns the bytes of copies of the embedding in another layout.

    Its gradient is made row by row. Where the width is not a multiple of a TPU's lanes, the stored
    embedding has the transposed layout.
    """
    leaf = device.leaves["language/embedding"]
    if not device.tpu or leaf.shape[1] % LANES == 0 or not leaf.trained:
        return 0
    rows = tiled(leaf.shape, 1)
    # With micro-batches: their sum and the gradient of one. Without: the parameter and its moments,
    # converted early.
    return rows * (4 + 2) if device.config.micro_batches > 1 else rows * 4 * 3


# --- saved ---------------------------------------------------------------------------------------


def _decoder_saved(device: PerDevice) -> int:
    """Returns what the decoder's layers save, by remat policy."""
    language, policy = device.config.model.language, device.config.remat_language
    tokens, tensor = device.tokens, device.tensor
    heads, key_heads = heads_per_device(device)
    # The arrays of a layer. Between the products tokens are sharded over tensor, too.
    stream = array_bytes(device, tokens // tensor, language.hidden_size)
    queries, keys = (
        array_bytes(device, tokens * count, language.head_dim) for count in (heads, key_heads)
    )
    hidden, dispatched = inner_bytes(device), dispatched_bytes(device)
    sums = 4 * tokens * heads
    kept = {
        "full": 0,
        "offload": 0,
        "attention": 2 * queries + 2 * keys + sums,
        "dots": queries + 2 * keys + stream + (0 if device.tpu else queries + sums),
        # Three float32 arrays of each norm, its result and attention's; six arrays of the MLP's
        # width; every kernel as it is used.
        "none": 14 * stream
        + 2 * queries
        + 2 * keys
        + sums
        + 6 * hidden
        + _used(device, "language/layers/"),
    }
    if language.num_experts:
        kept["none"] += 2 * dispatched
    else:
        kept["dots"] += 2 * hidden
    if language.qk_norm:
        # The norms of q and k, which add to what attention takes.
        kept["none"] += queries + keys
    kept["none"] += _dropped(device, "language/layers/", tokens)
    return _streams(device, "decoder") + language.num_layers * kept[policy]


def _streams(device: PerDevice, part: str, host: bool = False) -> int:
    """Returns the bytes of residual streams that are saved, on the device or on its host.

    Under remat "offload" the device holds two: that of the current layer and of the next.
    """
    model, config = device.config.model, device.config
    if part == "tower":
        stream = (
            tower_array_bytes(device, model.vision.hidden_size) if device.learns("vision/") else 0
        )
        layers, policy = model.vision.num_layers, config.remat_vision
    else:
        stream = array_bytes(device, device.tokens // device.tensor, model.language.hidden_size)
        layers, policy = model.language.num_layers, config.remat_language
    if policy == "offload":
        return stream * (layers if host else 2)
    return 0 if host else stream * layers


def _tower_saved(device: PerDevice) -> int:
    """Returns what the tower's layers save, by remat policy."""
    if not device.learns("vision/"):
        return 0
    vision, policy = device.config.model.vision, device.config.remat_vision
    stream, hidden = (
        tower_array_bytes(device, width) for width in (vision.hidden_size, vision.intermediate_size)
    )
    heads, sums = tower_attention_bytes(device)
    sums //= LANES if device.tpu else 1  # one lane of them is saved
    kept = {
        "full": 0,
        "offload": 0,
        "attention": 3 * stream + heads + sums,
        "dots": 5 * stream + hidden + (0 if device.tpu else heads + sums),
        # As in the decoder, and the mask of drop path, a byte per value.
        "none": 17 * stream + 4 * hidden + 4 * heads + sums + _used(device, "vision/layers/"),
    }
    return _streams(device, "tower") + vision.num_layers * kept[policy]


def _projector_saved(device: PerDevice) -> int:
    """Returns what the projector saves."""
    if not device.learns("projector/") and not device.learns("vision/"):
        return 0
    config = device.config.model
    tokens = math.ceil(device.tiles) * config.tokens_per_tile
    folded = config.downsample**2 * config.vision.hidden_size
    return 2 * array_bytes(device, tokens, folded, 4) + 2 * array_bytes(
        device, tokens, config.language.hidden_size
    )


def _used(device: PerDevice, prefix: str) -> int:
    """Returns the bytes of one layer's kernels, all-gathered."""
    split = device.tensor if prefix.startswith("language") else 1
    return round(device.elements(prefix) // _layers(device, prefix) // split * device.kernel_bytes)


def _dropped(device: PerDevice, prefix: str, tokens: float) -> int:
    """Returns the bytes of the inputs of a layer's adapters after dropout, and of the masks."""
    factors = {
        path: leaf
        for path, leaf in device.leaves.items()
        if path.startswith(f"lora/{prefix}") and path.endswith("/a")
    }
    widths = sum(leaf.shape[-2] for leaf in factors.values())
    return round(tokens * widths * (itemsize(device) + 1)) if device.config.lora.dropout else 0


def _layers(device: PerDevice, prefix: str) -> int:
    model = device.config.model
    return (model.language if prefix.startswith("language") else model.vision).num_layers


# --- work ----------------------------------------------------------------------------------------


def _head_gradient(device: PerDevice) -> int:
    """Returns the bytes of the gradient of the full head kernel, float32.

    Each device sums over its own tokens; the sums are added at the end of the micro-batch.
    """
    language = device.config.model.language
    head = device.leaves.get("language/head/kernel", device.leaves["language/embedding"])
    return (
        language.hidden_size * language.padded_vocab_size // device.tensor * 4
        if head.trained
        else 0
    )


def _head_gathered(device: PerDevice) -> int:
    """Returns the bytes of the all-gathered head kernel in the compute dtype."""
    language = device.config.model.language
    return language.hidden_size * language.padded_vocab_size // device.tensor * itemsize(device)


def _loss_work(device: PerDevice) -> int:
    """Returns the bytes of a chunk of float32 logits."""
    language = device.config.model.language
    return (
        min(device.config.loss_chunk, device.tokens)
        * language.padded_vocab_size
        // device.tensor
        * 4
    )


def _decoder_work(device: PerDevice) -> int:
    """Returns the work of a decoder layer's backward pass.

    It has both halves of the MLP, their product and a gradient; attention's arrays; the stream and
    its gradients; kernels all-gathered ahead, and their gradients before they are scattered. With
    experts also the tokens that they take, their outputs, and the gradients of both; and all
    kernels of the layer at once, with their gradients.
    """
    language = device.config.model.language
    heads, key_heads = heads_per_device(device)
    mlp = 4 * inner_bytes(device) + 4 * dispatched_bytes(device)
    attention = array_bytes(
        device, device.tokens * (2 * heads + 2 * key_heads), language.head_dim
    ) + row_sum_bytes(device, device.tokens * heads)
    if language.qk_norm:  # float32
        attention += 2 * array_bytes(device, device.tokens * (heads + key_heads), language.head_dim)
    width = language.hidden_size
    stream = array_bytes(device, device.tokens, width) + 2 * array_bytes(
        device, device.tokens // device.tensor, width
    )
    inner, held = language.intermediate_size, (4 if device.trains("language/layers/") else 2)
    if language.num_experts:
        inner = language.num_experts * language.expert_size
        held = 6 if device.trains("language/layers/experts/") else 3
    matrix = language.hidden_size * inner // device.tensor
    matrices = held * matrix * itemsize(device) if device.shards > 1 else 0
    if device.config.lora.quantize != "none":
        # gate and up as they are used, and one of them while it is dequantized
        matrices += 2 * matrix * itemsize(device) + 4 * matrix
    return mlp + attention + stream + matrices


def _tower_work(device: PerDevice) -> int:
    """Returns the work of a tower layer: backward, or forward where the tower is frozen."""
    vision = device.config.model.vision
    stream, hidden = (
        tower_array_bytes(device, width) for width in (vision.hidden_size, vision.intermediate_size)
    )
    heads, sums = tower_attention_bytes(device)
    if not device.learns("vision/"):
        return 4 * heads + sums + 2 * stream
    norms = 2 * stream if vision.qk_norm else 0  # float32
    return 3 * hidden + 6 * stream + norms + 4 * heads + 2 * sums
