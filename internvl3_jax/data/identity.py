"""What a run's samples are made of, as short texts that change with it: saved with every step,
compared when the run is resumed.

A stream of samples resumes by numbers alone, so with other rows, or rows in another order, it would
silently be another one.
"""

import hashlib
from collections.abc import Sequence

from internvl3_jax.config import DataConfig
from internvl3_jax.data.sources.files import read_bytes
from internvl3_jax.data.text.tokenizer import Tokenizer


class DataChanged(ValueError):
    """A run's data are no longer those that it began with; the message says which of them."""


def data_identity(config: DataConfig, sources: Sequence, tokenizer: Tokenizer) -> dict[str, str]:
    """Name of each thing that samples are made of -> text that changes when its content does.

    sources: of `open_sources`, in their order.
    """
    found = {"order of the sources": ", ".join(source.name for source in sources)}
    for source in sources:
        weight = f", weight {source.weight}" if config.source_weights == "given" else ""
        found[f"source {source.name!r} of {config.source}"] = f"{source.identity}{weight}"
    found[f"tokenizer {config.tokenizer}"] = _tokenizer(tokenizer)
    for name in ("exclude_file", "ref_logps_file"):
        if path := getattr(config, name):
            found[f"data.{name} {path}"] = _digest(read_bytes(path))
    return found


def check_identity(saved: dict[str, str], now: dict[str, str], step: int, accept: bool) -> None:
    """DataChanged unless both are equal; with `accept` it is printed in place of that."""
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
        f"since step {step} was saved, {texts}. Resumed, the run would see other batches than it was begun for: bring the data back, "
        f"begin a new run, or accept it with --config.accept_changed_data=true"
    )


def _tokenizer(tokenizer: Tokenizer) -> str:
    files = sorted(tokenizer.files().items())
    return _digest(
        b"".join(f"{name} {len(content)}\n".encode() + content for name, content in files)
    )


def _digest(content: bytes) -> str:
    return f"sha256 {hashlib.sha256(content).hexdigest()[:32]}"
