"""LoRA (Hu et al. 2021): beside the frozen matrix W of a linear layer two narrow ones are trained,
y = x @ W + scale * (x @ a @ b).

The adapters are a subtree of the parameters, "lora", that mirrors the paths of their layers. a
f32[in,r] is drawn and b f32[r,out] is zero, so a model starts as its base; stacked layers have
stacked adapters.

    params["language"]["layers"]["q"]["kernel"]             [L,in,out], frozen; or in few bits (ops/quantize.py)
    params["lora"]["language"]["layers"]["q"]["a"], ["b"]   [L,in,r], [L,r,out], trained

`variables` makes of such a tree what `model.apply` takes; `ops/dense.py` adds the products, and W +
a @ b never exists in training.
"""

import dataclasses
import functools
import math
import re
import zlib
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from internvl3_jax.config import LoraConfig, TrainConfig
from internvl3_jax.model.ops.quantize import KINDS, dequantize, library, quantize
from internvl3_jax.param_tree import matching

SUBTREE = "lora"
# layers that can have an adapter
LINEAR = re.compile(r"(?:vision|language)/layers/\w+|projector/fc[12]")


# --- configuration -------------------------------------------------------------------------------


def scale(config: LoraConfig) -> float:
    """What an adapter's output is multiplied by."""
    return config.alpha / (math.sqrt(config.rank) if config.rslora else config.rank)


def freeze_base(config: TrainConfig) -> TrainConfig:
    """The configuration with everything frozen but adapters and what `lora.full` names; as it is
    without LoRA.

    Raises ValueError naming the field that makes no sense.
    """
    settings = config.lora
    if not settings.rank:
        return config
    if settings.rank < 0:
        raise ValueError(f"lora.rank is {settings.rank}; it must be 0 (no adapters) or more")
    if not settings.targets:
        raise ValueError(
            "lora.targets is empty and lora.rank above 0; name the layers that get adapters"
        )
    if not 0 <= settings.dropout < 1:
        raise ValueError(f"lora.dropout is {settings.dropout}; it must be at least 0 and below 1")
    if settings.quantize not in ("none", *KINDS):
        raise ValueError(
            f"lora.quantize is {settings.quantize!r}; it must be none, {' or '.join(KINDS)}"
        )
    if settings.quantize != "none":
        library()  # now rather than after the base has been read
    trained = "|".join([rf"{SUBTREE}/", *(f"(?:{pattern})$" for pattern in settings.full)])
    derived = f"(?!{trained}).*"
    if derived in config.optimizer.freeze:
        return config
    optimizer = dataclasses.replace(config.optimizer, freeze=(*config.optimizer.freeze, derived))
    return dataclasses.replace(config, optimizer=optimizer)


def linear_layers(params: Mapping) -> dict[str, tuple[int, ...]]:
    """Path of every layer that can have an adapter -> shape of its matrix, [L,in,out] or [in,out].
    Not of a quantized tree.
    """
    leaves = {
        path.removesuffix("/kernel"): leaf
        for path, leaf in _flat(params).items()
        if path.endswith("/kernel")
    }
    return {path: leaf.shape for path, leaf in leaves.items() if LINEAR.fullmatch(path)}


def targets(params: Mapping, config: LoraConfig) -> dict[str, tuple[int, ...]]:
    """The layers that get an adapter, as of `linear_layers`. ValueError naming a pattern that
    matches none.
    """
    layers = linear_layers(params)
    chosen = {
        path
        for pattern in config.targets
        for path in matching(pattern, layers, "lora.targets", "linear layer")
    }
    for pattern in config.full:
        whole = matching(pattern, _flat(params), "lora.full")
        if both := sorted(chosen & {path.removesuffix("/kernel") for path in whole}):
            raise ValueError(
                f"lora.full: {pattern!r} trains {both[0]} whole, which lora.targets gives an adapter; name it in one"
            )
    return {path: shape for path, shape in layers.items() if path in chosen}


# --- making --------------------------------------------------------------------------------------


def init(params: Mapping, config: LoraConfig, key) -> dict:
    """New adapters for parameters of which only the shapes are looked at: a as PEFT draws it,
    uniform within 1 / sqrt(in), b zero.
    """

    def one(path, shape):
        *layers, rows, columns = shape
        bound = rows**-0.5
        # By the layer's name: which other layers have adapters changes nothing.
        drawn = jax.random.uniform(
            _key(key, path), (*layers, rows, config.rank), jnp.float32, -bound, bound
        )
        return {"a": drawn, "b": jnp.zeros((*layers, config.rank, columns), jnp.float32)}

    return _nested({path: one(path, shape) for path, shape in targets(params, config).items()})


def _key(key, path: str):
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def prepare_base(params: Mapping, config: LoraConfig) -> dict:
    """The base as it is trained beside: each leaf as of `prepare_base_leaf`."""
    return _nested(
        {path: prepare_base_leaf(path, leaf, config) for path, leaf in _flat(params).items()}
    )


def prepare_base_leaf(path: str, leaf, config: LoraConfig):
    """A leaf in float32 if it is trained whole, and quantized if it is a matrix of the stacked
    layers, which are nearly all there is.
    """
    if any(re.fullmatch(pattern, path) for pattern in config.full):
        return leaf.astype(jnp.float32)
    if config.quantize != "none" and path.endswith("/kernel") and "/layers/" in path:
        return _quantize(leaf, config.quantize)
    return leaf


_quantize = jax.jit(quantize, static_argnums=1)


# --- using ---------------------------------------------------------------------------------------


def variables(params: Mapping, config: LoraConfig | None = None, training: bool = False) -> dict:
    """What `model.apply` takes, of a tree with or without adapters. Without the subtree "lora" in
    it the model is the base.

    config: None for adapters that `scaled` has made ready. training: drops the adapters' inputs by
        `dropout`, with the rng "dropout".
    """
    base = base_params(params)
    if SUBTREE not in params:
        return {"params": base}
    adapters = params[SUBTREE] if config is None else scaled(params[SUBTREE], config)
    if training and config.dropout:
        adapters = _each(
            lambda adapter: adapter | {"rate": jnp.full(adapter["a"].shape[:-2], config.dropout)},
            adapters,
        )
    return {"params": base, SUBTREE: adapters}


def base_params(params: Mapping) -> dict:
    """The base alone."""
    return {name: part for name, part in params.items() if name != SUBTREE}


def scaled(adapters: Mapping, config: LoraConfig) -> dict:
    """Adapters whose b has the scale in it, so that nothing more need be known of them."""
    return _each(lambda adapter: adapter | {"b": adapter["b"] * scale(config)}, adapters)


def unscaled(adapters: Mapping, config: LoraConfig) -> dict:
    """The inverse of `scaled`."""
    return _each(lambda adapter: adapter | {"b": adapter["b"] / scale(config)}, adapters)


def merged(params: Mapping, config: LoraConfig | None = None, dtype=None) -> dict:
    """An ordinary tree that computes the same: W + scale * a @ b, summed in float32 and rounded
    once; nothing is quantized any more.

    dtype: of all of it; None keeps each leaf's, and takes float32 for what was quantized.
    """
    adapters = variables(params, config).get(SUBTREE, {})
    base = _flat(base_params(params), keep=_is_kernel)

    def one(path, leaf):
        kind = dtype or (jnp.float32 if isinstance(leaf, Mapping) else leaf.dtype)
        adapter = _flat(adapters, keep=_is_adapter).get(path.removesuffix("/kernel"))
        if adapter is None and not isinstance(leaf, Mapping):
            return leaf.astype(kind)
        return merged_leaf(leaf, adapter, jnp.dtype(kind))

    return _nested({path: one(path, leaf) for path, leaf in base.items()})


@functools.partial(jax.jit, static_argnums=2)
def merged_leaf(kernel, adapter, dtype):
    """A kernel, quantized or not, and its scaled adapter, or None, as one matrix."""

    def layer(kernel, adapter):
        total = dequantize(kernel, jnp.float32)
        if adapter is not None:
            total = total + jnp.matmul(adapter["a"], adapter["b"], precision="highest")
        return total.astype(dtype)

    if jax.tree.leaves(kernel)[0].ndim == 2:
        return layer(kernel, adapter)
    return jax.lax.map(lambda pair: layer(*pair), (kernel, adapter))


def expected_zero_grads(trained: Mapping) -> list:
    """Of each leaf, in order, whether its gradient must be zero: it is an adapter's a, and its b is
    still zero. bool or bool[]
    """
    leaves = _flat(trained)

    def one(path):
        start, _, name = path.rpartition("/")
        return (
            (leaves[f"{start}/b"] == 0).all()
            if path.startswith(f"{SUBTREE}/") and name == "a"
            else False
        )

    return [
        one(jax.tree_util.keystr(path, simple=True, separator="/"))
        for path, _ in jax.tree.leaves_with_path(trained)
    ]


# --- trees ---------------------------------------------------------------------------------------


def _is_adapter(node) -> bool:
    return isinstance(node, Mapping) and "a" in node


def _is_kernel(node) -> bool:
    return isinstance(node, Mapping) and any(kind in node for kind in KINDS)


def _each(function: Callable, adapters: Mapping) -> dict:
    return jax.tree.map(function, adapters, is_leaf=_is_adapter)


def _flat(tree: Mapping, keep: Callable = lambda node: False) -> dict:
    return flatten_dict(dict(tree), sep="/", is_leaf=lambda path, node: keep(node))


def _nested(leaves: Mapping) -> dict:
    return unflatten_dict(dict(leaves), sep="/")
