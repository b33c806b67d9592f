"""Identifies the data of a run by short texts, saved with every step and compared when it resumes.

A stream of samples resumes by row numbers only, so that changed or reordered rows would silently
give other samples.
"""

import hashlib
from collections.abc import Sequence

from internvl3_jax.config import DataConfig
from internvl3_jax.data.sources.files import read_bytes
from internvl3_jax.data.text.tokenizer import Tokenizer


class DataChanged(ValueError):
    """The data of a run have changed since it began; the message says which."""


def data_identity(config: DataConfig, sources: Sequence, tokenizer: Tokenizer) -> dict[str, str]:
    """Returns a text for each input of the samples, by its name, that changes with its content.

    sources: Of `open_sources`, in their order.
    """
    identity = {"order of the sources": ", ".join(source.name for source in sources)}
    for source in sources:
        weight = f", weight {source.weight}" if config.source_weights == "given" else ""
        identity[f"source {source.name!r} of {config.source}"] = f"{source.identity}{weight}"
    identity[f"tokenizer {config.tokenizer}"] = _tokenizer(tokenizer)
    for name in ("exclude_file", "ref_logps_file"):
        if path := getattr(config, name):
            identity[f"data.{name} {path}"] = _digest(read_bytes(path))
    return identity


def check_identity(saved: dict[str, str], now: dict[str, str], step: int, accept: bool) -> None:
    """Raises DataChanged unless both are equal; with `accept` prints the difference instead."""
    changed = [name for name in saved | now if saved.get(name) != now.get(name)]
    if not changed:
        return
    texts = "; ".join(
        f"{name} has changed (was: {saved.get(name, 'absent')}; is: {now.get(name, 'absent')})"
        for name in changed
    )
    if accept:
        print(f"resuming from step {step} with other data: {texts}", flush=True)
        return
    raise DataChanged(
        f"since step {step} was saved, {texts}. The resumed run would see other batches: restore "
        f"the data, start a new run, or accept it with --config.accept_changed_data=true"
    )


def _tokenizer(tokenizer: Tokenizer) -> str:
    files = sorted(tokenizer.files().items())
    return _digest(
        b"".join(f"{name} {len(content)}\n".encode() + content for name, content in files)
    )


def _digest(content: bytes) -> str:
    return f"sha256 {hashlib.sha256(content).hexdigest()[:32]}"
