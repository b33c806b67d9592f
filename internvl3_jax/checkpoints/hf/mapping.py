"""The one table between our parameter tree and the tensors of the two released layouts; it runs in
both directions.

Each row names a leaf of the tree, the shape of one layer of it, what it is called in either layout,
and how the bytes are rearranged. A layout may keep one leaf in several tensors (q, k and v of the
vision tower in transformers): they are joined along their first axis. `{}` is the layer's number.
Rows whose `when` is false for a configuration do not exist for it.

Shapes are of one layer, without the padding of the vocabulary (see `assemble.py`): C, M, P, N
width, inner width, pixels of a patch and positions of the vision tower; D, F, V width, inner width
and vocabulary of the decoder; Q and K widths of its queries and keys; S width after pixel shuffle.
"""

import dataclasses
import enum
import re

import numpy as np

from internvl3_jax.config import ModelConfig


class Transform(enum.Enum):
    """How a tensor in a file (joined, where it is several) becomes a leaf. The inverse is computed,
    not written twice.
    """

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

    def keys(self, layout: str, layer: int | None) -> tuple[str, ...]:
        """The tensor names in a layout that hold this leaf (of this layer)."""
        patterns = (self.internvl,) if layout == "internvl" else self.hf
        return tuple(pattern.format(layer) for pattern in patterns)


def _rows() -> list[Row]:
    vector, linear, conv, rows = (
        Transform.VECTOR,
        Transform.LINEAR,
        Transform.CONV,
        Transform.ROWS,
    )
    table = []

    def row(target, shape, transform, internvl, *hf, when=""):
        table.append(Row(target, shape, transform, internvl, hf, when))

    old, new = "vision_model.embeddings.", "model.vision_tower.embeddings."
    row(
        "vision/patch_embedding/kernel",
        "P C",
        conv,
        old + "patch_embedding.weight",
        new + "patch_embeddings.projection.weight",
    )
    row(
        "vision/patch_embedding/bias",
        "C",
        vector,
        old + "patch_embedding.bias",
        new + "patch_embeddings.projection.bias",
    )
    row("vision/class_embedding", "C", vector, old + "class_embedding", new + "cls_token")
    row(
        "vision/position_embedding",
        "N C",
        vector,
        old + "position_embedding",
        new + "position_embeddings",
    )

    ours, old, new = (
        "vision/layers/",
        "vision_model.encoder.layers.{}.",
        "model.vision_tower.encoder.layer.{}.",
    )
    qkv = tuple(f"{new}attention.{name}_proj." for name in "qkv")
    row(
        ours + "qkv/kernel",
        "C 3C",
        linear,
        old + "attn.qkv.weight",
        *(name + "weight" for name in qkv),
    )
    row(
        ours + "qkv/bias",
        "3C",
        vector,
        old + "attn.qkv.bias",
        *(name + "bias" for name in qkv),
        when="qkv_bias",
    )
    for name in ("q_norm", "k_norm"):
        row(
            f"{ours}{name}/scale",
            "C",
            vector,
            f"{old}attn.{name}.weight",
            f"{new}attention.{name}.weight",
            when="qk_norm",
        )
    row(
        ours + "proj/kernel",
        "C C",
        linear,
        old + "attn.proj.weight",
        new + "attention.projection_layer.weight",
    )
    row(
        ours + "proj/bias",
        "C",
        vector,
        old + "attn.proj.bias",
        new + "attention.projection_layer.bias",
    )
    for index, name in ((1, "layernorm_before"), (2, "layernorm_after")):
        row(
            f"{ours}norm{index}/scale",
            "C",
            vector,
            f"{old}norm{index}.weight",
            f"{new}{name}.weight",
        )
        row(
            f"{ours}norm{index}/bias",
            "C",
            vector,
            f"{old}norm{index}.bias",
            f"{new}{name}.bias",
            when="layer_norm",
        )
        row(f"{ours}layer_scale{index}", "C", vector, f"{old}ls{index}", f"{new}lambda_{index}")
    for name, shape, bias in (("fc1", "C M", "M"), ("fc2", "M C", "C")):
        row(
            f"{ours}{name}/kernel",
            shape,
            linear,
            f"{old}mlp.{name}.weight",
            f"{new}mlp.{name}.weight",
        )
        row(f"{ours}{name}/bias", bias, vector, f"{old}mlp.{name}.bias", f"{new}mlp.{name}.bias")

    new = "model.multi_modal_projector."
    for part in ("weight", "bias"):
        ours = "scale" if part == "weight" else "bias"
        row(f"projector/norm/{ours}", "S", vector, f"mlp1.0.{part}", f"{new}layer_norm.{part}")
    for name, shape, old, linear_name in (
        ("fc1", "S D", "mlp1.1.", "linear_1."),
        ("fc2", "D D", "mlp1.3.", "linear_2."),
    ):
        row(f"projector/{name}/kernel", shape, linear, old + "weight", new + linear_name + "weight")
        row(f"projector/{name}/bias", "D", vector, old + "bias", new + linear_name + "bias")

    ours, old, new = "language/", "language_model.model.", "model.language_model."
    row(ours + "embedding", "V D", rows, old + "embed_tokens.weight", new + "embed_tokens.weight")
    row(ours + "norm/scale", "D", vector, old + "norm.weight", new + "norm.weight")
    row(
        ours + "head/kernel",
        "D V",
        linear,
        "language_model.lm_head.weight",
        "lm_head.weight",
        when="head",
    )
    ours, old, new = ours + "layers/", old + "layers.{}.", new + "layers.{}."
    for name, theirs in (
        ("input_norm", "input_layernorm"),
        ("post_norm", "post_attention_layernorm"),
    ):
        row(f"{ours}{name}/scale", "D", vector, f"{old}{theirs}.weight", f"{new}{theirs}.weight")
    shapes = {"q": ("D Q", "Q"), "k": ("D K", "K"), "v": ("D K", "K"), "o": ("Q D", "D")}
    shapes |= {"gate": ("D F", "F"), "up": ("D F", "F"), "down": ("F D", "D")}
    for name, (shape, bias) in shapes.items():
        block, flag = (
            ("self_attn", "language_qkv_bias" if name in "qkv" else "o_bias")
            if len(name) == 1
            else ("mlp", "mlp_bias")
        )
        tail = f"{block}.{name}_proj."
        row(f"{ours}{name}/kernel", shape, linear, f"{old}{tail}weight", f"{new}{tail}weight")
        row(f"{ours}{name}/bias", bias, vector, f"{old}{tail}bias", f"{new}{tail}bias", when=flag)
    return table


TABLE = _rows()

# Constants that some versions saved with the weights; they are computed here.
IGNORED = re.compile(r"(rotary_emb\.inv_freq|position_ids|relative_position_index)$")
# Names on disk in the -hf repositories, and what current transformers calls them.
OLD_HF_NAMES = (
    ("language_model.lm_head.", "lm_head."),
    ("language_model.model.", "model.language_model."),
    ("vision_tower.", "model.vision_tower."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
)


def canonical_key(name: str, layout: str) -> str:
    """The table's spelling of a tensor's name: older names of the transformers layout are brought
    up to date.
    """
    if layout == "hf":
        for old, new in OLD_HF_NAMES:
            if name.startswith(old):
                return new + name.removeprefix(old)
    return name


# InternLM2's names in the original layout -> the table's. One of its tensors holds q, k and v; see
# internlm2.py.
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
    """The table's names of what a tensor of an InternLM2 model holds."""
    if not name.startswith("language_model."):
        return [name]
    if INTERNLM2_QKV.search(name):
        return [INTERNLM2_QKV.sub(f".self_attn.{part}.", name) for part in QKV]
    for theirs, tables in INTERNLM2_NAMES:
        name = name.replace(theirs, tables)
    return [name]


def file_name(key: str, config: ModelConfig, layout: str) -> str:
    """The name that a layout's files have for the table's."""
    if (
        config.language.family != "internlm2"
        or layout != "internvl"
        or not key.startswith("language_model.")
    ):
        return key
    for part in QKV:
        key = key.replace(f".self_attn.{part}.", ".attention.wqkv.")
    for theirs, tables in INTERNLM2_NAMES:
        key = key.replace(tables, theirs)
    return key


def active_rows(config: ModelConfig) -> list[Row]:
    """The rows that exist for a configuration, in the table's order."""
    vision, language = config.vision, config.language
    flags = {
        "": True,
        "qkv_bias": vision.qkv_bias,
        "qk_norm": vision.qk_norm,
        "layer_norm": vision.norm == "layer_norm",
        "head": not language.tie_embeddings,
        "language_qkv_bias": language.qkv_bias,
        "o_bias": language.o_bias,
        "mlp_bias": language.mlp_bias,
    }
    return [row for row in TABLE if flags[row.when]]


def layers_of(row: Row, config: ModelConfig) -> int | None:
    """How many layers a leaf stacks on its first axis, None for a leaf without one."""
    if "/layers/" not in row.target:
        return None
    return (
        config.vision.num_layers if row.target.startswith("vision/") else config.language.num_layers
    )


def leaf_shape(row: Row, config: ModelConfig) -> tuple[int, ...]:
    """Shape of one layer of the leaf, vocabulary not padded."""
    vision, language = config.vision, config.language
    axes = {
        "P": 3 * vision.patch_size**2,
        "N": 1 + vision.grid**2,
        "C": vision.hidden_size,
        "3C": 3 * vision.hidden_size,
        "M": vision.intermediate_size,
        "S": config.downsample**2 * vision.hidden_size,
        "D": language.hidden_size,
        "F": language.intermediate_size,
        "Q": language.num_heads * language.head_dim,
        "K": language.num_kv_heads * language.head_dim,
        "V": language.vocab_size,
    }
    return tuple(axes[name] for name in row.shape.split())


def source_shape(row: Row, config: ModelConfig, layout: str) -> tuple[int, ...]:
    """Shape of each tensor in a file that holds (a part of) one layer of the leaf."""
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
    """The tensors of one layer -> that layer of the leaf. May return a view."""
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
    """One layer of a leaf -> the tensors a layout keeps it in, contiguous; the exact inverse of
    `to_leaf`.
    """
    if row.transform is Transform.LINEAR:
        leaf = leaf.T
    elif row.transform is Transform.CONV:
        patch = config.vision.patch_size
        leaf = leaf.reshape(patch, patch, 3, -1).transpose(3, 2, 0, 1)
    shape = source_shape(row, config, layout)
    parts = len(row.keys(layout, 0))
    return [
        np.ascontiguousarray(bits(part)).view(leaf.dtype).reshape(shape)
        for part in np.split(leaf, parts)
    ]


def bits(array: np.ndarray) -> np.ndarray:
    """The array as unsigned integers of its width: numpy moves those many times faster than
    bfloat16.
    """
    return array.view(f"u{array.dtype.itemsize}")
