"""Where a device's memory goes during a train step, from shapes alone.

What a step holds to its end: parameters, the optimizer's state and the batch (exact, with a TPU's
tiles); gradients; the layers' matrices in the compute dtype, cast once and not in every layer; the
head's matrix, gathered; what each layer keeps for the backward pass. On top of that comes the work
of one moment, of which there are five kinds: a chunk of the loss; the head's gradient, when it is
added over the devices; a layer of the decoder going back; a layer of the tower going back; the
update. The peak is the largest with what is alive then.

The sizes of the work are those that the compilers' own schedules of this train step have
(docs/fit.md compares), in arrays by name.
"""

import dataclasses
import math

from internvl3_jax.fit.share import PerDevice, stored, tiled

_LANES = 128  # a TPU's arrays have rows of multiples of it


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device. Beside them `host` bytes of it lie with its host: the optimizer's state,
    if it is offloaded, and the residual stream under remat "offload".
    """

    params: int
    opt_state: int
    batch: int
    held: dict[str, int]  # through the whole step, besides these
    saved: dict[str, int]  # between the passes of a micro-batch
    # of each phase, with what is alive in it alone; without `saved` of what is finished
    work: dict[str, int]
    host: int

    @property
    def arguments(self) -> int:
        return self.params + self.opt_state + self.batch

    @property
    def phase(self) -> str:
        """Of the peak."""
        return max(self.work, key=self.work.get)

    @property
    def peak(self) -> int:
        return self.arguments + sum(self.held.values()) + self.work[self.phase]


def estimate(share: PerDevice) -> Memory:
    """The peak of a train step and what it consists of."""
    saved = {
        "decoder": _decoder_saved(share),
        "tower": _tower_saved(share),
        "projector": _projector_saved(share),
    }
    head = _head_gradient(share)
    stacks = {name: share.gradients(f"{name}/") for name in ("vision", "language")}
    hidden = 3 * _array(
        share, share.tokens // share.tensor, share.config.model.language.hidden_size
    )
    alive = sum(saved.values()) + head + hidden
    gathered = _head_gathered(share)
    # With micro-batches it is gathered once, before them.
    work = {
        "loss": alive + _loss_work(share) + (gathered if share.config.micro_batches == 1 else 0),
        # In pieces where context is large, as the compiled programs show.
        "sum of the head's gradient": alive
        + head * min(4, share.mesh["context"]) // share.mesh["context"],
        "decoder": alive + stacks["language"] + _decoder_work(share),
        "tower": alive - saved["decoder"] + sum(stacks.values()) + _tower_work(share),
        "update": sum(stacks.values()) + share.gradients("projector/"),
    }
    if not share.learns("vision/"):
        work["tower"] = _tower_work(share)
    offloaded = share.opt_state if share.config.offload_optimizer else 0
    work["update"] += offloaded
    host = offloaded + _streams(share, "decoder", host=True) + _streams(share, "tower", host=True)
    return Memory(
        share.params, share.opt_state - offloaded, share.batch, _held(share), saved, work, host
    )


# --- held ----------------------------------------------------------------------------------------


def _held(share: PerDevice) -> dict[str, int]:
    config = share.config
    held = {"matrices in the compute dtype": 0}
    size = _size(share)
    if config.compute_dtype != config.param_dtype:
        held["matrices in the compute dtype"] = sum(
            stored(leaf.shape, size, share.tpu)
            for path, leaf in share.leaves.items()
            if "/layers/" in path and path.endswith("/kernel")
        )
    if config.micro_batches > 1:
        held["head, gathered"] = _head_gathered(share)
        held["gradients"] = share.gradients("")
        held["micro-batches, cut"] = _cut_tiles(share)
    held["reference model"] = share.reference
    held["embedding, in other tiles"] = _embedding_copies(share)
    return held


def _cut_tiles(share: PerDevice) -> int:
    config = share.config
    pixels = config.model.vision.image_size**2
    channels = 8 if share.tpu else 3
    return round(share.tiles * config.micro_batches) * pixels * channels


def _embedding_copies(share: PerDevice) -> int:
    """Its gradient is made in rows; where these are no multiple of a TPU's lanes, what is stored
    lies the other way.
    """
    leaf = share.leaves["language/embedding"]
    if not share.tpu or leaf.shape[1] % _LANES == 0 or not leaf.trained:
        return 0
    rows = tiled(leaf.shape, 1)
    # With micro-batches the sum and the part's gradient; without, parameter and moments are brought
    # into the same form early.
    return rows * (4 + 2) if share.config.micro_batches > 1 else rows * 4 * 3


# --- saved ---------------------------------------------------------------------------------------


def _decoder_saved(share: PerDevice) -> int:
    language, policy = share.config.model.language, share.config.remat_language
    tokens, tensor = share.tokens, share.tensor
    heads, key_heads = _heads(share)
    # Between the products the tokens are split over tensor, too.
    stream = _array(share, tokens // tensor, language.hidden_size)
    queries, keys = (
        _array(share, tokens * count, language.head_dim) for count in (heads, key_heads)
    )
    hidden = _array(share, tokens, language.intermediate_size // tensor)
    sums = 4 * tokens * heads
    kept = {
        "full": 0,
        "offload": 0,
        "attention": 2 * queries + 2 * keys + sums,
        "dots": queries + 2 * keys + stream + 2 * hidden,
        # Three float32 arrays of each norm, its result and attention's; six steps of the MLP's
        # middle; every matrix as it is used.
        "none": 14 * stream
        + 2 * queries
        + 2 * keys
        + sums
        + 6 * hidden
        + _used(share, "language/layers/"),
    }
    kept["none"] += _dropped(share, "language/layers/", tokens)
    return _streams(share, "decoder") + language.num_layers * kept[policy]


def _streams(share: PerDevice, part: str, host: bool = False) -> int:
    """The residual streams that are kept, on the device or with its host: of every layer, or of the
    one that is computed and the next.
    """
    model, config = share.config.model, share.config
    if part == "tower":
        stream = _tower_array(share, model.vision.hidden_size) if share.learns("vision/") else 0
        layers, policy = model.vision.num_layers, config.remat_vision
    else:
        stream = _array(share, share.tokens // share.tensor, model.language.hidden_size)
        layers, policy = model.language.num_layers, config.remat_language
    if policy == "offload":
        return stream * (layers if host else 2)
    return 0 if host else stream * layers


def _tower_saved(share: PerDevice) -> int:
    if not share.learns("vision/"):
        return 0
    vision, policy = share.config.model.vision, share.config.remat_vision
    stream, hidden = (
        _tower_array(share, width) for width in (vision.hidden_size, vision.intermediate_size)
    )
    heads, sums = _tower_heads(share)
    sums //= _LANES if share.tpu else 1  # what is kept of them
    kept = {
        "full": 0,
        "offload": 0,
        "attention": 3 * stream + heads + sums,
        "dots": 5 * stream + hidden,
        # As in the decoder; and which tiles drop path keeps, a byte for each value.
        "none": 17 * stream + 4 * hidden + 4 * heads + sums + _used(share, "vision/layers/"),
    }
    return _streams(share, "tower") + vision.num_layers * kept[policy]


def _projector_saved(share: PerDevice) -> int:
    if not share.learns("projector/") and not share.learns("vision/"):
        return 0
    config = share.config.model
    tokens = math.ceil(share.tiles) * config.tokens_per_tile
    folded = config.downsample**2 * config.vision.hidden_size
    return 2 * _array(share, tokens, folded, 4) + 2 * _array(
        share, tokens, config.language.hidden_size
    )


def _used(share: PerDevice, start: str) -> int:
    """One layer's matrices, gathered."""
    split = share.tensor if start.startswith("language") else 1
    return round(share.elements(start) // _layers(share, start) // split * share.kernel_bytes)


def _dropped(share: PerDevice, start: str, tokens: float) -> int:
    """One layer's adapters' inputs after dropout, and which of them were kept, a byte for each."""
    inputs = {
        path: leaf
        for path, leaf in share.leaves.items()
        if path.startswith(f"lora/{start}") and path.endswith("/a")
    }
    widths = sum(leaf.shape[-2] for leaf in inputs.values())
    return round(tokens * widths * (_size(share) + 1)) if share.config.lora.dropout else 0


def _layers(share: PerDevice, start: str) -> int:
    model = share.config.model
    return (model.language if start.startswith("language") else model.vision).num_layers


# --- work ----------------------------------------------------------------------------------------


def _head_gradient(share: PerDevice) -> int:
    """Float32, of the whole matrix: each device sums its own tokens', and they are added at the end
    of the micro-batch.
    """
    language = share.config.model.language
    head = share.leaves.get("language/head/kernel", share.leaves["language/embedding"])
    return (
        language.hidden_size * language.padded_vocab_size // share.tensor * 4 if head.trained else 0
    )


def _head_gathered(share: PerDevice) -> int:
    language = share.config.model.language
    return language.hidden_size * language.padded_vocab_size // share.tensor * _size(share)


def _loss_work(share: PerDevice) -> int:
    language = share.config.model.language
    return (
        min(share.config.loss_chunk, share.tokens) * language.padded_vocab_size // share.tensor * 4
    )


def _decoder_work(share: PerDevice) -> int:
    """Both halves of the MLP, their product and a gradient; attention's arrays, the stream and its
    gradients; the matrices of a layer, which are gathered while the one before is computed, and
    gradients of them before they are summed.
    """
    language = share.config.model.language
    heads, key_heads = _heads(share)
    mlp = 4 * _array(share, share.tokens, language.intermediate_size // share.tensor)
    attention = _array(
        share, share.tokens * (2 * heads + 2 * key_heads), language.head_dim
    ) + _row_sums(share, share.tokens * heads)
    width = language.hidden_size
    stream = _array(share, share.tokens, width) + 2 * _array(
        share, share.tokens // share.tensor, width
    )
    matrix = language.hidden_size * language.intermediate_size // share.tensor
    matrices = (
        (4 if share.trains("language/layers/") else 2) * matrix * _size(share)
        if share.shards > 1
        else 0
    )
    if share.config.lora.quantize != "none":
        # gate and up as they are used, and one of them while it is unpacked
        matrices += 2 * matrix * _size(share) + 4 * matrix
    return mlp + attention + stream + matrices


def _tower_work(share: PerDevice) -> int:
    vision = share.config.model.vision
    stream, hidden = (
        _tower_array(share, width) for width in (vision.hidden_size, vision.intermediate_size)
    )
    heads, sums = _tower_heads(share)
    if not share.learns("vision/"):
        return 4 * heads + sums + 2 * stream
    norms = 2 * stream if vision.qk_norm else 0  # float32
    return 3 * hidden + 6 * stream + norms + 4 * heads + 2 * sums


# --- arrays --------------------------------------------------------------------------------------


def _size(share: PerDevice) -> int:
    return 2 if share.config.compute_dtype == "bfloat16" else 4


def _array(share: PerDevice, rows: int, width: int, size: int | None = None) -> int:
    """[rows, width] in the compute dtype."""
    size = _size(share) if size is None else size
    return tiled((rows, width), size) if share.tpu else rows * width * size


def _heads(share: PerDevice) -> tuple[int, int]:
    """Of the decoder on one device: query heads and key heads, those that are filled up or repeated
    included.
    """
    language, tensor = share.config.model.language, share.tensor
    repeats = tensor // math.gcd(language.num_kv_heads, tensor)
    group = language.num_heads // language.num_kv_heads
    group += -group % repeats
    return language.num_kv_heads * group // tensor, language.num_kv_heads * repeats // tensor


def _row_sums(share: PerDevice, rows: int) -> int:
    """Attention's float32 sum of each row, which the TPU kernel writes once for every lane."""
    return rows * 4 * (_LANES if share.tpu else 1)


def _tower_array(share: PerDevice, width: int) -> int:
    vision = share.config.model.vision
    length = 1 + vision.grid**2
    shape = (math.ceil(share.tiles), length, width)
    return tiled(shape, _size(share)) if share.tpu else math.prod(shape) * _size(share)


def _tower_heads(share: PerDevice) -> tuple[int, int]:
    """Bytes of one array of all heads as attention takes it, and of the rows' sums. The TPU kernel
    takes whole blocks.
    """
    vision = share.config.model.vision
    length, width = 1 + vision.grid**2, vision.head_dim
    if share.tpu and length >= 256:
        length, width = -(-length // 384) * 384, -(-width // _LANES) * _LANES
    rows = math.ceil(share.tiles) * vision.num_heads * length
    return rows * width * _size(share), _row_sums(share, rows)
