"""The plain keys of a released config.json, in one table that is read and written.

Each row is a field of ours and its key in JSON. What takes more than a name, such as rotary
scaling, biases or square sizes, is read in config.py and language.py and written by
convert/config_json.py.
"""

from collections.abc import Iterable
from typing import NamedTuple

from internvl3_jax.checkpoints.hf.fields import Fields
from internvl3_jax.io import limits


def bounds(limit: tuple[float, float]) -> dict[str, float]:
    """Returns a range of io/limits.py as arguments of `Fields.get`."""
    return dict(zip(("low", "high"), limit, strict=True))


# The largest released model has 8,192 channels, 80 layers and 151,674 entries. Beyond these bounds
# a number is a slip, and the machine would run out of memory before anything else noticed.
CHANNELS = {"low": 1, "high": 1 << 18}
LAYERS = {"low": 1, "high": 1024}
HEADS = {"low": 1, "high": 4096}
VOCABULARY = {"low": 1, "high": 1 << 24}
POSITIONS = {"low": 1, "high": 1 << 30}
EPSILON = bounds(limits.EPSILON)
DROP_PATH = {"default": 0.0} | bounds(limits.DROP_PATH)
LAYER_SCALE = {"default": 0.1} | bounds(limits.LAYER_SCALE)


class Key(NamedTuple):
    """A field of VisionConfig or LanguageConfig in config.json."""

    field: str
    name: str  # in config.json
    kind: type
    options: dict = {}  # of `Fields.get`: default, low, high, choices
    is_written: bool = True


_BOTH_LAYOUTS = (
    Key("hidden_size", "hidden_size", int, CHANNELS),
    Key("num_layers", "num_hidden_layers", int, LAYERS),
    Key("num_heads", "num_attention_heads", int, HEADS),
    Key("intermediate_size", "intermediate_size", int, CHANNELS),
    Key("norm", "norm_type", str, {"choices": ("layer_norm", "rms_norm")}),
    Key("norm_eps", "layer_norm_eps", float, {"default": 1e-6} | EPSILON),
)
# By layout: "internvl" is the original one, "hf" that of transformers.
VISION = {
    "internvl": (
        *_BOTH_LAYOUTS,
        Key("qkv_bias", "qkv_bias", bool),
        Key("qk_norm", "qk_normalization", bool),
        Key("layer_scale_init", "initializer_factor", float, LAYER_SCALE),
        Key("drop_path", "drop_path_rate", float, DROP_PATH),
    ),
    "hf": (
        *_BOTH_LAYOUTS,
        Key("qkv_bias", "attention_bias", bool),
        Key("qk_norm", "use_qk_norm", bool, {"default": False}),
        Key("layer_scale_init", "layer_scale_init_value", float, LAYER_SCALE),
        Key("drop_path", "drop_path_rate", float, DROP_PATH, is_written=False),
    ),
}
LANGUAGE = (
    Key("vocab_size", "vocab_size", int, VOCABULARY),
    Key("hidden_size", "hidden_size", int, CHANNELS),
    Key("num_layers", "num_hidden_layers", int, LAYERS),
    Key("num_heads", "num_attention_heads", int, HEADS),
    Key("num_kv_heads", "num_key_value_heads", int, HEADS),
    Key("intermediate_size", "intermediate_size", int, CHANNELS),
    Key("max_position", "max_position_embeddings", int, POSITIONS),
)


# Those of Qwen3's mixture of experts, but for their number, which has two names.
NUMBER_OF_EXPERTS = "num_experts", "num_local_experts"  # before transformers 5, and since
EXPERTS = (
    Key("experts_per_token", "num_experts_per_tok", int, {"low": 1, "high": 65_536}),
    Key("expert_size", "moe_intermediate_size", int, CHANNELS),
    Key("normalize_experts", "norm_topk_prob", bool),
)


def read_keys(fields: Fields, keys: Iterable[Key]) -> dict:
    """Returns our fields from a JSON object; JsonError names a key that is missing or wrong."""
    # key.kind() because JSON may have 1 for 1.0.
    return {key.field: key.kind(fields.get(key.name, key.kind, **key.options)) for key in keys}


def write_keys(config, keys: Iterable[Key]) -> dict:
    """Returns the JSON object of our fields."""
    return {key.name: getattr(config, key.field) for key in keys if key.is_written}
