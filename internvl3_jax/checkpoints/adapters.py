"""LoRA adapters stored without their base: read from checkpoints, attached for inference."""

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

# Fused layers of the generation layout, and the layers that each consists of.
_FUSED = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}

log = logging.getLogger(__name__)


@dataclasses.dataclass
class Adapter:
    """An adapter for a base: scaled factors (`lora.scaled`) and parameters that replace the base's.

    Attributes:
      lora: tree of layers with a [in, r] and b [r, out], stacked over layers.
      whole: tree of parameters that were fully trained.
    """

    lora: dict
    whole: dict = dataclasses.field(default_factory=dict)

    def parts(self, base: Mapping) -> dict:
        """Returns the subtrees of the base that differ with it, "lora" among them."""
        whole = storage.by_path(self.whole)
        replaced = {
            path: leaf
            for path, leaf in storage.by_path({name: base[name] for name in self.whole}).items()
            # A kernel that is given in full replaces both parts of a quantized one.
            if path.rpartition("/")[0] not in whole
        }
        return storage.nest(replaced | whole) | {lora.SUBTREE: self.lora}


# --- in a run ------------------------------------------------------------------------------------


def read_adapter(directory: pathlib.Path, mesh: jax.sharding.Mesh | None = None) -> dict:
    """Reads the parameters of a LoRA step: the subtree "lora" and fully trained parameters."""
    shapes = storage.nest(dict(storage.leaf_infos(directory / "params")))
    if mesh is not None:
        shapes = abstract(shapes, param_shardings(shapes, mesh))
    return storage.load_tree(directory / "params", shapes)


def attach(params: dict, adapter_params: dict, base: Base) -> dict:
    """Returns the tree that the run trains: the base's parameters with those of the LoRA step."""
    return storage.nest(
        storage.by_path(lora.prepare_base(params, base.lora)) | storage.by_path(adapter_params)
    )


def adapter(adapter_params: dict, config: LoraConfig) -> Adapter:
    """Returns the parameters of a LoRA step as an adapter for an unchanged base."""
    return Adapter(
        lora.scaled(adapter_params[lora.SUBTREE], config), lora.base_params(adapter_params)
    )


def check_processor(processor: ProcessorConfig, base: ProcessorConfig, where: str) -> None:
    """Raises ValueError naming the image and prompt settings in which adapter and base differ."""
    adapters, bases = to_dict(processor), to_dict(base)
    differing = [
        f"{name} is {adapters[name]!r} in the adapter and {bases[name]!r} in the base"
        for name in adapters
        if adapters[name] != bases[name]
    ]
    if differing:
        raise ValueError(
            f"{where}: {'; '.join(differing)}. Open it by itself, merged, or accept the base's "
            "settings with accept_fingerprint"
        )


def check_model(model: ModelConfig, base: ModelConfig, where: str) -> None:
    """Raises ValueError if an adapter's model differs from the base in more than drop path."""
    adapters, bases = to_dict(model), to_dict(base)
    adapters["vision"]["drop_path"] = bases["vision"]["drop_path"]
    if differing := [name for name in adapters if adapters[name] != bases[name]]:
        raise ValueError(
            f"{where} is an adapter of another model than the base: they differ in "
            f"{', '.join(differing)}"
        )


def describe(leaves: Iterable[tuple[str, jax.Array]], dtype: str) -> dict[str, str] | None:
    """Returns `param_hash.described` of parameters in `dtype`.

    None if their dtype cannot hold all values of `dtype`.
    """
    descriptions = {}
    for path, leaf in leaves:
        if jnp.promote_types(leaf.dtype, dtype) != leaf.dtype:
            return None
        descriptions |= described({path: jnp.asarray(leaf, dtype)})
    return descriptions


def base_hash(descriptions: Mapping[str, str], trained: Iterable[str]) -> str:
    """Returns the hash of a base's frozen parameters.

    It is computed before quantization, because machines may quantize to different bits.
    """
    return combined({path: text for path, text in descriptions.items() if path not in set(trained)})


def check_base(
    descriptions: Mapping[str, str] | None, adapter_params: dict, base: Base, where: str
) -> None:
    """Raises ValueError if the base has other parameters than when the adapter was trained.

    Args:
      descriptions: from `describe` in `base.dtype`; None warns that nothing is compared.
      adapter_params: parameters of the LoRA step.
      base: what the step records about its base.
      where: what errors call the adapter.
    """
    if descriptions is None:
        log.warning(
            "%s: not compared with its base, which is quantized or loaded in a narrower dtype than %s",
            where,
            base.dtype,
        )
        return
    trained = storage.by_path(lora.base_params(adapter_params)).keys()
    if trained - descriptions.keys() or base_hash(descriptions, trained) != base.frozen:
        raise ValueError(
            f"{where}: it was trained on {base.path} as it was then, and this base has other "
            "parameters; restore that base, or name it"
        )


# --- in generation -------------------------------------------------------------------------------


def unroll(adapters: Mapping, config: ModelConfig, fused: bool, vision: bool) -> dict:
    """Returns stacked adapters in the generation layout of `language.unroll`.

    Args:
      adapters: the tree of stacked adapters.
      config: the model.
      fused: whether q, k, v and gate, up are fused.
      vision: whether the tower is unrolled as well (`vision.unroll`).
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
    """Fuses adapters: the a are concatenated, and each b gets columns of its own."""
    language = config.language
    q, k = language.q_width, language.kv_width
    inner = language.expert_size if language.num_experts else language.intermediate_size
    widths = {"q": q, "k": k, "v": k, "gate": inner, "up": inner}
    if "experts" in layers:
        layers = layers | {"experts": _fuse(layers["experts"], config)}
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
