"""Settings of a training run, as typed dataclasses; model_config.py has those of the model.

A recipe in configs/ returns a `TrainConfig`. Any field can be set on the command line by its dotted
name, such as `--config.optimizer.learning_rate=2e-5`. io/limits.py has the allowed values.
"""

import dataclasses

from internvl3_jax.io.typed import ConfigError, from_dict, to_dict
from internvl3_jax.model_config import (
    TILE_RULES,
    UNITS,
    LanguageConfig,
    ModelConfig,
    ProcessorConfig,
    VisionConfig,
    check_tile_rule,
    validate,
)

__all__ = [
    "TILE_RULES",
    "UNITS",
    "CheckpointConfig",
    "ConfigError",
    "DataConfig",
    "EvalConfig",
    "LanguageConfig",
    "LoggingConfig",
    "LoraConfig",
    "LossConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ProcessorConfig",
    "TrainConfig",
    "VisionConfig",
    "check_tile_rule",
    "from_dict",
    "to_dict",
    "validate",
]


@dataclasses.dataclass(unsafe_hash=True)
class DataConfig:
    """The training data, and the size of a batch: `rows` rows with a token and a tile budget."""

    # Path of a meta JSON, or MODULE:FUNCTION of Python code that returns the sources. Required.
    source: str = ""
    # Directory, run, checkpoint or hub id with the tokenizer's files.
    tokenizer: str = ""
    # Rows of each source that generates them (MODULE:FUNCTION).
    samples: int = 1_000_000
    # How the sources of a meta JSON are mixed: in proportion to their "length", to its square root
    # ("sqrt"), or to the key "weight" of each source ("given").
    source_weights: str = "length"
    # Fraction of the samples without images, from 0 to 1; 0.25 is the 1 : 3 of native pre-training.
    # A negative value leaves the mixture as source_weights makes it.
    text_fraction: float = -1.0
    # What happens at a sample that cannot be used: "stop" ends the run, "skip" counts and logs it.
    on_bad_sample: str = "stop"
    # File of samples to leave out, as the data doctor writes it. Empty leaves none out.
    exclude_file: str = ""
    # Whether each row of the data is a question with a chosen and a rejected answer (loss.kind
    # "mpo").
    pairs: bool = False
    # Highest number of pairs in one packed row.
    pairs_per_row: int = 16
    # File of the answers' log-probabilities under the reference model, from make_reference. With it
    # the reference model is not loaded.
    ref_logps_file: str = ""
    # Whether the decoder computes the question of a pair once for both answers. The attention
    # kernels of TPUs and NVIDIA GPUs do not support it.
    share_question: bool = False
    # What happens to a sample longer than a row: "error", "truncate" (after the last complete turn
    # that fits) or "drop".
    overlong: str = "error"
    # Replaces processor.tiles in training: "shared", as in InternVL's training code, or
    # "per image".
    tiles: str = "shared"
    # Pixels of the largest image or frame that is read; larger ones are errors. 0 sets no limit.
    # The default is Pillow's.
    max_image_pixels: int = 89_478_485
    # Whether an image file that ends early is used, with gray in place of the missing pixels, as in
    # InternVL's training code.
    allow_truncated: bool = False
    # Lowest and highest number of frames of a video; the number is sampled once for each sample.
    min_frames: int = 8
    max_frames: int = 32
    # Weight of each of the n supervised tokens of a sample: 1 / sqrt(n) ("square"), 1 / n
    # ("sample") or 1 ("token").
    loss_reduction: str = "square"
    # Rows of the global batch; must be a multiple of shards and of micro_batches.
    rows: int = 8
    # Token and tile budget of one row.
    tokens_per_row: int = 16_384
    tiles_per_row: int = 48
    # Highest number of samples in one packed row. 0 sets no limit, as in InternVL's training code.
    # With a limit NVIDIA GPUs run packed rows in cuDNN's fused attention.
    samples_per_row: int = 0
    # Samples that wait for a row with room for them, per shard.
    packing_buffer: int = 64
    # Number of data streams. Every number of processes that divides it gives the same global
    # batches.
    shards: int = 1
    # Worker processes that prepare samples, per shard. 0 prepares them in threads of this process.
    workers: int = 0
    # V2PE: position steps of visual tokens; each image samples one. The paper's set is 1, 1/2, 1/4,
    # ..., 1/256. "1" gives ordinary positions.
    deltas: tuple[str, ...] = ("1",)
    # Seed of the order, the mixture and the augmentation of the samples.
    seed: int = 0

    @property
    def max_samples(self) -> int | None:
        """Returns the highest number of samples, or pairs, in a packed row; None is no limit."""
        return self.pairs_per_row if self.pairs else self.samples_per_row or None

    @property
    def max_segments(self) -> int:
        """Returns the highest number of segments in a packed row, one per answer; 0 is no limit."""
        return 2 * self.pairs_per_row if self.pairs else self.samples_per_row


@dataclasses.dataclass(unsafe_hash=True)
class OptimizerConfig:
    """The optimizer. The defaults follow InternVL's scripts."""

    # The name is "adamw", "muon" (Muon for the layers' matrices, AdamW for the rest) or "adafactor"
    # (factored second moment).
    name: str = "adamw"
    # Peak learning rate.
    learning_rate: float = 4e-5
    # Peak learning rate of the matrices that Muon updates.
    muon_learning_rate: float = 0.02
    # Shape after the warm-up: "cosine", or "wsd" (constant, then a linear decay).
    schedule: str = "cosine"
    # Steps of linear warm-up.
    warmup_steps: int = 100
    # Warm-up as a fraction of all steps, from 0 to 1; replaces warmup_steps unless it is 0.
    warmup_fraction: float = 0.0
    # Fraction of all steps in which "wsd" decays, at the end.
    decay_fraction: float = 0.2
    # Learning rate at the last step, as a fraction of the peak.
    final_lr_fraction: float = 0.0
    # Decoupled weight decay, multiplied by the learning rate.
    weight_decay: float = 0.05
    # Whether norms and biases decay too, as in InternVL's code.
    decay_norms_and_biases: bool = True
    # Decay rates of the first and second moment.
    beta1: float = 0.9
    beta2: float = 0.999
    # Largest global norm of the gradients; larger ones are scaled down to it.
    clip_norm: float = 1.0
    # Dtype of AdamW's first moment: "float32", or "bfloat16", which saves 2 bytes per parameter.
    moment_dtype: str = "float32"
    # Regular expressions; a parameter whose path one of them matches is not trained ("vision/.*").
    freeze: tuple[str, ...] = ()
    # Factors on the learning rate of each component.
    vision_lr_scale: float = 1.0
    projector_lr_scale: float = 1.0
    language_lr_scale: float = 1.0
    flash_lr_scale: float = 1.0
    # Factor on the learning rate from each layer of the vision tower to the layer below it.
    vision_layer_decay: float = 1.0


@dataclasses.dataclass(unsafe_hash=True)
class LossConfig:
    """The loss. The defaults of "mpo" are those of InternVL3's scripts; see training/mpo.py.

    Mixed Preference Optimization (Wang et al. 2024) takes pairs (data.pairs) and adds a preference,
    a quality and a generation loss. A weight of 0 switches one of them off.
    """

    # The kind is "sft" (next-token cross-entropy), "mpo", or a stage of InternVL3.5-Flash
    # (model.flash): "vico", then "router"; see training/flash_loss.py.
    kind: str = "sft"
    # Weight of the loss that balances the experts of a decoder that has them, such as the 0.001 of
    # Qwen3's files (router_aux_loss_coef). 0 leaves it out.
    balance_weight: float = 0.0
    # Weight of the preference loss, DPO.
    preference_weight: float = 0.8
    # Weight of the quality loss, BCO.
    quality_weight: float = 0.2
    # Weight of the chosen answers' cross-entropy, which is averaged as data.loss_reduction says.
    generation_weight: float = 1.0
    # Scale of the rewards: beta times the log-probability ratio of policy and reference model.
    beta: float = 0.1
    # Probability that DPO assumes for a swapped label, from 0 to below 0.5.
    label_smoothing: float = 0.0
    # BCO's reward shift: the mean of all rewards so far ("running", as in InternVL's code), or an
    # exponential mean of those of earlier updates ("moving", as in the paper).
    reward_shift: str = "running"
    # Decay of the "moving" mean, per update.
    reward_shift_decay: float = 0.99
    # Checkpoint of the reference model. Empty means init_from.
    ref_model: str = ""
    # Dtype that the reference model is stored in. Empty means compute_dtype.
    ref_model_dtype: str = ""
    # Whether model.vision.drop_path acts on the policy. Policy and reference model then differ from
    # the first step on.
    drop_path: bool = False
    # Mean probability that a tile is compressed under "vico"; see vico.random_mix.
    compress_share: float = 0.5
    # Number of tiles of each sample that "router" judges in an update, each by a decoder pass.
    router_tiles: int = 4
    # Share of the tiles that "router" learns to compress: those whose compression costs least.
    router_share: float = 0.5
    # Number of the last tiles that this share is of.
    router_window: int = 1024


@dataclasses.dataclass(unsafe_hash=True)
class LoraConfig:
    """Low-rank adapters on a frozen base model; see model/lora.py. Rank 0 trains without them."""

    # Rank of the adapters. 0 means no adapters, and no other field has an effect.
    rank: int = 0
    # The output of an adapter is multiplied by alpha / rank.
    alpha: float = 32.0
    # Whether that factor is alpha / sqrt(rank) instead.
    rslora: bool = False
    # Dropout rate of the adapters' inputs.
    dropout: float = 0.0
    # Regular expressions; a linear layer whose path one of them matches gets an adapter.
    targets: tuple[str, ...] = ("language/layers/(q|k|v|o|gate|up|down)",)
    # Regular expressions; parameters whose path one of them matches are trained themselves
    # ("projector/.*").
    full: tuple[str, ...] = ()
    # Storage of the adapted layers' frozen kernels: "none" (param_dtype), "int8" or "nf4".
    quantize: str = "none"
    # LoRA run or PEFT directory whose adapters are trained further. Empty means new adapters.
    init_from: str = ""


@dataclasses.dataclass(unsafe_hash=True)
class MeshConfig:
    """Devices along each axis of the mesh. One may be -1, which takes the remaining devices."""

    # TPU slices; shards the rows of the batch.
    slice: int = 1
    # Shards the rows of the batch.
    data: int = 1
    # Shards the rows of the batch, and parameters, gradients and optimizer state.
    fsdp: int = -1
    # Shards the decoder's heads, MLP and vocabulary.
    tensor: int = 1
    # Shards the tokens of a row.
    context: int = 1


@dataclasses.dataclass(unsafe_hash=True)
class EvalConfig:
    """Evaluation on data that the run does not train on."""

    # Meta JSON of the evaluation data. Empty means no evaluation.
    source: str = ""
    # Steps between evaluations; the last step is evaluated too. 0 means never.
    every: int = 0
    # Batches of an evaluation; every evaluation takes the same ones.
    batches: int = 8
    # Conversations whose last turn the model answers at each evaluation, into
    # WORKDIR/answers.jsonl.
    answers: int = 0


@dataclasses.dataclass(unsafe_hash=True)
class CheckpointConfig:
    """When the run is saved, and which steps are kept."""

    # Steps between checkpoints; the last step is saved too.
    every: int = 500
    # Number of the newest checkpoints that are kept.
    keep: int = 2
    # Checkpoints at multiples of this many steps are kept for good. 0 means none.
    keep_every: int = 0
    # Whether the checkpoint with the lowest evaluation loss is kept too.
    keep_best: bool = True


@dataclasses.dataclass(unsafe_hash=True)
class LoggingConfig:
    """Reports of a run's progress besides WORKDIR/log.jsonl and the terminal."""

    # Steps between rows of the log; the last step has one too.
    every: int = 20
    # Whether the log is also written to WORKDIR/tensorboard.
    tensorboard: bool = False
    # Project of Weights & Biases that also gets the log. Empty means none.
    wandb: str = ""
    # First and last step of a profile in WORKDIR/profile. Empty means no profile.
    profile_steps: tuple[int, ...] = ()


@dataclasses.dataclass(unsafe_hash=True)
class TrainConfig:
    """One training run. A recipe in configs/ returns it from get_config()."""

    model: ModelConfig
    processor: ProcessorConfig
    data: DataConfig
    optimizer: OptimizerConfig
    # Number of optimizer updates.
    steps: int
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    logging: LoggingConfig = dataclasses.field(default_factory=LoggingConfig)
    # Run, checkpoint, released directory or hub id of the initial weights. Empty means random ones.
    init_from: str = ""
    # Seed of the initial weights and of dropout.
    seed: int = 0
    # Dtype of the parameters: "float32" or "bfloat16".
    param_dtype: str = "float32"
    # Dtype of the computation: "float32", or "bfloat16" on accelerators.
    compute_dtype: str = "float32"
    # Number of equal parts of a batch that are computed one after the other. The gradients are
    # those of the full batch.
    micro_batches: int = 1
    # What the backward pass recomputes in each layer; model/ops/remat.py has the policies.
    remat_vision: str = "none"
    remat_language: str = "none"
    # Whether the optimizer state is kept in host memory between updates.
    offload_optimizer: bool = False
    # Attention implementations; "auto" chooses by device and shape. model/ops/attention.py has the
    # others, such as "ring" for rows whose keys do not fit on one device.
    attention_vision: str = "auto"
    attention_language: str = "auto"
    # Tokens whose logits are in memory at the same time.
    loss_chunk: int = 1024
    # Layers per iteration of the scans over layers. All of them is about twice as fast on CPUs, and
    # on a single GPU saves the copies into stacks of layers; the program compiles longer.
    scan_unroll: int = 1
    # Steps between checks that all processes are at the same step of the same run.
    host_check_every: int = 100
    # Whether a run may be resumed although its sources, tokenizer or exclude_file have changed.
    accept_changed_data: bool = False
