"""The reference model of MPO and ViCO: the policy's initial weights, which are not trained."""

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

# Largest relative difference of the preference and quality losses from their value at the start. In
# bfloat16 the policy's program, which also makes gradients, rounds differently from the reference
# model's.
_TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}


def check(config: TrainConfig) -> None:
    """Raises ValueError if loss, data and initial weights do not fit together."""
    mpo.check(config.loss)
    is_mpo = config.loss.kind == "mpo"
    if is_mpo != config.data.pairs:
        raise ValueError(
            f"loss.kind is {config.loss.kind} and data.pairs is {config.data.pairs}; "
            f"mpo takes pairs, and pairs are only for mpo"
        )
    if config.loss.kind != "sft" and not (config.loss.ref_model or config.init_from):
        raise ValueError(
            f"loss.kind is {config.loss.kind} and init_from is empty; name the checkpoint that the "
            "policy starts from, which is also the reference model"
        )
    has_reference = config.loss.ref_model or config.data.ref_logps_file
    if is_mpo and config.lora.init_from and not has_reference:
        raise ValueError(
            f"loss.kind is mpo and lora.init_from is {config.lora.init_from}: a policy that starts "
            f"from trained adapters needs them in its reference model. Set loss.ref_model to "
            f"{config.lora.init_from} too; a LoRA run opens merged"
        )


def load_reference(config: TrainConfig, mesh: jax.sharding.Mesh, state: TrainState) -> dict | None:
    """Returns the reference model's parameters, sharded as the policy's.

    None if the train step needs none: there is no reference model, its log-probabilities were
    computed beforehand, or it is the frozen base of LoRA adapters.

    Raises:
      ValueError: The log-probabilities or the model do not belong to this run.
    """
    if config.data.ref_logps_file:
        _check_table(config, state)
    if not mpo.needs_model(config):
        return None
    name = config.loss.ref_model or config.init_from
    source = checkpoint.load(name, dtype=mpo.reference_dtype(config), mesh=mesh)
    checkpoint.check_not_quantized(source, "a reference model")
    if source.config.language != config.model.language:
        raise ValueError(
            f"{name} has another decoder than the configuration; it cannot be the reference model"
        )
    if jax.process_index() == 0:
        dtype = jax.tree.leaves(source.params)[0].dtype
        print(f"reference model: {source.directory}, in {dtype}", flush=True)
    return jax.device_put(source.params, param_shardings(source.params, mesh))


def _check_table(config: TrainConfig, state: TrainState) -> None:
    """Raises ValueError if the log-probabilities are of another model than the run starts from."""
    table = ReferenceTable(config.data.ref_logps_file)
    if config.loss.ref_model:
        named = str(resolve_checkpoint(config.loss.ref_model))
        if named != table.made_of:
            raise ValueError(
                f"{config.data.ref_logps_file} was made with {table.made_of}, "
                f"and loss.ref_model is {named}"
            )
        return
    if int(state.step) or config.lora.quantize != "none":
        return
    # Parameters that are trained themselves are float32 copies of values in param_dtype.
    params = jax.tree.map(
        lambda leaf: leaf.astype(config.param_dtype), lora.base_params(state.params)
    )
    if table.hash != (own_hash := tree_hash(by_path(params))):
        raise ValueError(
            f"{config.data.ref_logps_file} was made with other parameters ({table.hash}) than "
            f"those of {config.init_from} in {config.param_dtype} ({own_hash}): make it again with "
            f"this configuration, or name its model as loss.ref_model"
        )


def check_start(config: TrainConfig, metrics: dict) -> None:
    """Checks the first update of an MPO run, in which policy and reference model are the same.

    Raises:
      ValueError: The preference and quality losses are not those of equal models.
    """
    loss = config.loss
    if loss.ref_model or loss.drop_path or config.lora.dropout:
        return
    expected = mpo.at_start(loss)
    measured = float(
        loss.preference_weight * np.asarray(metrics["loss_preference"])
        + loss.quality_weight * np.asarray(metrics["loss_quality"])
    )
    tolerance = _TOLERANCE[jnp.dtype(config.compute_dtype).name] * max(1.0, expected)
    if not abs(measured - expected) <= tolerance:
        raise ValueError(
            f"at the first step policy and reference model are equal, so that preference and "
            f"quality losses are {expected:.6f}; they are {measured:.6f}. Set "
            f"loss.ref_model_dtype to float32 if {config.init_from} is not stored in "
            f"{config.compute_dtype}; if that does not help, something changes the policy's "
            f"forward pass"
        )
