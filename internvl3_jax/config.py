"""Shapes and settings of the model family: plain typed dataclasses.

Nothing here touches jax. `hf_config.py` reads and writes the two released `config.json` layouts.

The dataclasses are mutable so that `--config.model.vision.num_layers=2` can override a field, and
hashable so that Flax modules can carry them; treat them as values once a module has been built.
"""

import dataclasses

from internvl3_jax.io import limits
from internvl3_jax.io.typed import ConfigError, from_dict, to_dict

__all__ = [
    "UNITS",
    "ConfigError",
    "DataConfig",
    "LanguageConfig",
    "LoraConfig",
    "LossConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ProcessorConfig",
    "TrainConfig",
    "VisionConfig",
    "from_dict",
    "to_dict",
    "validate",
]

UNITS = 256  # positions are integers in units of 1 / UNITS; see positions.py


@dataclasses.dataclass(unsafe_hash=True)
class VisionConfig:
    """InternViT. The defaults are InternViT-300M-448px-V2_5."""

    image_size: int = 448  # pixels along a tile's side
    patch_size: int = 14
    hidden_size: int = 1024
    num_layers: int = 24
    num_heads: int = 16
    intermediate_size: int = 4096
    norm: str = "layer_norm"  # or "rms_norm" (6B)
    norm_eps: float = 1e-6
    qkv_bias: bool = True
    qk_norm: bool = False  # RMSNorm over all channels of q and of k, before the head split (6B)
    layer_scale_init: float = 0.1
    drop_path: float = 0.0  # highest rate; grows linearly from 0 in block 0
    # of RGB in [0, 1]; tiles are normalised on the device
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    @property
    def grid(self) -> int:
        """Patches along a tile's side."""
        return self.image_size // self.patch_size

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


@dataclasses.dataclass(unsafe_hash=True)
class LanguageConfig:
    """Decoder. One class for Qwen2.5, InternLM2 and InternLM3, which differ by numbers and bias
    flags.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    norm_eps: float = 1e-6
    rope_theta: float = 1e6
    # or "dynamic": NTK by current length, as transformers >= 5; always off when V2PE is in use
    rope_scaling: str = "none"
    rope_factor: float = 1.0
    max_position: int = 32768  # positions beyond it are where "dynamic" starts to act
    qkv_bias: bool = True
    o_bias: bool = False
    mlp_bias: bool = False
    tie_embeddings: bool = False
    # or "internlm2", "internlm3": the architecture and the tensors' names in an exported model
    family: str = "qwen2"
    # rows are padded to this multiple inside the model and cut again on export
    vocab_multiple: int = 256

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple


@dataclasses.dataclass(unsafe_hash=True)
class ModelConfig:
    """Everything the parameters and the forward pass depend on."""

    vision: VisionConfig
    language: LanguageConfig
    image_token_id: int  # id of <IMG_CONTEXT>; from the checkpoint's tokenizer
    downsample: int = 2  # pixel shuffle folds downsample x downsample patches into one token
    ps_version: str = "v2"  # "v1" keeps the two spatial axes swapped (legacy models)
    projector_norm_eps: float = 1e-5

    @property
    def tokens_per_tile(self) -> int:
        return (self.vision.grid // self.downsample) ** 2

    def __post_init__(self):
        validate(self)


@dataclasses.dataclass(unsafe_hash=True)
class ProcessorConfig:
    """How pictures and messages become tiles and ids. Part of a checkpoint's fingerprint: training
    and serving must agree on it.
    """

    image_size: int = 448
    tokens_per_tile: int = 256
    min_tiles: int = 1
    # thumbnails not counted; `tiles` says whether of each image or of all images of a prompt
    max_tiles: int = 12
    # the released models' rule at inference; or "shared", that of their training (data.tiles)
    tiles: str = "per image"
    # of all images of a prompt, thumbnails not counted: each image gets an equal part; 0: no limit
    max_total_tiles: int = 0
    use_thumbnail: bool = True
    apply_exif: bool = False  # the reference ignores EXIF orientation
    template: str = "internvl2_5"
    # "default": the template's own text; None: no system block; else the text itself
    system_message: str | None = "default"
    stop_tokens: tuple[str, ...] = ("<|im_end|>",)
    frame_label: str = "Frame-{}: "  # before each frame of a video; {} is its number from 1
    # V2PE step of a visual token in units of 1/256; 256 is delta = 1, ordinary positions
    delta: int = UNITS

    def __post_init__(self):
        check_tile_rule(self.tiles, "processor.tiles")
        if not self.stop_tokens or not all(self.stop_tokens):
            raise ValueError(
                f"processor.stop_tokens is {self.stop_tokens!r}; name the tokens that end an "
                'answer, such as "<|im_end|>"'
            )
        if self.max_total_tiles < 0:
            raise ValueError(
                f"processor.max_total_tiles is {self.max_total_tiles}; it must be at least 1, or 0 for no limit"
            )


TILE_RULES = ("per image", "shared")


def check_tile_rule(rule: str, name: str) -> None:
    if rule not in TILE_RULES:
        raise ValueError(
            f"{name} is {rule!r}; it must be one of {', '.join(map(repr, TILE_RULES))}"
        )


def validate(config: ModelConfig) -> None:
    """ConfigError naming the fields that are of a wrong type, out of their range, or contradict
    each other.
    """
    if found := limits.problems(config):
        raise ConfigError("; ".join(f"ModelConfig.{problem}" for problem in found))
    vision, language = config.vision, config.language
    checks = [
        (
            vision.image_size % vision.patch_size == 0,
            "vision.image_size",
            f"{vision.image_size} is no multiple of patch_size",
        ),
        (
            vision.grid % config.downsample == 0,
            "downsample",
            f"{vision.grid} patches a side do not fold by {config.downsample}",
        ),
        (
            vision.hidden_size % vision.num_heads == 0,
            "vision.num_heads",
            f"{vision.num_heads} does not divide the width",
        ),
        (
            language.num_heads % language.num_kv_heads == 0,
            "language.num_kv_heads",
            f"{language.num_kv_heads} does not divide num_heads ({language.num_heads})",
        ),
        (
            language.head_dim % 2 == 0,
            "language.head_dim",
            f"{language.head_dim} is odd; rotary embedding needs pairs",
        ),
        (
            0 <= config.image_token_id < language.vocab_size,
            "image_token_id",
            f"{config.image_token_id} lies outside the vocabulary",
        ),
    ]
    for holds, field, why in checks:
        if not holds:
            raise ConfigError(f"ModelConfig.{field}: {why}")


@dataclasses.dataclass(unsafe_hash=True)
class DataConfig:
    """What is read, and the size of a batch: `rows` rows with a budget of tokens and of tiles each."""

    # The path of a meta JSON, or MODULE:FUNCTION of Python code that makes the sources.
    source: str = ""
    # A directory with the tokenizer's files.
    tokenizer: str = ""
    # The number of rows of a source that generates them.
    samples: int = 1_000_000
    # of a meta JSON's sources in the mixture: "length", "sqrt", or "given" (key "weight" of each)
    weights: str = "length"
    # of the samples that have no picture; 0.25 is native pre-training's 1:3. Negative: as it comes
    language_share: float = -1.0
    on_error: str = "stop"  # at a sample that cannot be used; "skip" counts it and goes on
    drop_list: str = ""  # file of samples to leave out, written by the doctor
    pairs: bool = False  # rows are a question with a chosen and a rejected answer (loss.kind "mpo")
    pairs_per_row: int = 16  # at most
    # file of the pairs' log-probabilities under the reference model (make_reference); it is
    # then not loaded
    reference: str = ""
    # the decoder computes a pair's question once; not with the TPU's and NVIDIA's attention
    # kernels
    share_question: bool = False
    # a sample longer than a row; or "truncate" (after the last whole turn that fits), "drop"
    overlong: str = "error"
    # in place of processor.tiles while training, as InternVL's scripts do; or "per image"
    tiles: str = "shared"
    # of an image or frame; larger ones are refused. 0: no limit. The default is Pillow's
    max_image_pixels: int = 89_478_485
    # whether images whose end is missing are used, as the official trainer does; the missing
    # part is gray
    allow_truncated: bool = False
    min_frames: int = 8  # of a video; drawn for each sample
    max_frames: int = 32
    # a sample's x trained tokens weigh 1 / sqrt(x) each; or "sample" (1 / x), "token" (1)
    loss_average: str = "square"
    rows: int = 8  # of the global batch
    tokens_per_row: int = 16_384
    tiles_per_row: int = 48
    packing: str = "balanced"  # or "first_fit"; see data/packing.py
    packing_buffer: int = 64  # samples that wait for a row that they fit in, for each shard
    # streams that rows are packed from: any number of processes that divides it sees the same
    # global batches
    shards: int = 1
    workers: int = 0  # processes that prepare samples, for each shard; 0: threads of this one
    # V2PE: each picture draws one; the paper's set is 1, 1/2, 1/4 ... 1/256
    deltas: tuple[str, ...] = ("1",)
    seed: int = 0


@dataclasses.dataclass(unsafe_hash=True)
class OptimizerConfig:
    """Defaults follow InternVL's scripts: AdamW, cosine, decay on every parameter, clipping at 1."""

    # "muon": Muon on the layers' matrices, AdamW on the rest; "adafactor": factored second moment
    name: str = "adamw"
    learning_rate: float = 4e-5
    muon_learning_rate: float = 0.02
    # or "wsd": warm-up, stable, linear decay over the last `decay_fraction` of the steps
    schedule: str = "cosine"
    warmup_steps: int = 100
    warmup_fraction: float = 0.0  # of all steps, in place of warmup_steps; 0: warmup_steps counts
    decay_fraction: float = 0.2
    final_fraction: float = 0.0  # of the peak, at the last step
    weight_decay: float = 0.05
    decay_norms_and_biases: bool = True  # the reference decays every parameter
    beta1: float = 0.9
    beta2: float = 0.999
    clip_norm: float = 1.0
    moment_dtype: str = "float32"  # of AdamW's first moment; "bfloat16" saves 2 bytes a parameter
    # regular expressions; parameters whose path one matches are not trained: "vision/.*"
    freeze: tuple[str, ...] = ()
    vision_rate: float = 1.0  # learning rate of each component, relative to the rest
    projector_rate: float = 1.0
    language_rate: float = 1.0
    # each layer of the tower learns this much slower than the one above it
    vision_layer_decay: float = 1.0


@dataclasses.dataclass(unsafe_hash=True)
class LossConfig:
    """What is minimised. "mpo", Mixed Preference Optimization (Wang et al. 2024), takes pairs
    (data.pairs): weighted preference, quality and generation losses, of which each may be alone.
    Defaults are InternVL3's scripts'; preference.py has the losses.
    """

    kind: str = "sft"  # next-token cross-entropy; or "mpo"
    preference: str = "sigmoid"  # DPO; or "ipo"
    preference_weight: float = 0.8
    quality_weight: float = 0.2  # BCO
    # cross-entropy of chosen answers, averaged as data.loss_average says
    generation_weight: float = 1.0
    beta: float = 0.1
    label_smoothing: float = 0.0  # of DPO
    # BCO's: mean of all rewards so far (the code); "moving": of earlier ones, exponential (the
    # paper)
    shift: str = "running"
    shift_decay: float = 0.99  # of "moving"
    reference: str = ""  # checkpoint that the policy is compared with; empty: init_from
    reference_dtype: str = ""  # that it is stored in; empty: the compute dtype
    # whether the policy's tower drops paths; then the two differ from the first step on
    drop_path: bool = False


@dataclasses.dataclass(unsafe_hash=True)
class LoraConfig:
    """Adapters beside linear layers that stay as they are (lora.py). Rank 0: none; all else is then
    without effect.
    """

    rank: int = 0
    alpha: float = 32.0  # the adapter's output is multiplied by alpha / rank
    rslora: bool = False  # by alpha / sqrt(rank) instead
    dropout: float = 0.0  # of the adapters' inputs
    # regular expressions; layers whose path one matches
    targets: tuple[str, ...] = ("language/layers/(q|k|v|o|gate|up|down)",)
    # parameters that are trained whole beside them, likewise: "projector/.*"
    full: tuple[str, ...] = ()
    # what the layers' frozen matrices are kept in: "none" (param_dtype), "int8" or "nf4"
    quantize: str = "none"
    init_from: str = ""  # LoRA run or PEFT directory whose adapter is trained on


@dataclasses.dataclass(unsafe_hash=True)
class MeshConfig:
    """Devices along each axis of the mesh (sharding.py); one may be -1, which takes what the others
    leave.
    """

    slice: int = 1  # TPU slices; rows
    data: int = 1  # rows
    fsdp: int = -1  # rows, and parameters with their gradients and state
    tensor: int = 1  # the decoder's heads, MLP and vocabulary
    context: int = 1  # tokens of a row


@dataclasses.dataclass(unsafe_hash=True)
class TrainConfig:
    """One run. A file in configs/ returns it from get_config();
    `--config.optimizer.learning_rate=2e-5` overrides a field.
    """

    model: ModelConfig
    processor: ProcessorConfig
    data: DataConfig
    optimizer: OptimizerConfig
    steps: int
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    init_from: str = ""  # checkpoint, released directory or hub id to start from; empty: random
    seed: int = 0
    param_dtype: str = "float32"
    compute_dtype: str = "float32"  # bfloat16 on accelerators
    # of a batch, one after the other; gradients are those of the whole batch
    micro_batches: int = 1
    remat_vision: str = "none"  # what the backward pass recomputes in each layer; see ops/remat.py
    remat_language: str = "none"
    # its state lies in the hosts' memory, and comes to the devices for the update
    offload_optimizer: bool = False
    attention_vision: str = "auto"  # implementation; see ops/attention.py
    # "ring" for rows so long that a device cannot hold all of their keys
    attention_language: str = "auto"
    loss_chunk: int = 1024  # tokens whose logits exist at a time
    # layers per step of the scans; all of them is about twice as fast on a CPU
    scan_unroll: int = 1
    log_every: int = 20
    # steps between checks that all processes are at the same step of the same run
    agree_every: int = 100
    save_every: int = 500
    # resume although sources, tokenizer or drop list are no longer those that the run began
    # with
    accept_changed_data: bool = False
    keep: int = 2  # checkpoints kept, the newest
    keep_every: int = 0  # also those of every so many steps, for good; 0: none
    keep_best: bool = True  # also the one with the lowest held-out loss
    held_out: str = ""  # meta JSON of what is never trained on
    evaluate_every: int = 0  # steps between held-out losses; also at the last step; 0: never
    evaluate_batches: int = 8  # of a held-out loss, always the same
    # conversations whose last turn is answered along with it, into WORKDIR/answers.jsonl
    evaluate_answers: int = 0
    tensorboard: bool = False  # also writes WORKDIR/tensorboard
    wandb: str = ""  # project of Weights & Biases; empty: none
    profile_steps: tuple[int, ...] = ()  # first and last step of a profile in WORKDIR/profile
