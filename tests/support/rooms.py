"""The rooms of the package in their order, and what each of them may not import."""

# Each room (a module or folder of the package) imports only from itself and from rooms above it.
# `convert`, the configurations and the programs come last.
ROOMS = [
    "cli",
    "io",
    "model_config",
    "config",
    "sizes",
    "param_tree",
    "positions",
    "parallel",
    "data",
    "model",
    "checkpoints",
    "inference",
    "training",
    "reward",
    "evaluate",
    "fit",
    "serve",
    "parity",
]
# Host code: worker processes of the data pipeline import it, and none of them may start an
# accelerator.
WITHOUT_JAX = {
    "cli",
    "io",
    "model_config",
    "config",
    "sizes",
    "positions",
    "data",
    "parallel.host_flags",
}
WITHOUT_JAX |= {
    "checkpoints.fingerprint",
    "checkpoints.hf.config",
    "checkpoints.hf.fields",
    "checkpoints.hf.keys",
    "checkpoints.hf.language",
}
WITHOUT_JAX |= {
    "inference.answer_file",
    "inference.output_path",
    "inference.resumable",
    "inference.prompts",
    "inference.requests",
    "reward.answer_matching",
    "reward.expressions",
    "reward.matchers",
    "serve.answer_text",
    "serve.arguments",
    "serve.body",
    "serve.errors",
    "serve.fetch",
    "serve.files",
    "serve.grammar_fields",
    "serve.media",
    "training.settings",
}
WITHOUT_JAX |= {
    "evaluate.card",
    "evaluate.frames",
    "evaluate.loaders",
    "evaluate.marks",
    "evaluate.metrics",
    "evaluate.prompts",
    "evaluate.scorers",
    "evaluate.stored",
    "evaluate.tables",
    "evaluate.task",
    "evaluate.task_table",
}
# What compares another engine runs where jax is not installed.
WITHOUT_JAX |= {
    "parity.causes",
    "parity.check",
    "parity.command_engine",
    "parity.compare",
    "parity.folder",
    "parity.http_engine",
    "parity.tiny_config",
    "parity.transformers_engine",
}
JAX = {"chex", "flax", "jax", "jaxlib", "optax", "orbax"}
# Modules of model/ops/ that the models call; any other is a kernel, which ops/attention.py picks.
OPERATIONS = {"attention", "context_parallel", "linear", "norms", "quantize", "remat"}
OPERATIONS |= {"experts", "fused_decode", "rope", "tpu_cache_write"}
# Libraries that one room hides from the rest.
HIDDEN_IN = {
    "orbax": "checkpoints.storage",
    "orbax.checkpoint._src": "checkpoints.orbax_s3",
    "orbax.checkpoint._src.serialization": "checkpoints.orbax_slices",
    "grain": "data",
    "jax.experimental.pallas": "model.ops",
    "qwix": "model.ops",
}
# Modules that import a kit, which must be installed, and the name of the kit.
NEEDS_KIT = {
    "evaluate.kits.lmms_model": "lmms_eval",
    "evaluate.kits.vlmevalkit_model": "vlmeval",
}
# In tests/ and benchmarks/ only, and where the parity pack runs them.
PEERS = {"torch", "torchvision", "transformers", "accelerate", "peft"}
RUNS_PEERS = "parity.transformers_engine"
