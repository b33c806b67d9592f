"""InternVL3 in JAX: `load` a checkpoint, talk to it with `Chat`, or use `Checkpoint.model` and `.params` directly."""

import importlib

_PUBLIC = {"Answer": "chat", "Chat": "chat", "Checkpoint": "checkpoint", "load": "checkpoint"}
__all__ = ["Answer", "Chat", "Checkpoint", "load"]


def __getattr__(name: str):
    # On first use, so that the numpy side (data workers, the token calculator) starts without jax.
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"internvl3_jax.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
