"""The table between our parameter tree and the tensors of the two released layouts.

It is used in both directions. A row has a leaf of the tree, the shape of one layer, its name in
either layout, and how the values are rearranged. A layout may store a leaf in several tensors (q, k
and v of the vision tower in transformers), joined along their first axis. `{}` is the layer's
number, and a second one the expert's: a leaf of experts stacks both.

Shapes are of one layer, without the vocabulary's padding (see assemble.py). Vision tower: C width,
M inner width, P values of a patch, N positions. Decoder: D width, F inner width, V vocabulary, Q
and K widths of queries and keys, H width of a head, E experts, I width of one. Projector: S width after pixel shuffle;
G that of compressed tiles.
"""

import dataclasses
import enum
import re

import numpy as np

from internvl3_jax.checkpoints.hf.flash_rows import flash_leaves
from internvl3_jax.config import ModelConfig


class Transform(enum.Enum):
    """Turns a tensor of a file, joined if several, into a leaf. The inverse is derived."""

    VECTOR = "as it is; leading axes of length 1 are dropped"
    LINEAR = "torch weight [out, in] -> kernel [in, out]"
    CONV = "[C, 3, height, width] -> [height * width * 3, C]"
    ROWS = "vocabulary first: [V, D], as it is"


@dataclasses.dataclass(frozen=True)
class Row:
    target: str
    shape: str
    transform: Transform
    internvl: str
    hf: tuple[str, ...]
    when: str = ""

    def keys(self, layout: str, index: tuple) -> tuple[str, ...]:
        """Returns the names of this leaf's tensors in a layout.

        Args:
          index: () for a leaf without layers, (layer,), or (layer, expert).
        """
        patterns = (self.internvl,) if layout == "internvl" else self.hf
        return tuple(pattern.format(*index) for pattern in patterns)


# A block starts with the prefixes of our leaf and of its names in the original layout and in
# transformers. Columns: leaf, shape of one layer, transform, the two names, and the flag of
# `active_rows` without which the leaf does not exist. "[qkv]" stands for three tensors.
_TEXT = """
vision/  vision_model.embeddings.  model.vision_tower.embeddings.
  patch_embedding/kernel  P,C  CONV    patch_embedding.weight  patch_embeddings.projection.weight
  patch_embedding/bias    C    VECTOR  patch_embedding.bias    patch_embeddings.projection.bias
  class_embedding         C    VECTOR  class_embedding         cls_token
  position_embedding      N,C  VECTOR  position_embedding      position_embeddings

vision/layers/  vision_model.encoder.layers.{}.attn.  model.vision_tower.encoder.layer.{}.attention.
  qkv/kernel    C,3C  LINEAR  qkv.weight     [qkv]_proj.weight
  qkv/bias      3C    VECTOR  qkv.bias       [qkv]_proj.bias          qkv_bias
  q_norm/scale  C     VECTOR  q_norm.weight  q_norm.weight            qk_norm
  k_norm/scale  C     VECTOR  k_norm.weight  k_norm.weight            qk_norm
  proj/kernel   C,C   LINEAR  proj.weight    projection_layer.weight
  proj/bias     C     VECTOR  proj.bias      projection_layer.bias

vision/layers/  vision_model.encoder.layers.{}.  model.vision_tower.encoder.layer.{}.
  norm1/scale   C  VECTOR  norm1.weight  layernorm_before.weight
  norm1/bias    C  VECTOR  norm1.bias    layernorm_before.bias    layer_norm
  layer_scale1  C  VECTOR  ls1           lambda_1
  norm2/scale   C  VECTOR  norm2.weight  layernorm_after.weight
  norm2/bias    C  VECTOR  norm2.bias    layernorm_after.bias     layer_norm
  layer_scale2  C  VECTOR  ls2           lambda_2

vision/layers/  vision_model.encoder.layers.{}.mlp.  model.vision_tower.encoder.layer.{}.mlp.
  fc1/kernel  C,M  LINEAR  fc1.weight  fc1.weight
  fc1/bias    M    VECTOR  fc1.bias    fc1.bias
  fc2/kernel  M,C  LINEAR  fc2.weight  fc2.weight
  fc2/bias    C    VECTOR  fc2.bias    fc2.bias

projector/  mlp1.  model.multi_modal_projector.
  norm/scale  S    VECTOR  0.weight  layer_norm.weight
  norm/bias   S    VECTOR  0.bias    layer_norm.bias
  fc1/kernel  S,D  LINEAR  1.weight  linear_1.weight
  fc1/bias    D    VECTOR  1.bias    linear_1.bias
  fc2/kernel  D,D  LINEAR  3.weight  linear_2.weight
  fc2/bias    D    VECTOR  3.bias    linear_2.bias

language/  language_model.model.  model.language_model.
  embedding   V,D  ROWS    embed_tokens.weight  embed_tokens.weight
  norm/scale  D    VECTOR  norm.weight          norm.weight

language/head/  language_model.lm_head.  lm_head.
  kernel  D,V  LINEAR  weight  weight  head

language/layers/  language_model.model.layers.{}.  model.language_model.layers.{}.
  input_norm/scale  D  VECTOR  input_layernorm.weight           input_layernorm.weight
  post_norm/scale   D  VECTOR  post_attention_layernorm.weight  post_attention_layernorm.weight

language/layers/ language_model.model.layers.{}.self_attn. model.language_model.layers.{}.self_attn.
  q/kernel  D,Q  LINEAR  q_proj.weight  q_proj.weight
  q/bias    Q    VECTOR  q_proj.bias    q_proj.bias    language_qkv_bias
  k/kernel  D,K  LINEAR  k_proj.weight  k_proj.weight
  k/bias    K    VECTOR  k_proj.bias    k_proj.bias    language_qkv_bias
  v/kernel  D,K  LINEAR  v_proj.weight  v_proj.weight
  v/bias    K    VECTOR  v_proj.bias    v_proj.bias    language_qkv_bias
  o/kernel  Q,D  LINEAR  o_proj.weight  o_proj.weight
  o/bias    D    VECTOR  o_proj.bias    o_proj.bias    o_bias
  q_norm/scale  H  VECTOR  q_norm.weight  q_norm.weight  language_qk_norm
  k_norm/scale  H  VECTOR  k_norm.weight  k_norm.weight  language_qk_norm

language/layers/  language_model.model.layers.{}.mlp.  model.language_model.layers.{}.mlp.
  gate/kernel  D,F  LINEAR  gate_proj.weight  gate_proj.weight  mlp
  gate/bias    F    VECTOR  gate_proj.bias    gate_proj.bias    mlp_bias
  up/kernel    D,F  LINEAR  up_proj.weight    up_proj.weight    mlp
  up/bias      F    VECTOR  up_proj.bias      up_proj.bias      mlp_bias
  down/kernel  F,D  LINEAR  down_proj.weight  down_proj.weight  mlp
  down/bias    D    VECTOR  down_proj.bias    down_proj.bias    mlp_bias

language/layers/experts/ language_model.model.layers.{}.mlp. model.language_model.layers.{}.mlp.
  router/kernel  D,E  LINEAR  gate.weight                  gate.weight                  experts
  gate/kernel    D,I  LINEAR  experts.{}.gate_proj.weight  experts.{}.gate_proj.weight  experts
  up/kernel      D,I  LINEAR  experts.{}.up_proj.weight    experts.{}.up_proj.weight    experts
  down/kernel    I,D  LINEAR  experts.{}.down_proj.weight  experts.{}.down_proj.weight  experts
"""


def _parse_table(text: str) -> list[Row]:
    table = []
    for block in text.strip().split("\n\n"):
        prefixes, *lines = (line.split() for line in block.splitlines())
        leaf_prefix, internvl_prefix, hf_prefix = prefixes
        for leaf, shape, transform, internvl, hf, *when in lines:
            names = [hf.replace("[qkv]", letter) for letter in "qkv"] if "[qkv]" in hf else [hf]
            table.append(
                Row(
                    target=leaf_prefix + leaf,
                    shape=shape.replace(",", " "),
                    transform=Transform[transform],
                    internvl=internvl_prefix + internvl,
                    hf=tuple(hf_prefix + name for name in names),
                    when="".join(when),
                )
            )
    return table


TABLE = _parse_table(_TEXT)
TABLE += [
    Row(leaf, shape, Transform[transform], name, (), "flash")
    for leaf, shape, transform, name in flash_leaves()
]

# Constants that some versions save with the weights; they are computed here.
IGNORED = re.compile(r"(rotary_emb\.inv_freq|position_ids|relative_position_index)$")
# Names in the files of -hf repositories, and in current transformers.
OLD_HF_NAMES = (
    ("language_model.lm_head.", "lm_head."),
    ("language_model.model.", "model.language_model."),
    ("vision_tower.", "model.vision_tower."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
)


def canonical_key(name: str, layout: str) -> str:
    """Returns the table's name of a tensor; older names of the transformers layout are mapped."""
    if layout == "hf":
        for old, new in OLD_HF_NAMES:
            if name.startswith(old):
                return new + name.removeprefix(old)
    return name


# InternLM2's names in the original layout -> the table's. wqkv holds q, k and v; see internlm2.py.
QKV = ("q_proj", "k_proj", "v_proj")
INTERNLM2_QKV = re.compile(r"\.attention\.wqkv\.")
INTERNLM2_NAMES = (
    ("language_model.output.", "language_model.lm_head."),
    (".tok_embeddings.", ".embed_tokens."),
    (".attention_norm.", ".input_layernorm."),
    (".ffn_norm.", ".post_attention_layernorm."),
    (".attention.wo.", ".self_attn.o_proj."),
    (".feed_forward.w1.", ".mlp.gate_proj."),
    (".feed_forward.w3.", ".mlp.up_proj."),
    (".feed_forward.w2.", ".mlp.down_proj."),
)


def internlm2_names(name: str) -> list[str]:
    """Returns the table's names of the content of an InternLM2 tensor."""
    if not name.startswith("language_model."):
        return [name]
    if INTERNLM2_QKV.search(name):
        return [INTERNLM2_QKV.sub(f".self_attn.{part}.", name) for part in QKV]
    for internlm2, table in INTERNLM2_NAMES:
        name = name.replace(internlm2, table)
    return [name]


def file_name(key: str, config: ModelConfig, layout: str) -> str:
    """Returns the name in a layout's files of a name of the table."""
    if (
        config.language.family != "internlm2"
        or layout != "internvl"
        or not key.startswith("language_model.")
    ):
        return key
    for part in QKV:
        key = key.replace(f".self_attn.{part}.", ".attention.wqkv.")
    for internlm2, table in INTERNLM2_NAMES:
        key = key.replace(table, internlm2)
    return key


def check_layout(config: ModelConfig, layout: str) -> None:
    """Raises ValueError if a layout has no names for the model's tensors."""
    if config.flash and layout == "hf":
        raise ValueError(
            "flash is true: transformers has no Flash model; use the original layout (internvl)"
        )


def active_rows(config: ModelConfig) -> list[Row]:
    """Returns the rows that exist for a configuration, in the table's order."""
    vision, language = config.vision, config.language
    flags = {
        "": True,
        "qkv_bias": vision.qkv_bias,
        "qk_norm": vision.qk_norm,
        "layer_norm": vision.norm == "layer_norm",
        "head": not language.tie_embeddings,
        "language_qkv_bias": language.qkv_bias,
        "language_qk_norm": language.qk_norm,
        "o_bias": language.o_bias,
        "mlp": not language.num_experts,
        "mlp_bias": language.mlp_bias,
        "experts": language.num_experts > 0,
        "flash": config.flash,
    }
    return [row for row in TABLE if flags[row.when]]


def stacked_axes(row: Row, config: ModelConfig) -> tuple[int, ...]:
    """Returns the sizes of the axes that a leaf stacks: (), (layers,) or (layers, experts)."""
    if "/layers/" not in row.target:
        return ()
    if row.target.startswith("vision/"):
        return (config.vision.num_layers,)
    experts = (config.language.num_experts,) * (row.internvl.count("{}") - 1)
    return (config.language.num_layers, *experts)


def leaf_shape(row: Row, config: ModelConfig) -> tuple[int, ...]:
    """Returns the shape of one layer of a leaf, without padding."""
    vision, language = config.vision, config.language
    axes = {
        "P": 3 * vision.patch_size**2,
        "N": 1 + vision.grid**2,
        "C": vision.hidden_size,
        "3C": 3 * vision.hidden_size,
        "4C": 4 * vision.hidden_size,
        "G": config.downsample**4 * vision.hidden_size,
        "2D": 2 * language.hidden_size,
        "1": 1,
        "2": 2,
        "M": vision.intermediate_size,
        "S": config.downsample**2 * vision.hidden_size,
        "D": language.hidden_size,
        "F": language.intermediate_size,
        "H": language.head_dim,
        "E": language.num_experts,
        "I": language.expert_size,
        "Q": language.num_heads * language.head_dim,
        "K": language.num_kv_heads * language.head_dim,
        "V": language.vocab_size,
    }
    return tuple(axes[name] for name in row.shape.split())


def source_shape(row: Row, config: ModelConfig, layout: str) -> tuple[int, ...]:
    """Returns the shape of each tensor that holds (a part of) one layer of a leaf."""
    shape = leaf_shape(row, config)
    parts = 1 if layout == "internvl" else len(row.hf)
    if row.transform is Transform.CONV:
        patch = config.vision.patch_size
        return (shape[1], 3, patch, patch)
    if row.transform is Transform.LINEAR:
        shape = shape[::-1]
    if row.target == "vision/class_embedding":
        return (1, 1, *shape)
    if row.target == "vision/position_embedding":
        return (1, *shape)
    return (shape[0] // parts, *shape[1:])


def to_leaf(row: Row, tensors: list[np.ndarray], config: ModelConfig) -> np.ndarray:
    """Converts the tensors of one layer to that layer of the leaf. May return a view."""
    tensor = (
        tensors[0]
        if len(tensors) == 1
        else np.concatenate([bits(part) for part in tensors]).view(tensors[0].dtype)
    )
    if row.transform is Transform.LINEAR:
        return tensor.T
    if row.transform is Transform.CONV:
        return tensor.transpose(2, 3, 1, 0).reshape(leaf_shape(row, config))
    return tensor.reshape(leaf_shape(row, config))


def from_leaf(row: Row, leaf: np.ndarray, config: ModelConfig, layout: str) -> list[np.ndarray]:
    """Converts one layer of a leaf to a layout's contiguous tensors; the inverse of `to_leaf`."""
    if row.transform is Transform.LINEAR:
        leaf = leaf.T
    elif row.transform is Transform.CONV:
        patch = config.vision.patch_size
        leaf = leaf.reshape(patch, patch, 3, -1).transpose(3, 2, 0, 1)
    shape = source_shape(row, config, layout)
    parts = 1 if layout == "internvl" else len(row.hf)
    return [
        np.ascontiguousarray(bits(part)).view(leaf.dtype).reshape(shape)
        for part in np.split(leaf, parts)
    ]


def bits(array: np.ndarray) -> np.ndarray:
    """Returns the array as unsigned integers, which numpy moves much faster than bfloat16."""
    return array.view(f"u{array.dtype.itemsize}")
