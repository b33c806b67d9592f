"""What the backward pass of a layer recomputes instead of keeping (Chen et al. 2016), by name.

Layers mark their intermediates with `keep`; a policy says which of them stay in memory between the
two passes. The residual stream between the layers stays, in any case but the last.

    none       all: fastest, and the most memory
    dots       products with weights; elementwise operations, norms and attention's scores are recomputed
    attention  what goes into attention and comes out of it; the products around it and the MLP are
    recomputed full       nothing: one more forward pass, and the least memory of the device's alone
    offload    as full, and the residual stream between the layers waits in the host's memory
"""

import flax.linen as nn
import jax
from jax import ad_checkpoint

_POLICIES = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names(
        "attention_input", "attention_output"
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
# that need nothing of the host
ON_DEVICE = tuple(policy for policy in POLICIES if policy != "offload")


def checkpoint_name(x, name: str):
    """Marks x for the policies that keep it: "attention_input", "attention_output", or "stream"
    where a layer begins. No operation.
    """
    return ad_checkpoint.checkpoint_name(x, name)


def remat(
    layer: type[nn.Module], policy: str, unroll: int, static_argnums: tuple[int, ...] = ()
) -> type[nn.Module]:
    """The layer's class, so that the scan over it keeps what `policy` says.

    `unroll` layers per step of the scan: with more than one, the compiler must be kept from merging
    the second forward pass with the first. `static_argnums` counts self as 0. Raises ValueError at
    an unknown policy.
    """
    if policy not in _POLICIES:
        raise ValueError(f"remat policy {policy!r} is not one of {', '.join(POLICIES)}")
    if policy == "none":
        return layer
    return nn.remat(
        layer, policy=_POLICIES[policy], prevent_cse=unroll > 1, static_argnums=static_argnums
    )
