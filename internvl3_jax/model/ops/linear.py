"""Linear layers whose kernel may be sharded, quantized (quantize.py) and adapted (lora.py); the
output head; and the GELU between two layers.
"""

import functools
from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Shaped

from internvl3_jax.model.ops.quantize import (
    PER_COLUMN,
    dequantize,
    format_of,
    is_quantized,
    scale_columns,
    split_scales,
)
from internvl3_jax.model.ops.remat import checkpoint_name
from internvl3_jax.parallel.collectives import (
    all_gather_weight,
    axis_size,
    barrier_after,
    constrain,
    matmul_weight_stationary,
    platform,
)
from internvl3_jax.parallel.sharding import AXES, SHARDED_AXES

_CPU_BLOCK = 2**18  # values that a CPU converts at once: 1 MiB in float32


class Dense(nn.Module):
    """`flax.linen.Dense` with the same parameters, for kernels sharded as in parallel/sharding.py.

    FSDP-sharded kernels are cast, all-gathered just before use, and their gradients
    reduce-scattered. While decoding, kernels stay in place and activations move instead.

    If the collection "lora" has an adapter for the layer, {"a" [in,R], "b" [R,features]}, then
    x @ a @ b is added. "rate" f32[] in it is the dropout rate of the adapter's input. With "row"
    i32[B] in it, a is [N,in,R] and b [N,R,features], and row r of the batch has adapter row[r].

    Attributes:
      features: Width of the output.
      use_bias: Whether a bias is added.
      dtype: Compute dtype, of the output as well.
      splits: Above 1, the output is a tuple of that many equal parts of the width. On a GPU each
          part is a product of its own: splitting the product of all would copy it, and
          concatenating the gradients, too.
    """

    features: int
    use_bias: bool = True
    dtype: DTypeLike = jnp.float32
    splits: int = 1

    @nn.compact
    def __call__(
        self, x: Float[Array, "*rows d_in"], scale: Float[Array, " features"] | None = None
    ) -> Float[Array, "*rows features"] | tuple[Float[Array, "*rows part"], ...]:
        """Returns x @ kernel + bias, times `scale` if it is given.

        The kernel is scaled, not the output: the gradient of `scale` then needs no output, which
        rematerialization would have to compute again.
        """
        x = x.astype(self.dtype)
        # A quantized kernel is a subtree, which `self.param` would not accept.
        stored = (
            self.get_variable("params", "kernel") if self.has_variable("params", "kernel") else None
        )
        if isinstance(stored, Mapping):
            y = self._split(self._scaled(self._quantized(x, stored), scale))
        else:
            shape = (x.shape[-1], self.features)
            kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
            y = self._matmul(x, self._scaled(kernel, scale).astype(self.dtype))
        if self.has_variable("lora", "a"):
            y = [
                part + added
                for part, added in zip(
                    y, self._split(self._scaled(self._adapter(x), scale)), strict=True
                )
            ]
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
            bias = self._scaled(bias, scale).astype(self.dtype)
            bias = bias.reshape((1,) * (x.ndim - 1) + (-1,))
            y = [part + added for part, added in zip(y, self._split(bias), strict=True)]
        y = [checkpoint_name(part, "product") for part in y]
        return y[0] if self.splits == 1 else tuple(y)

    def _scaled(self, y, scale):
        if scale is None:
            return y
        return y * scale.astype(y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))

    def _split(self, y) -> list:
        return jnp.split(y, self.splits, axis=-1) if self.splits > 1 else [y]

    def _matmul(self, x, kernel) -> list:
        path = "/".join((*self.path, "kernel"))
        if is_decoding(x):
            return self._split(as_two_rows(matmul_weight_stationary, x, kernel, path))
        x, kernel = barrier_after(x, kernel, path)
        kernel = all_gather_weight(kernel, path)
        if platform() == "gpu":
            return [jnp.dot(x, part) for part in self._split(kernel)]
        return self._split(product_of_rows(x, kernel))

    def _quantized(self, x, kernel: Mapping):
        """Multiplies with a quantized kernel, which is communicated as it is stored.

        A kernel with one scale per column enters the product as it is stored, so that the compiler
        converts it where the product reads it. The backward pass converts it again instead of
        keeping it.
        """
        kind = format_of(kernel)
        path = "/".join((*self.path, "kernel", kind))
        if kind not in PER_COLUMN:
            leaves = {
                name: self._all_gather(leaf, f"kernel/{name}") for name, leaf in kernel.items()
            }
            dot = jax.checkpoint(lambda x, leaves: jnp.dot(x, dequantize(leaves, self.dtype)))
            return dot(x, leaves)
        values, scales = kernel[kind], kernel["scales"]
        if is_decoding(x):
            dot = functools.partial(matmul_weight_stationary, path=path, dtype=jnp.float32)
            return scale_columns(decoding_dot(dot, x, values), scales).astype(self.dtype)
        x, values = barrier_after(x, values, path)
        values, scales = all_gather_weight(values, path), self._all_gather(scales, "kernel/scales")
        return jax.checkpoint(scaled_dot)(x, values, scales)

    def _adapter(self, x):
        if self.has_variable("lora", "row"):
            return self._adapters_of_rows(x)
        a, b = (
            self._all_gather(self.get_variable("lora", name).astype(self.dtype), name, "lora")
            for name in "ab"
        )
        if self.has_variable("lora", "rate"):
            keep = 1.0 - self.get_variable("lora", "rate")
            is_kept = jax.random.bernoulli(self.make_rng("dropout"), keep, x.shape)
            x = jnp.where(is_kept, x / keep.astype(self.dtype), 0)
        return jnp.dot(jnp.dot(x, a), b)

    def _adapters_of_rows(self, x):
        row = self.get_variable("lora", "row")
        a, b = (self.get_variable("lora", name).astype(self.dtype)[row] for name in "ab")
        return jnp.einsum("btr,bro->bto", jnp.einsum("btd,bdr->btr", x, a), b)

    def _all_gather(self, leaf, name: str, *prefix: str):
        return all_gather_weight(leaf, "/".join((*prefix, *self.path, name)))


class Head(nn.Module):
    """Holds the output kernel [D,V]; a chunked loss takes the kernel itself."""

    width: int
    features: int

    @nn.compact
    def __call__(self) -> Float[Array, "D V"] | Mapping[str, Array]:
        # A quantized kernel is a subtree, which `self.param` would not accept.
        if self.has_variable("params", "kernel"):
            if is_quantized(stored := self.get_variable("params", "kernel")):
                return stored
        return self.param("kernel", nn.initializers.lecun_normal(), (self.width, self.features))


def head_logits(
    hidden: Float[Array, "B T D"],
    stored: Float[Array, "D V"] | Mapping[str, Array],
    dtype: DTypeLike,
) -> Float32[Array, "B T V"]:
    """Returns hidden times the stored kernel, computed in `dtype` and summed in float32."""
    kernel, scales = split_scales(stored)

    def head(hidden, kernel):
        return jnp.dot(hidden, kernel.astype(dtype), preferred_element_type=jnp.float32)

    if is_decoding(hidden):
        # Weight-stationary, as in `Dense`.
        hidden = constrain(hidden, ("slice", "data"), None, SHARDED_AXES)
        product = as_two_rows if scales is None else decoding_dot
        logits = product(head, hidden, kernel)
    else:
        logits = head(hidden, kernel)
    return logits if scales is None else scale_columns(logits, scales)


def gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Returns the exact GELU (Hendrycks and Gimpel 2016), computed in float32, in x's dtype.

    With erf, as torch computes it. `jax.nn.gelu` takes erfc, which XLA computes in a kernel of its
    own on GPUs.
    """
    wide = x.astype(jnp.float32)
    return (0.5 * wide * (1.0 + jax.lax.erf(wide * 0.5**0.5))).astype(x.dtype)


def product_of_rows(
    x: Float[Array, "*rows d_in"], kernel: Float[Array, "d_in d_out"]
) -> Float[Array, "*rows d_out"]:
    """Returns x @ kernel, on one CPU device as a product of matrices.

    The gradient of the kernel then sums over one axis. XLA's CPU compiler sums over several only
    after writing transposed copies of x and of the gradient. On a mesh the axes are sharded, and
    stay apart.
    """
    if platform() != "cpu" or axis_size(*AXES) > 1:
        return jnp.dot(x, kernel)
    return jnp.dot(x.reshape(-1, x.shape[-1]), kernel).reshape(*x.shape[:-1], kernel.shape[-1])


def scaled_dot(
    x: Float[Array, "*rows d_in"],
    values: Shaped[Array, "d_in d_out"],
    scales: Float[Array, "1 d_out"],
) -> Float[Array, "*rows d_out"]:
    """Returns (x @ values) * scales in x's dtype; the product is summed and scaled in float32."""
    product = jnp.dot(x, values.astype(x.dtype), preferred_element_type=jnp.float32)
    return scale_columns(product, scales).astype(x.dtype)


def decoding_dot(
    matmul: Callable, x: Float[Array, "B 1 d_in"], values: Shaped[Array, "d_in d_out"]
) -> Float32[Array, "B 1 d_out"]:
    """Returns matmul(x, values) of values in fewer bits, which are never converted as a whole.

    On accelerators the compiler converts them where the product reads them. On a CPU it would
    convert the kernels of all layers before the loop over tokens, and keep them; there blocks of
    rows that fit the caches are converted and multiplied, in a loop, which is also faster.
    """
    if platform() != "cpu" or axis_size(*AXES) > 1:
        return as_two_rows(matmul, x, values.astype(x.dtype))
    rows, columns = values.shape
    most = max(1, _CPU_BLOCK // columns)
    block = max(size for size in range(1, min(rows, most) + 1) if rows % size == 0)

    # Float8 is copied as bytes: XLA would widen all of it to slice it.
    is_int8 = values.dtype == jnp.int8
    stored = values if is_int8 else jax.lax.bitcast_convert_type(values, jnp.uint8)

    def add_block(index, total):
        part = jax.lax.dynamic_slice_in_dim(stored, index * block, block)
        part = part if is_int8 else jax.lax.bitcast_convert_type(part, values.dtype)
        part = part.astype(x.dtype)
        x_part = jax.lax.dynamic_slice_in_dim(x, index * block, block, axis=-1)
        return total + jnp.dot(x_part, part, preferred_element_type=jnp.float32)

    total = jnp.zeros((*x.shape[:-1], columns), jnp.float32)
    return jax.lax.fori_loop(0, rows // block, add_block, total)


def as_two_rows(matmul: Callable, x: Shaped[Array, "B 1 d_in"], *arguments):
    """Returns matmul(x, *arguments), of two equal rows if x has one and the devices are GPUs.

    XLA turns a product with one row into a multiplication and a sum, which reads small kernels at a
    fraction of the bandwidth. The barrier hides from it that the rows are equal.
    """
    if x.shape[0] > 1 or platform() != "gpu":
        return matmul(x, *arguments)
    rows = jax.lax.optimization_barrier(jnp.broadcast_to(x, (2, *x.shape[1:])))
    return matmul(rows, *arguments)[:1]


def is_decoding(x: Shaped[Array, "..."]) -> bool:
    """Returns whether x is [B,1,D], one token of each row.

    A kernel is then larger than everything it is multiplied with. All-gathering it would also hoist
    the gathers of all layers out of the loop over tokens.
    """
    return x.ndim == 3 and x.shape[1] == 1
