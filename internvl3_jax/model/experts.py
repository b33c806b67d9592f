"""A mixture of experts in place of a decoder layer's MLP (Qwen3).

Each token takes part in the MLPs of the experts that its router chose. No token is dropped, and
none waits for others: its output does not depend on the rest of the batch (ops/experts.py).

Over a mesh tokens stay on their devices:

    training, prefill   kernels are sharded as other matrices (width over context and fsdp, columns
                        over tensor), and a layer's are all-gathered over context and fsdp
    decoding            kernels stay, every device multiplies its shard of the chosen experts, and
                        the products, which are small, are summed

Axes: E experts, A of a token, I width of an expert.
"""

import functools
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from internvl3_jax.config import LanguageConfig
from internvl3_jax.model.ops.context_parallel import dividing
from internvl3_jax.model.ops.experts import combine, dispatch, group, product, route
from internvl3_jax.model.ops.linear import Dense, is_decoding
from internvl3_jax.model.ops.quantize import is_quantized
from internvl3_jax.parallel.collectives import axis_size, stored_spec
from internvl3_jax.parallel.sharding import BATCH_AXES

# The collection of the router's statistics, which a loss that balances experts asks for.
STATISTICS = "router"


class Experts(nn.Module):
    """Router and experts.

    Attributes:
      fused: gate and up are one kernel.
    """

    config: LanguageConfig
    dtype: DTypeLike
    fused: bool

    def setup(self):
        config = self.config
        # In float32, as its softmax: near ties decide which experts a token has.
        self.router = Dense(config.num_experts, use_bias=False, dtype=jnp.float32)
        kernel = functools.partial(ExpertKernel, config.num_experts)
        width, inner = config.hidden_size, config.expert_size
        if self.fused:
            self.gate_up = kernel(width, 2 * inner)
        else:
            self.gate, self.up = kernel(width, inner), kernel(width, inner)
        self.down = kernel(inner, width)

    def __call__(
        self, x: Float[Array, "B T D"], segments: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T D"]:
        """Returns the weighted sum of the chosen experts' MLPs.

        Args:
          segments: Sample of each token; 0 is padding, which the statistics leave out.
        """
        logits = self.router(x)
        self.sow("intermediates", "router_logits", logits)
        names = ("gate_up", "down") if self.fused else ("gate", "up", "down")
        kernels = {name: getattr(self, name)() for name in names}
        counts = self.is_mutable_collection(STATISTICS)
        y, found = _over_mesh(
            self.config, x.astype(self.dtype), logits, segments if counts else None, kernels, counts
        )
        for name, value in found.items():
            self.sow(STATISTICS, name, value)
        return y


class ExpertKernel(nn.Module):
    """Holds a kernel of all experts [E,in,out], and its adapter, if the collection "lora" has one.

    A call returns {name: (leaf, its PartitionSpec)}: "kernel", or "kernel/int8" and
    "kernel/scales" and the like of a quantized one; "a" [E,in,R] and "b" [E,R,out].
    """

    num_experts: int
    width: int
    features: int

    @nn.compact
    def __call__(self) -> dict[str, tuple[Array, jax.P]]:
        # A quantized kernel is a subtree, which `self.param` would not accept.
        stored = (
            self.get_variable("params", "kernel") if self.has_variable("params", "kernel") else None
        )
        if is_quantized(stored):
            leaves = {f"kernel/{name}": leaf for name, leaf in stored.items()}
        else:
            shape = (self.num_experts, self.width, self.features)
            init = nn.initializers.lecun_normal(batch_axis=(0,))
            leaves = {"kernel": self.param("kernel", init, shape)}
        paths = {name: "/".join((*self.path, name)) for name in leaves}
        if self.has_variable("lora", "a"):
            leaves |= {name: self.get_variable("lora", name) for name in "ab"}
            paths |= {name: "/".join(("lora", *self.path, name)) for name in "ab"}
        return {name: (leaf, stored_spec(paths[name], leaf.shape)) for name, leaf in leaves.items()}


def statistics(logits, chosen, segments) -> dict[str, Array]:
    """Returns the sums over real tokens of what balances experts, f32[E]: "chosen", how many tokens
    chose each, and "probability", the router's.
    """
    experts = jnp.arange(logits.shape[-1], dtype=jnp.int32)
    is_chosen = (chosen[..., None] == experts[None, None, None]).sum(axis=2)
    probability = jax.nn.softmax(logits)
    if segments is not None:
        real = (segments > 0)[..., None]
        is_chosen, probability = is_chosen * real, probability * real
    return {
        "chosen": is_chosen.sum(axis=(0, 1)).astype(jnp.float32),
        "probability": probability.sum(axis=(0, 1)),
    }


# --- the experts' MLPs ---------------------------------------------------------------------------


def _over_mesh(config: LanguageConfig, x, logits, segments, kernels: Mapping, counts: bool):
    """Calls `_mlp` on the tokens of each device, or once where there is no mesh.

    Tokens are routed there, too: the compiler would gather all logits for it.

    Returns:
      The experts' output, and the `statistics` if `counts`, else {}.
    """
    leaves, specs = (
        {
            name: {leaf: pair[index] for leaf, pair in kernel.items()}
            for name, kernel in kernels.items()
        }
        for index in (0, 1)
    )
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or mesh.manual_axes:
        routed = route(logits, config.experts_per_token, config.normalize_experts)
        found = statistics(logits, routed[1], segments) if counts else {}
        return _mlp(x, *routed, leaves, config.num_experts), found

    # Decoding: rows over slice and data, the width over the axes that shard the kernels'.
    decoding = is_decoding(x) and "kernel/nf4" not in leaves["down"]
    width, scatter = None, x.shape[1] % axis_size("context", "tensor") == 0
    if decoding:
        rows, tokens = dividing(x.shape[0], ("slice", "data")), None
        width = next(spec for name, spec in specs["down"].items() if name != "kernel/scales")[-1]
        inside = functools.partial(_mlp, sums=(width, "tensor"))
        out = jax.P(rows, None, width)
    else:
        rows, tokens = dividing(x.shape[0], BATCH_AXES), dividing(x.shape[1], ("context",))
        inside = functools.partial(_gathered_mlp, specs, scatter)
        out = jax.P(rows, (*(tokens or ()), "tensor") if scatter else tokens)
    place = jax.P(rows, tokens)

    def on_device(x, logits, segments, leaves):
        routed = route(logits, config.experts_per_token, config.normalize_experts)
        found = statistics(logits, routed[1], segments) if counts else {}
        found = jax.tree.map(lambda y: _summed(y, (*(rows or ()), *(tokens or ()))), found)
        return inside(x, *routed, leaves, config.num_experts), found

    return jax.shard_map(
        on_device,
        in_specs=(jax.P(rows, tokens, width), place, place, specs),
        out_specs=(out, jax.P()),
        check_vma=False,
    )(x, logits, segments, leaves)


def _gathered_mlp(specs, scatter: bool, x, weights, chosen, leaves, num_experts: int):
    """All-gathers the kernels' widths and returns `_mlp`, its tokens scattered over tensor."""

    def gather(leaf, spec):
        for axis, names in enumerate(spec):
            if names not in (None, "tensor") and (names := _several(names)):
                leaf = jax.lax.all_gather(leaf, names, axis=axis, tiled=True)
        return leaf

    # Cast first: half as many bytes are communicated.
    leaves = {
        name: {
            key: gather(_cast(key, leaf, x.dtype), specs[name][key]) for key, leaf in kernel.items()
        }
        for name, kernel in leaves.items()
    }
    y = _mlp(x, weights, chosen, leaves, num_experts)
    if scatter and axis_size("tensor") > 1:
        return jax.lax.psum_scatter(y, "tensor", scatter_dimension=1, tiled=True)
    return _summed(y, "tensor")


def _mlp(x, weights, chosen, leaves: Mapping, num_experts: int, sums: tuple = (None, None)):
    """Returns the experts' output of [B,T,D] tokens on one device.

    Args:
      sums: Mesh axes over which the products with the width and with the columns are summed.
    """

    def linear(rows, kernel):
        y = product(rows, _kernel(kernel, x.dtype), groups)
        if "a" in kernel:
            inner = product(rows, kernel["a"].astype(x.dtype), groups)
            y = y + product(inner, kernel["b"].astype(x.dtype), groups)
        return y

    count = chosen.shape[-1]
    groups = group(chosen.reshape(-1, count), num_experts)
    rows = dispatch(x.reshape(-1, x.shape[-1]), groups, count)
    if "gate_up" in leaves:
        gate, up = jnp.split(_summed(linear(rows, leaves["gate_up"]), sums[0]), 2, axis=-1)
    else:
        gate, up = _summed(tuple(linear(rows, leaves[name]) for name in ("gate", "up")), sums[0])
    rows = linear(nn.silu(gate) * up, leaves["down"])
    y = combine(rows, weights.reshape(-1, count), groups)
    return _summed(y, sums[1]).reshape(x.shape)


def _kernel(leaves: Mapping, dtype: DTypeLike):
    """Returns a plain kernel in `dtype`, or the leaves of a quantized one."""
    if "kernel" in leaves:
        return leaves["kernel"]
    return {
        name.removeprefix("kernel/"): leaf
        for name, leaf in leaves.items()
        if name.startswith("kernel/")
    }


def _summed(y, axes: str | tuple[str, ...] | None):
    names = _several(axes)
    return jax.lax.psum(y, names) if names else y


def _several(axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Returns the axes along which there are several devices."""
    names = (axes,) if isinstance(axes, str) else axes or ()
    return tuple(name for name in names if axis_size(name) > 1)


def _cast(name: str, leaf: Array, dtype: DTypeLike) -> Array:
    return leaf if name.startswith("kernel/") else leaf.astype(dtype)
