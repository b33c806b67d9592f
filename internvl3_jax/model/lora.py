"""LoRA (Hu et al. 2021): low-rank adapters on top of frozen linear layers.

A linear layer with kernel W computes y = x @ W + scale * (x @ a @ b), of which only a and b are
trained. The adapters are a subtree "lora" of the parameters, which mirrors the paths of their
layers. a f32[in,R] is random and b f32[R,out] is zero, so a model starts as its base. Stacked
layers have stacked adapters, and experts one each.

    params["language"]["layers"]["q"]["kernel"]             [L,in,out], frozen, possibly quantized
    params["lora"]["language"]["layers"]["q"]["a"], ["b"]   [L,in,R], [L,R,out], trained

`variables` turns such a tree into the argument of `model.apply`. ops/linear.py adds the products;
W + a @ b is never materialized in training.
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
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from internvl3_jax.config import LoraConfig, TrainConfig
from internvl3_jax.model.ops.quantize import KINDS, dequantize, is_quantized, library, quantize
from internvl3_jax.param_tree import match_paths, path_name

SUBTREE = "lora"
# Layers that can have an adapter.
LINEAR = re.compile(r"(?:vision|language)/layers/(?:experts/)?\w+|projector/fc[12]")
_EXPERTS = re.compile(r"language/layers/experts/(gate|up|down)")
_ROUTER = "language/layers/experts/router/kernel"  # stays as it is: near ties decide


# --- configuration -------------------------------------------------------------------------------


def scale(config: LoraConfig) -> float:
    """Returns the factor of an adapter's output; rsLoRA (Kalajdzievski 2023) divides by sqrt(R)."""
    return config.alpha / (math.sqrt(config.rank) if config.rslora else config.rank)


def freeze_base(config: TrainConfig) -> TrainConfig:
    """Returns the config with all parameters frozen but the adapters and those of `lora.full`.

    Without LoRA (rank 0) the config is returned as it is.

    Raises:
      ValueError: A field of `config.lora` is invalid.
      ImportError: `lora.quantize` is nf4 and qwix is not installed.
    """
    settings = config.lora
    if not settings.rank:
        return config
    if settings.rank < 0:
        raise ValueError(f"lora.rank is {settings.rank}; it must be 0 (no adapters) or more")
    if not settings.targets:
        raise ValueError(
            "lora.targets is empty and lora.rank is above 0; name the layers that get adapters"
        )
    if not 0 <= settings.dropout < 1:
        raise ValueError(f"lora.dropout is {settings.dropout}; it must be at least 0 and below 1")
    if settings.quantize not in ("none", *KINDS):
        raise ValueError(
            f"lora.quantize is {settings.quantize!r}; it must be none, {' or '.join(KINDS)}"
        )
    if settings.quantize == "nf4":
        library()  # fails here rather than after the base has been read

    # One pattern for everything that is not trained. Applying it twice changes nothing.
    trained = "|".join([rf"{SUBTREE}/", *(f"(?:{pattern})$" for pattern in settings.full)])
    frozen = f"(?!{trained}).*"
    if frozen in config.optimizer.freeze:
        return config
    optimizer = dataclasses.replace(config.optimizer, freeze=(*config.optimizer.freeze, frozen))
    return dataclasses.replace(config, optimizer=optimizer)


def linear_layers(params: Mapping) -> dict[str, tuple[int, ...]]:
    """Returns path -> shape of the kernel, of every layer that can have an adapter.

    Shapes are [L,in,out], [L,E,in,out] of experts, or [in,out]. The tree must not be quantized.
    """
    kernels = {
        path.removesuffix("/kernel"): leaf
        for path, leaf in _flatten(params).items()
        if path.endswith("/kernel")
    }
    return {path: leaf.shape for path, leaf in kernels.items() if LINEAR.fullmatch(path)}


def targets(params: Mapping, config: LoraConfig) -> dict[str, tuple[int, ...]]:
    """Returns the layers that get an adapter, as `linear_layers`.

    Raises:
      ValueError: A pattern matches no layer, or two fields choose the same layer.
    """
    layers = linear_layers(params)
    chosen = {
        path
        for pattern in config.targets
        for path in match_paths(pattern, layers, "lora.targets", "linear layer")
    }
    if config.dropout and (experts := sorted(filter(_EXPERTS.fullmatch, chosen))):
        raise ValueError(
            f"lora.dropout is {config.dropout} and lora.targets matches {experts[0]}; adapters of "
            "experts have no dropout, so set lora.dropout to 0 or adapt other layers"
        )
    for pattern in config.full:
        paths = match_paths(pattern, _flatten(params), "lora.full")
        if both := sorted(chosen & {path.removesuffix("/kernel") for path in paths}):
            raise ValueError(
                f"lora.full: {pattern!r} trains all of {both[0]}, which lora.targets gives an "
                "adapter; name it in one of them"
            )
    return {path: shape for path, shape in layers.items() if path in chosen}


# --- initialization ------------------------------------------------------------------------------


def init(params: Mapping, config: LoraConfig, key: PRNGKeyArray) -> dict:
    """Returns new adapters: a uniform within 1 / sqrt(in), as in PEFT, and b zero.

    Args:
      params: Only the shapes are used.
      key: Folded with each layer's path, so other layers' adapters do not change a layer's own.
    """

    def init_adapter(path, shape):
        *layers, rows, columns = shape
        bound = rows**-0.5
        layer_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
        a = jax.random.uniform(layer_key, (*layers, rows, config.rank), jnp.float32, -bound, bound)
        return {"a": a, "b": jnp.zeros((*layers, config.rank, columns), jnp.float32)}

    shapes = targets(params, config)
    return _unflatten({path: init_adapter(path, shape) for path, shape in shapes.items()})


def prepare_base(params: Mapping, config: LoraConfig) -> dict:
    """Returns the base as LoRA trains on top of it: `prepare_base_leaf` of each leaf."""
    return _unflatten(
        {path: prepare_base_leaf(path, leaf, config) for path, leaf in _flatten(params).items()}
    )


def prepare_base_leaf(path: str, leaf: Array, config: LoraConfig) -> Array | dict[str, Array]:
    """Returns a leaf in float32 if `lora.full` trains it, else quantized if it is a layer's kernel.

    The stacked layers' kernels are nearly all of the parameters.
    """
    if any(re.fullmatch(pattern, path) for pattern in config.full):
        return leaf.astype(jnp.float32)
    is_matrix = path.endswith("/kernel") and "/layers/" in path and path != _ROUTER
    if config.quantize != "none" and is_matrix:
        return _quantize(leaf, config.quantize)
    return leaf


_quantize = jax.jit(quantize, static_argnums=1)


# --- application ----------------------------------------------------------------------------------


def variables(params: Mapping, config: LoraConfig | None = None, training: bool = False) -> dict:
    """Returns the variables for `model.apply`, of a tree with or without adapters.

    Args:
      params: A tree; without the subtree "lora" the model is the base.
      config: None for adapters that are already `scaled`.
      training: Drop the adapters' inputs by `config.dropout`, with the rng "dropout".
    """
    base = base_params(params)
    if SUBTREE not in params:
        return {"params": base}
    adapters = params[SUBTREE] if config is None else scaled(params[SUBTREE], config)
    if training and config.dropout:
        adapters = map_adapters(
            lambda adapter: adapter | {"rate": jnp.full(adapter["a"].shape[:-2], config.dropout)},
            adapters,
        )
    return {"params": base, SUBTREE: adapters}


def base_params(params: Mapping) -> dict:
    """Returns the tree without its adapters."""
    return {name: subtree for name, subtree in params.items() if name != SUBTREE}


def scaled(adapters: Mapping, config: LoraConfig) -> dict:
    """Multiplies the scale into each b, so that the config is no longer needed."""
    return map_adapters(lambda adapter: adapter | {"b": adapter["b"] * scale(config)}, adapters)


def unscaled(adapters: Mapping, config: LoraConfig) -> dict:
    """Divides each b by the scale; the inverse of `scaled`."""
    return map_adapters(lambda adapter: adapter | {"b": adapter["b"] / scale(config)}, adapters)


def merged(
    params: Mapping, config: LoraConfig | None = None, dtype: DTypeLike | None = None
) -> dict:
    """Merges the adapters into an ordinary tree that computes the same.

    W + scale * a @ b is summed in float32 and rounded once. Quantized kernels are dequantized.

    Args:
      config: None for adapters that are already `scaled`.
      dtype: Of all leaves; None keeps that of each leaf, and float32 for quantized ones.
    """
    adapters = _flatten(variables(params, config).get(SUBTREE, {}), is_leaf=_is_adapter)

    def merge(path, leaf):
        leaf_dtype = dtype or (jnp.float32 if is_quantized(leaf) else leaf.dtype)
        adapter = adapters.get(path.removesuffix("/kernel"))
        if adapter is None and not is_quantized(leaf):
            return leaf.astype(leaf_dtype)
        return merged_leaf(leaf, adapter, jnp.dtype(leaf_dtype))

    base = _flatten(base_params(params), is_leaf=is_quantized)
    return _unflatten({path: merge(path, leaf) for path, leaf in base.items()})


@functools.partial(jax.jit, static_argnums=2)
def merged_leaf(
    kernel: Float[Array, "*L d_in d_out"] | Mapping[str, Array],
    adapter: Mapping[str, Array] | None,
    dtype: DTypeLike,
) -> Float[Array, "*L d_in d_out"]:
    """Returns kernel + a @ b in `dtype`, of a kernel that may be quantized and a scaled adapter."""

    def merge_layer(kernel, adapter):
        total = dequantize(kernel, jnp.float32)
        if adapter is not None:
            total = total + jnp.matmul(adapter["a"], adapter["b"], precision="highest")
        return total.astype(dtype)

    def merge(kernel, adapter):
        if jax.tree.leaves(kernel)[0].ndim == 2:
            return merge_layer(kernel, adapter)
        return jax.lax.map(lambda pair: merge(*pair), (kernel, adapter))

    return merge(kernel, adapter)


def expected_zero_grads(trainable: Mapping) -> list:
    """Returns for each leaf, in order, whether its gradient must be zero (bool or bool[]).

    The gradient of an adapter's a is zero as long as its b is zero.
    """
    leaves = _flatten(trainable)

    def is_expected(path):
        layer, _, name = path.rpartition("/")
        if not path.startswith(f"{SUBTREE}/") or name != "a":
            return False
        return (leaves[f"{layer}/b"] == 0).all()

    return [is_expected(path_name(path)) for path, _ in jax.tree.leaves_with_path(trainable)]


# --- trees ---------------------------------------------------------------------------------------


def _is_adapter(node) -> bool:
    return isinstance(node, Mapping) and "a" in node


def map_adapters(function: Callable, adapters: Mapping) -> dict:
    """Returns the tree with `function` applied to each layer's adapter, a mapping."""
    return jax.tree.map(function, adapters, is_leaf=_is_adapter)


def flat_adapters(adapters: Mapping) -> dict[str, dict]:
    """Returns path -> adapter of each layer."""
    return _flatten(adapters, is_leaf=_is_adapter)


def nested_adapters(adapters: Mapping[str, dict]) -> dict:
    """Returns the tree of what `flat_adapters` returns."""
    return _unflatten(adapters)


def _flatten(tree: Mapping, is_leaf: Callable = lambda node: False) -> dict:
    return flatten_dict(dict(tree), sep="/", is_leaf=lambda path, node: is_leaf(node))


def _unflatten(leaves: Mapping) -> dict:
    return unflatten_dict(dict(leaves), sep="/")
