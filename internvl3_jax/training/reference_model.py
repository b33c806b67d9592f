"""The model that MPO compares its policy with: what the policy was when it began, and never
trained.
"""

import jax
import jax.numpy as jnp
import numpy as np

from internvl3_jax.checkpoints import checkpoint
from internvl3_jax.checkpoints.param_hash import tree_hash
from internvl3_jax.checkpoints.storage import by_path
from internvl3_jax.config import TrainConfig
from internvl3_jax.data.reference_table import ReferenceTable
from internvl3_jax.io.checkpoint_paths import resolve_checkpoint
from internvl3_jax.model import lora
from internvl3_jax.parallel.sharding import param_shardings
from internvl3_jax.training import mpo
from internvl3_jax.training.step import TrainState

# How far from its value at the start the preference part may be: in bfloat16 the policy's program,
# which also makes gradients, rounds in other places than the reference's.
_TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}


def check(config: TrainConfig) -> None:
    """ValueError if loss, data and start do not go together."""
    mpo.check(config.loss)
    is_mpo = config.loss.kind == "mpo"
    if is_mpo != config.data.pairs:
        raise ValueError(
            f"loss.kind is {config.loss.kind} and data.pairs {config.data.pairs}: pairs are what mpo takes, and all it takes"
        )
    if is_mpo and not (config.loss.ref_model or config.init_from):
        raise ValueError(
            "loss.kind is mpo and init_from is empty: name the checkpoint that the policy starts from and is compared with"
        )
    if (
        is_mpo
        and config.lora.init_from
        and not (config.loss.ref_model or config.data.ref_logps_file)
    ):
        raise ValueError(
            f"loss.kind is mpo and lora.init_from is {config.lora.init_from}: a policy that begins with trained adapters is not to be "
            f"compared with their base. Set loss.ref_model to {config.lora.init_from} too: a LoRA run opens merged"
        )


def load_reference(config: TrainConfig, mesh: jax.sharding.Mesh, state: TrainState) -> dict | None:
    """Its parameters, split over the mesh as the policy's; None where none are needed: there is no
    reference, its log-probabilities were computed beforehand, or it is the base that adapters are
    trained beside.
    """
    if config.data.ref_logps_file:
        _check_table(config, state)
    if not mpo.needs_model(config):
        return None
    name = config.loss.ref_model or config.init_from
    source = checkpoint.load(name, dtype=mpo.reference_dtype(config), mesh=mesh)
    if source.config.language != config.model.language:
        raise ValueError(
            f"{name} has another decoder than the configuration's: it cannot be the reference"
        )
    if jax.process_index() == 0:
        print(f"reference: {source.directory}, in {jax.tree.leaves(source.params)[0].dtype}")
    return jax.device_put(source.params, param_shardings(source.params, mesh))


def _check_table(config: TrainConfig, state: TrainState) -> None:
    """ValueError if the log-probabilities are of another model than the one that the run begins
    with.
    """
    table = ReferenceTable(config.data.ref_logps_file)
    if config.loss.ref_model:
        named = str(resolve_checkpoint(config.loss.ref_model))
        if named != table.made_of:
            raise ValueError(
                f"{config.data.ref_logps_file} was made of {table.made_of}, and loss.ref_model is {named}"
            )
        return
    if int(state.step) or config.lora.quantize != "none":
        return
    # What is trained whole beside adapters is in float32, of values in param_dtype.
    params = jax.tree.map(
        lambda leaf: leaf.astype(config.param_dtype), lora.base_params(state.params)
    )
    theirs, ours = table.hash, tree_hash(by_path(params))
    if theirs != ours:
        raise ValueError(
            f"{config.data.ref_logps_file} was made with other parameters ({theirs}) than those of "
            f"{config.init_from} in {config.param_dtype} ({ours}): make it again with this "
            f"configuration, or name its model as loss.ref_model"
        )


def check_start(config: TrainConfig, metrics: dict) -> None:
    """After a run's first update, whose policy was still the reference. ValueError if the losses
    say that it was not.
    """
    loss = config.loss
    if loss.kind != "mpo" or loss.ref_model or loss.drop_path or config.lora.dropout:
        return
    expected = mpo.at_start(loss)
    found = float(
        loss.preference_weight * np.asarray(metrics["loss_preference"])
        + loss.quality_weight * np.asarray(metrics["loss_quality"])
    )
    if not abs(found - expected) <= _TOLERANCE[jnp.dtype(config.compute_dtype).name] * max(
        1.0, expected
    ):
        raise ValueError(
            f"at the first step policy and reference are the same model, so the preference part is {expected:.6f}; it was {found:.6f}. Set "
            f"loss.ref_model_dtype to float32 if {config.init_from} is not stored in {config.compute_dtype}; if that does not mend it, "
            f"something changes the policy's forward pass"
        )
