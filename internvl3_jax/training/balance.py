"""The loss that balances experts (Fedus et al. 2021, Switch), over all layers as in transformers.

Axes: L layers, E experts.
"""

from collections.abc import Mapping

import jax
import numpy as np
from jaxtyping import Array, Float, Float32

from internvl3_jax.model.experts import STATISTICS


def statistics_of(state: Mapping) -> dict[str, Float32[Array, "L E"]]:
    """Returns "chosen" and "probability" of `experts.statistics` from the decoder's collections."""
    found = state[STATISTICS]["language"]["layers"]["experts"]
    return {name: values[0] for name, values in found.items()}


def balance_loss(
    chosen: Float[Array, "L E"], probability: Float[Array, "L E"], tokens: Float[Array, ""]
) -> Float32[Array, ""]:
    """Returns E * sum over experts of (share of tokens that chose it) * (mean probability).

    With even loads it is the number of experts of a token. Shares and means are over the tokens of
    all layers together. The gradient is that of the probabilities.

    Args:
      chosen: Tokens that chose each expert.
      probability: Sum over the tokens of the router's probability.
      tokens: Number of tokens.
    """
    layers, experts = chosen.shape
    shares = jax.lax.stop_gradient(chosen).sum(axis=0) / (layers * tokens)
    return experts * (shares * probability.sum(axis=0) / (layers * tokens)).sum()


def loads(chosen: Float[np.ndarray, "L E"]) -> dict[str, float]:
    """Returns the log's values of the experts' loads; 1 is an even load.

    expert_load/NUMBER is an expert's mean over layers. expert_load_min and expert_load_max are over
    the experts of all layers.
    """
    load = chosen / np.maximum(chosen.mean(axis=1, keepdims=True), 1e-30)
    values = {f"expert_load/{index}": float(mean) for index, mean in enumerate(load.mean(axis=0))}
    return {"expert_load_min": float(load.min()), "expert_load_max": float(load.max())} | values
