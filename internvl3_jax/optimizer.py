"""AdamW or Muon and their schedule, from an OptimizerConfig."""

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon

from internvl3_jax.config import OptimizerConfig


def make_schedule(config: OptimizerConfig, steps: int, peak: float) -> optax.Schedule:
    """Linear warm-up from 0, then cosine to `final_fraction` of the peak at the last step."""
    if not 0 <= config.warmup_steps < steps:
        raise ValueError(f"optimizer.warmup_steps is {config.warmup_steps}; it must lie between 0 and steps ({steps})")
    return optax.warmup_cosine_decay_schedule(0.0, peak, config.warmup_steps, steps, peak * config.final_fraction)


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    schedule = make_schedule(config, steps, config.learning_rate)
    adam = {"adam_b1": config.beta1, "adam_b2": config.beta2, "adam_weight_decay": config.weight_decay}
    if config.name == "adamw":
        update = optax.adamw(schedule, config.beta1, config.beta2, weight_decay=config.weight_decay)
    elif config.name == "muon":
        update = muon(
            make_schedule(config, steps, config.muon_learning_rate),
            weight_decay=config.weight_decay,
            adam_learning_rate=schedule,
            muon_weight_dimension_numbers=_stacked_matrices,
            **adam,
        )
    else:
        raise ValueError(f"optimizer.name is {config.name!r}; it must be adamw or muon")
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), update)


def _stacked_matrices(params):
    """Muon takes the layers' matrices [L,in,out], one by one; everything else is left to AdamW (Jordan et al. 2024)."""
    return jax.tree.map(lambda leaf: MuonDimensionNumbers(1, 2) if leaf.ndim == 3 else None, params)
