"""Rematerialization (Chen et al. 2016): what a layer's backward pass recomputes instead of keeping.

Layers name their intermediates with `checkpoint_name`. A policy says which of them stay in memory
between the two passes. All but "offload" also keep the residual stream between the layers.

    none       keeps everything: fastest, most memory
    dots       keeps products with weights, the stream after attention and cuDNN's attention;
               recomputes elementwise operations, norms and other attention
    attention  keeps attention's inputs and output; recomputes the other products and the MLP
    full       keeps nothing: one more forward pass, least device memory without offloading
    offload    as full; the residual stream between the layers waits in the host's memory
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
from jax import ad_checkpoint
from jaxtyping import Array, Shaped


def _is_cudnn_attention(primitive, *_, **__) -> bool:
    """Keeps, as a policy, the outputs of cuDNN's forward kernel, with its sums for the gradient.

    jax gives those sums no name, and without them the kernel would run again. The kernel's output
    has no name either: what is named after it would be kept as well.
    """
    return primitive.name.startswith("dot_product_attention_fwd")


def _any(*policies: Callable) -> Callable:
    """Returns the policy that keeps what one of the policies keeps."""
    return functools.reduce(jax.checkpoint_policies.save_from_both_policies, policies)


_POLICIES = {
    "none": None,
    "dots": _any(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        # Products with their biases. Without the names the bare products would be kept, which the
        # backward pass adds the biases to again, and which the forward pass has to write, too.
        jax.checkpoint_policies.save_only_these_names("product", "attended"),
        _is_cudnn_attention,
    ),
    "attention": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.save_only_these_names("attention_input", "attention_output"),
        _is_cudnn_attention,
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["stream"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}
POLICIES = tuple(_POLICIES)
# Policies that do not use the host's memory.
ON_DEVICE = tuple(policy for policy in POLICIES if policy != "offload")


def recomputes_attention(policy: str, tpu: bool) -> bool:
    """Returns whether the backward pass runs attention's fused forward kernel again."""
    return policy in ("full", "offload") or (policy == "dots" and tpu)


def checkpoint_name(x: Shaped[Array, "*shape"], name: str) -> Shaped[Array, "*shape"]:
    """Names x for the policies; no operation.

    Args:
      name: "stream" at the start of a layer, "attended" after attention was added to it,
          "attention_input", "attention_output", or "product" of a linear layer.
    """
    return ad_checkpoint.checkpoint_name(x, name)


def remat(
    layer: type[nn.Module], policy: str, unroll: int, static_argnums: tuple[int, ...] = ()
) -> type[nn.Module]:
    """Returns the layer class for a scan that keeps what `policy` says.

    Args:
      policy: One of POLICIES.
      unroll: Layers per step of the scan. With more than one, the compiler must be kept from
          merging the second forward pass with the first.
      static_argnums: Static arguments of the layer's call, self being 0.

    Raises:
      ValueError: The policy is unknown.
    """
    if policy not in _POLICIES:
        raise ValueError(f"remat policy {policy!r} is not one of {', '.join(POLICIES)}")
    if policy == "none":
        return layer
    return nn.remat(
        layer, policy=_POLICIES[policy], prevent_cse=unroll > 1, static_argnums=static_argnums
    )
