"""InternVL3 in JAX: `load` a checkpoint, ask it with `Chat`, judge answers with `Critic`, or call
`checkpoint.model.apply({"params": checkpoint.params}, batch)`.

Names are imported on first use: `import internvl3_jax` does not import jax.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from internvl3_jax.checkpoints.checkpoint import Checkpoint, load, save_checkpoint
    from internvl3_jax.config import (
        CheckpointConfig,
        DataConfig,
        EvalConfig,
        LoggingConfig,
        LoraConfig,
        LossConfig,
        MeshConfig,
        OptimizerConfig,
        TrainConfig,
    )
    from internvl3_jax.data.batch import Batch, Prompt, make_prompt
    from internvl3_jax.data.media.given import Document, Video
    from internvl3_jax.inference.answer import Answer
    from internvl3_jax.inference.chat import Chat
    from internvl3_jax.inference.options import Options
    from internvl3_jax.model.internvl import InternVL
    from internvl3_jax.model_config import ModelConfig, ProcessorConfig
    from internvl3_jax.reward.best_of_n import Choice, best_of_many, best_of_n
    from internvl3_jax.reward.critic import Critic, CriticOptions, StepScores
    from internvl3_jax.sizes import SIZES

    __version__: str

__all__ = [
    "SIZES",
    "Answer",
    "Batch",
    "Chat",
    "Checkpoint",
    "CheckpointConfig",
    "Choice",
    "Critic",
    "CriticOptions",
    "DataConfig",
    "Document",
    "EvalConfig",
    "InternVL",
    "LoggingConfig",
    "LoraConfig",
    "LossConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "Options",
    "ProcessorConfig",
    "Prompt",
    "StepScores",
    "TrainConfig",
    "Video",
    "best_of_many",
    "best_of_n",
    "load",
    "make_prompt",
    "save_checkpoint",
]

_MODULES = {
    "checkpoints.checkpoint": ("Checkpoint", "load", "save_checkpoint"),
    "config": (
        "CheckpointConfig",
        "DataConfig",
        "EvalConfig",
        "LoggingConfig",
        "LoraConfig",
        "LossConfig",
        "MeshConfig",
        "OptimizerConfig",
        "TrainConfig",
    ),
    "data.batch": ("Batch", "Prompt", "make_prompt"),
    "data.media.given": ("Document", "Video"),
    "inference.answer": ("Answer",),
    "inference.chat": ("Chat",),
    "inference.options": ("Options",),
    "model.internvl": ("InternVL",),
    "model_config": ("ModelConfig", "ProcessorConfig"),
    "reward.best_of_n": ("Choice", "best_of_many", "best_of_n"),
    "reward.critic": ("Critic", "CriticOptions", "StepScores"),
    "sizes": ("SIZES",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


# Hidden from type checkers, which would take any name for one that exists.
if not TYPE_CHECKING:

    def __getattr__(name: str):
        if name in _MODULE_OF:
            module = importlib.import_module(f"internvl3_jax.{_MODULE_OF[name]}")
            return getattr(module, name)
        if name == "__version__":
            return _version()
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])


def _version() -> str:
    """Returns the version of pyproject.toml, as the installed package's metadata has it."""
    from importlib import metadata

    try:
        return metadata.version("internvl3-jax")
    except metadata.PackageNotFoundError:
        return "0+not.installed"
