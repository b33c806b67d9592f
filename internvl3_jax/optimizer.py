"""AdamW and its schedule, from an OptimizerConfig."""

import optax

from internvl3_jax.config import OptimizerConfig


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up from 0, then cosine to `final_fraction` of the peak at the last step."""
    if not 0 <= config.warmup_steps < steps:
        raise ValueError(f"optimizer.warmup_steps is {config.warmup_steps}; it must lie between 0 and steps ({steps})")
    final = config.learning_rate * config.final_fraction
    return optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, config.warmup_steps, steps, final)


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    adamw = optax.adamw(make_schedule(config, steps), config.beta1, config.beta2, weight_decay=config.weight_decay)
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)
