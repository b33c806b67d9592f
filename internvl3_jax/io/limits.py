"""The values that each setting may have, in one table by class and field.

`problems` checks a configuration against the table and the type annotations. Contradictions between
settings are found by config.validate (the model) and training/checks.validate (a run).
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from internvl3_jax.io.terminal import excerpt
from internvl3_jax.io.typed import ConfigError, typed

DTYPES = ("float32", "bfloat16")


class Rule(NamedTuple):
    holds: Callable[[object], bool]
    expected: str  # as in "it must be ..."


def _from(low, high=None) -> Rule:
    """Returns a rule for numbers from low to high, both inclusive."""
    if high is None:
        return Rule(lambda value: value >= low, f"at least {low}")
    bounds = f"{low} to {high:,}" if isinstance(high, int) else f"{low:g} to {high:g}"
    return Rule(lambda value: low <= value <= high, f"from {bounds}")


def _below(low, high) -> Rule:
    return Rule(lambda value: low <= value < high, f"at least {low} and below {high}")


def one_of(*known: str) -> Rule:
    listed = " or ".join(filter(None, [", ".join(map(repr, known[:-1])), repr(known[-1])]))
    return Rule(lambda value: value in known, listed)


def _channels(low: float, high: float) -> Rule:
    return Rule(
        lambda value: len(value) == 3 and all(low <= channel <= high for channel in value),
        f"three numbers from {low:g} to {high:g}, of red, green and blue",
    )


_COUNT = _from(1, 2**31 - 1)
_COUNT_OR_NONE = _from(0, 2**31 - 1)
_WIDTH = _from(1, 2**24)
_LAYERS = _from(1, 10_000)
_HEADS = _from(1, 65_536)
_SEED = _from(0, 2**32 - 1)
_RATE = _from(0.0, 1e4)
_SHARE = _from(0.0, 1.0)
_AXIS = Rule(
    lambda value: value == -1 or 1 <= value <= 2**20,
    "at least 1, or -1 for all devices that the other axes leave",
)

# (lowest, highest) of a model's real numbers. Beyond them a value is a slip, and float32 would
# overflow, divide by zero or lose the value.
EPSILON = (1e-20, 0.1)  # released: 1e-6 and 1e-5
ROPE_THETA = (1.0, 1e15)  # released: 1e4 to 5e7
ROPE_FACTOR = (1.0, 1e6)  # released: 2 to 6
LAYER_SCALE = (0.0, 1e3)  # released: 0.1
DROP_PATH = (0.0, 0.999)  # released: 0 to 0.4
MEAN, STD = (-10.0, 10.0), (1e-3, 1e3)  # of pixels from 0 to 1; released: about 0.45 and 0.23
LORA_ALPHA = (1e-6, 1e6)  # usual: 8 to 256

LIMITS: dict[str, dict[str, Rule]] = {
    "VisionConfig": {
        "image_size": _from(1, 16_384),
        "patch_size": _from(1, 16_384),
        "hidden_size": _WIDTH,
        "num_layers": _LAYERS,
        "num_heads": _HEADS,
        "intermediate_size": _WIDTH,
        "norm": one_of("layer_norm", "rms_norm"),
        "norm_eps": _from(*EPSILON),
        "layer_scale_init": _from(*LAYER_SCALE),
        "drop_path": _from(*DROP_PATH),
        "mean": _channels(*MEAN),
        "std": _channels(*STD),
    },
    "LanguageConfig": {
        "vocab_size": _from(1, 2**26),
        "hidden_size": _WIDTH,
        "num_layers": _LAYERS,
        "num_heads": _HEADS,
        "num_kv_heads": _HEADS,
        "head_dim": _from(1, 65_536),
        "intermediate_size": _WIDTH,
        "norm_eps": _from(*EPSILON),
        "rope_theta": _from(*ROPE_THETA),
        "rope_scaling": one_of("none", "dynamic"),
        "rope_factor": _from(*ROPE_FACTOR),
        "max_position": _COUNT,
        "num_experts": _from(0, 65_536),
        "experts_per_token": _from(0, 65_536),
        "expert_size": _from(0, 2**24),
        "family": one_of("qwen2", "qwen3", "qwen3_moe", "internlm2", "internlm3"),
        "vocab_multiple": _from(1, 2**20),
    },
    "ModelConfig": {
        "image_token_id": _COUNT_OR_NONE,
        "downsample": _from(1, 1_024),
        "ps_version": one_of("v1", "v2"),
        "projector_norm_eps": _from(*EPSILON),
        "flash_relative": _SHARE,
        "flash_absolute": _SHARE,
    },
    "ProcessorConfig": {
        "image_size": _from(1, 16_384),
        "tokens_per_tile": _from(1, 2**20),
        "min_tiles": _from(1, 10_000),
        "max_tiles": _from(1, 10_000),
        "tiles": one_of("per image", "shared"),
        "max_total_tiles": _from(0, 2**20),
        "delta": _from(1, 256),
    },
    "DataConfig": {
        "samples": _from(1, 2**40),
        "source_weights": one_of("length", "sqrt", "given"),
        "text_fraction": Rule(
            lambda value: value <= 1,
            "a share from 0 to 1, or negative to keep the mixture as it is",
        ),
        "on_bad_sample": one_of("stop", "skip"),
        "samples_per_row": _from(0, 2**20),
        "pairs_per_row": _from(1, 4_096),
        "overlong": one_of("error", "truncate", "drop"),
        "tiles": one_of("per image", "shared"),
        "max_image_pixels": _from(0, 2**40),
        "min_frames": _from(1, 100_000),
        "max_frames": _from(1, 100_000),
        "loss_reduction": one_of("square", "sample", "token"),
        "rows": _from(1, 2**20),
        "tokens_per_row": _from(1, 2**24),
        "tiles_per_row": _from(0, 2**20),
        "packing_buffer": _from(1, 65_536),
        "shards": _from(1, 2**20),
        "workers": _from(0, 1_024),
        "deltas": Rule(bool, "at least one V2PE step, such as '1' or '1/4'"),
        "seed": _SEED,
    },
    "OptimizerConfig": {
        "name": one_of("adafactor", "adamw", "muon"),
        "learning_rate": _RATE,
        "muon_learning_rate": _RATE,
        "schedule": one_of("cosine", "wsd"),
        "warmup_steps": _COUNT_OR_NONE,
        "warmup_fraction": _below(0.0, 1.0),
        "decay_fraction": _SHARE,
        "final_lr_fraction": _SHARE,
        "weight_decay": _RATE,
        "beta1": _below(0.0, 1.0),
        "beta2": _below(0.0, 1.0),
        "clip_norm": _from(1e-9, 1e12),
        "moment_dtype": one_of(*DTYPES),
        "vision_lr_scale": _RATE,
        "projector_lr_scale": _RATE,
        "language_lr_scale": _RATE,
        "flash_lr_scale": _RATE,
        "vision_layer_decay": _from(0.01, 1.0),
    },
    "LossConfig": {
        "kind": one_of("sft", "mpo", "vico", "router"),
        "balance_weight": _RATE,
        "preference_weight": _RATE,
        "quality_weight": _RATE,
        "generation_weight": _RATE,
        "beta": _from(1e-6, 1e4),
        "label_smoothing": _below(0.0, 0.5),
        "reward_shift": one_of("running", "moving"),
        "reward_shift_decay": _below(0.0, 1.0),
        "compress_share": _SHARE,
        "router_tiles": _from(1, 4096),
        "router_share": _SHARE,
        "router_window": _from(1, 2**20),
        "ref_model_dtype": one_of("", *DTYPES),
    },
    "LoraConfig": {
        "rank": _from(0, 65_536),
        "alpha": _from(*LORA_ALPHA),
        "dropout": _below(0.0, 1.0),
        "quantize": one_of("none", "int8", "nf4"),
    },
    "MeshConfig": dict.fromkeys(("slice", "data", "fsdp", "tensor", "context"), _AXIS),
    "EvalConfig": {
        "every": _COUNT_OR_NONE,
        "batches": _from(1, 1_000_000),
        "answers": _from(0, 1_000_000),
    },
    "CheckpointConfig": {
        "every": _COUNT,
        "keep": _COUNT,
        "keep_every": _COUNT_OR_NONE,
    },
    "LoggingConfig": {
        "every": _COUNT,
        "profile_steps": Rule(
            lambda value: not value or (len(value) == 2 and 1 <= value[0] <= value[1]),
            "empty, or the first and the last step",
        ),
    },
    "TrainConfig": {
        "steps": _COUNT,
        "seed": _SEED,
        "param_dtype": one_of(*DTYPES),
        "compute_dtype": one_of(*DTYPES),
        "micro_batches": _from(1, 2**20),
        "loss_chunk": _from(1, 2**24),
        "scan_unroll": _LAYERS,
        "host_check_every": _COUNT,
    },
}


def problems(config, where: str = "") -> list[str]:
    """Returns one line for each setting whose type or value is not allowed.

    Args:
      config: a dataclass of settings, possibly nested.
      where: prefix of names in messages, such as "data.".
    """
    found, rules = [], LIMITS.get(type(config).__name__, {})
    for field in dataclasses.fields(config):
        value, path = getattr(config, field.name), f"{where}{field.name}"
        if dataclasses.is_dataclass(value):
            found += problems(value, f"{path}.")
            continue
        try:
            typed(value, field.type, path)
        except ConfigError as error:
            found.append(str(error))
            continue
        rule = rules.get(field.name)
        if rule and not rule.holds(value):
            found.append(f"{path} is {excerpt(value)}; it must be {rule.expected}")
    return found
