"""InternVL3 in JAX: `load` a checkpoint, talk to it with `Chat`, judge answers with `Critic`, or
use `Checkpoint.model` and `.params`.
"""

import importlib

_PUBLIC = {
    "Answer": "inference.chat",
    "Chat": "inference.chat",
    "Checkpoint": "checkpoints.checkpoint",
    "Critic": "reward.critic",
    "load": "checkpoints.checkpoint",
}
__all__ = ["Answer", "Chat", "Checkpoint", "Critic", "load"]


def __getattr__(name: str):
    # On first use, so that the numpy side (data workers, the token calculator) starts without jax.
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"internvl3_jax.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
