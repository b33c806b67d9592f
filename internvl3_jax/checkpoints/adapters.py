"""Adapters apart from a base: as a LoRA run's checkpoints hold them, which name the base, and as
generation puts them on one.
"""

import dataclasses
import logging
import pathlib
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp

from internvl3_jax.checkpoints import storage
from internvl3_jax.checkpoints.manifest import Base
from internvl3_jax.checkpoints.param_hash import combined, described
from internvl3_jax.config import LoraConfig, ModelConfig, ProcessorConfig, to_dict
from internvl3_jax.model import lora
from internvl3_jax.parallel.sharding import abstract, param_shardings

# The generation layout's merged products, and what they consist of.
_FUSED = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}

log = logging.getLogger(__name__)


@dataclasses.dataclass
class Adapter:
    """What is put on a base: adapters, scaled (`lora.scaled`), and parameters that stand in the
    place of the base's.
    """

    lora: dict
    whole: dict = dataclasses.field(default_factory=dict)

    def parts(self, base: Mapping) -> dict:
        """The parts of the base's tree that are others with it, "lora" among them."""
        replaced = {name: base[name] for name in self.whole}
        return storage.nest(storage.by_path(replaced) | storage.by_path(self.whole)) | {
            lora.SUBTREE: self.lora
        }


# --- of a run ------------------------------------------------------------------------------------


def read_adapter(directory: pathlib.Path, mesh: jax.sharding.Mesh | None = None) -> dict:
    """What a step of a LoRA run holds: the subtree "lora", and parameters that were trained whole."""
    shapes = storage.nest(dict(storage.leaf_infos(directory / "params")))
    if mesh is not None:
        shapes = abstract(shapes, param_shardings(shapes, mesh))
    return storage.load_tree(directory / "params", shapes)


def attach(params: dict, own: dict, base: Base) -> dict:
    """The run's whole tree, as it trains, of the base's parameters and what it holds itself."""
    return storage.nest(
        storage.by_path(lora.prepare_base(params, base.lora)) | storage.by_path(own)
    )


def adapter(own: dict, config: LoraConfig) -> Adapter:
    """The same for use beside a base that stays as it is."""
    return Adapter(lora.scaled(own[lora.SUBTREE], config), lora.base_params(own))


def check_processor(theirs: ProcessorConfig, ours: ProcessorConfig, where: str) -> None:
    """ValueError naming what of prompts and pictures the adapter was trained with differs from what
    it would be used with.
    """
    theirs, ours = to_dict(theirs), to_dict(ours)
    differing = [
        f"{name} {theirs[name]!r}, not {ours[name]!r}"
        for name in theirs
        if theirs[name] != ours[name]
    ]
    if differing:
        raise ValueError(
            f"{where} was trained with {'; '.join(differing)} as of the base. Open it by itself, "
            "merged, or go on with accept_fingerprint"
        )


def check_model(model: ModelConfig, base: ModelConfig, where: str) -> None:
    """ValueError unless they are the same but for drop path, which is of a training, not of
    weights.
    """
    theirs, ours = to_dict(model), to_dict(base)
    theirs["vision"]["drop_path"] = ours["vision"]["drop_path"]
    if differing := [name for name in theirs if theirs[name] != ours[name]]:
        raise ValueError(
            f"{where} is an adapter of another model than the base: they differ in "
            f"{', '.join(differing)}"
        )


def describe(leaves: Iterable[tuple[str, jax.Array]], dtype: str) -> dict[str, str] | None:
    """`checksum.described` of parameters in `dtype`. None where they are in one that cannot hold
    all of its values.
    """
    found = {}
    for path, leaf in leaves:
        if jnp.promote_types(leaf.dtype, dtype) != leaf.dtype:
            return None
        found |= described({path: jnp.asarray(leaf, dtype)})
    return found


def base_hash(descriptions: Mapping[str, str], trained: Iterable[str]) -> str:
    """Of a base but for what is trained whole, before any of it is quantized: another machine may
    quantize to other bits.
    """
    return combined({path: text for path, text in descriptions.items() if path not in set(trained)})


def check_base(descriptions: Mapping[str, str] | None, own: dict, base: Base, where: str) -> None:
    """ValueError unless the base's parameters are those that the run was trained beside.
    descriptions: of `describe` in `base.dtype`.
    """
    if descriptions is None:
        log.warning(
            "%s: not compared with its base, which is here in a narrower dtype than %s",
            where,
            base.dtype,
        )
        return
    trained = storage.by_path(lora.base_params(own)).keys()
    if trained - descriptions.keys() or base_hash(descriptions, trained) != base.frozen:
        raise ValueError(
            f"{where} was trained beside {base.path} as it was then; this base has other "
            "parameters. Bring that one back, or name it"
        )


# --- in generation -------------------------------------------------------------------------------


def unroll(adapters: Mapping, config: ModelConfig, fused: bool, vision: bool) -> dict:
    """Stacked adapters in the generation layout: `language.unroll`'s, and `vision.unroll`'s too if
    `vision`.
    """
    parts = dict(adapters)
    if vision and "vision" in parts:
        parts["vision"] = _unstacked(parts["vision"]["layers"], config.vision.num_layers)
    if "language" in parts:
        layers = parts["language"]["layers"]
        parts["language"] = _unstacked(
            _fuse(layers, config) if fused else layers, config.language.num_layers
        )
    return parts


def _unstacked(layers: Mapping, count: int) -> dict:
    return {
        f"layer_{index}": jax.tree.map(lambda leaf, i=index: leaf[i], layers)
        for index in range(count)
    }


def _fuse(layers: Mapping, config: ModelConfig) -> dict:
    """Adapters of merged products: the a side by side, each b at its own columns."""
    language = config.language
    q, k = (heads * language.head_dim for heads in (language.num_heads, language.num_kv_heads))
    widths = {
        "q": q,
        "k": k,
        "v": k,
        "gate": language.intermediate_size,
        "up": language.intermediate_size,
    }
    fused = {name: adapter for name, adapter in layers.items() if name not in widths}
    for target, sources in _FUSED.items():
        present = [name for name in sources if name in layers]
        if not present:
            continue
        starts = {
            name: sum(widths[before] for before in sources[: sources.index(name)])
            for name in present
        }
        total = sum(widths[name] for name in sources)
        padded = [_padded(layers[name]["b"], starts[name], total) for name in present]
        fused[target] = {
            "a": jnp.concatenate([layers[name]["a"] for name in present], axis=-1),
            "b": jnp.concatenate(padded, axis=-2),
        }
    return fused


def _padded(b, start: int, total: int):
    return jnp.pad(b, [(0, 0)] * (b.ndim - 1) + [(start, total - start - b.shape[-1])])
