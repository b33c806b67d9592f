"""Names the model class to lmms-eval, which finds this module as an entry point."""

MODEL = "internvl3_jax"
CLASS = "internvl3_jax.evaluate.kits.lmms_model.InternVL3JAX"


def manifest():
    """Returns the manifest of the model; lmms-eval must be installed."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id=MODEL, chat_class_path=CLASS)
