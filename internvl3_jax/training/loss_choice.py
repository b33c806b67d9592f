"""Chooses the loss of a run; objective.py has the signature that all of them share."""

from internvl3_jax.config import TrainConfig
from internvl3_jax.model.internvl import InternVL
from internvl3_jax.positions import rope_scaling
from internvl3_jax.training import mpo, vico
from internvl3_jax.training.flash_loss import RouterLoss, VicoLoss
from internvl3_jax.training.objective import MpoLoss, SftLoss


def make_loss(
    config: TrainConfig, model: InternVL, num_sources: int = 0, drop_path: bool = True
) -> SftLoss:
    """Returns the loss function that the configuration asks for.

    Args:
      num_sources: Number of data sources to report losses of; 0 reports none.
      drop_path: Whether the vision tower is trained, and so drops paths.
    """
    options = {
        "chunk": config.loss_chunk,
        "num_sources": num_sources,
        "scaling": rope_scaling(config.model.language, config.data.deltas),
        "adapters": config.lora,
        "drop_path": drop_path,
        "balance": config.loss.balance_weight,
    }
    if config.loss.kind == "sft":
        return SftLoss(model, **options)
    if config.loss.kind in ("vico", "router"):
        kind = VicoLoss if config.loss.kind == "vico" else RouterLoss
        return kind(model, **options, config=config.loss)
    # Drop path makes the policy differ from the reference model.
    options["drop_path"] &= config.loss.drop_path
    return MpoLoss(model, **options, config=config.loss, pairs=config.data.pairs_per_row)


def init_loss_state(config: TrainConfig) -> mpo.RewardShift | vico.RatioWindow | tuple:
    """Returns the loss state before the first update."""
    if config.loss.kind == "router":
        return vico.init_window(config.loss.router_window)
    return mpo.init_reward_shift() if config.loss.kind == "mpo" else ()
