"""Opens the source of a conversion: a checkpoint, a released model, a LoRA run, a PEFT adapter."""

import dataclasses
import os
import pathlib
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

from convert.converted import Converted, open_converted
from internvl3_jax.checkpoints import directories, storage
from internvl3_jax.checkpoints.adapters import Adapter, adapter, check_base, describe, read_adapter
from internvl3_jax.checkpoints.hf.assemble import DTYPES, ConversionError, cast
from internvl3_jax.checkpoints.hf.mapping import Row, active_rows
from internvl3_jax.checkpoints.hf.peft import read_peft
from internvl3_jax.checkpoints.hf.peft_settings import settings_of
from internvl3_jax.checkpoints.hf.peft_writer import write_peft
from internvl3_jax.checkpoints.hf.released import Hashes, Released, open_released
from internvl3_jax.checkpoints.hf.values import refuse_nonfinite
from internvl3_jax.checkpoints.manifest import Base, Manifest
from internvl3_jax.checkpoints.verification import undamaged
from internvl3_jax.config import LoraConfig, ModelConfig, ProcessorConfig
from internvl3_jax.data.text.tokenizer import Tokenizer
from internvl3_jax.io.checkpoint_paths import (
    PEFT,
    is_checkpoint,
    is_peft,
    resolve_checkpoint,
    resolve_hub_dir,
)
from internvl3_jax.model import lora


@dataclasses.dataclass
class Adapted:
    """A base with a merged adapter; each leaf is W + a @ b, summed in float32 and rounded once."""

    base_model: Released | Converted
    adapter: Adapter
    base: Base | None  # of a LoRA run
    processor: ProcessorConfig
    tokenizer: Tokenizer
    files: dict[str, bytes]
    target: np.dtype
    allow_nonfinite: bool = False
    hashes: dict[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        pairs, self.whole = storage.by_path(self.adapter.lora), storage.by_path(self.adapter.whole)
        layers = {path.rpartition("/")[0] for path in pairs}
        self.pairs = {
            layer: {"a": pairs[f"{layer}/a"], "b": pairs[f"{layer}/b"]} for layer in layers
        }

    @property
    def directory(self) -> pathlib.Path:
        return self.base_model.directory

    @property
    def config(self) -> ModelConfig:
        return self.base_model.config

    @property
    def dtype(self) -> str:
        return self.target.name

    def leaf(
        self, row: Row, hashes: Hashes | None = None, scratch: pathlib.Path | None = None
    ) -> np.ndarray:
        leaf = self._merged(row, scratch)
        if not self.allow_nonfinite:
            refuse_nonfinite([(f"{row.target} with its adapter", leaf)])
        leaf = leaf if leaf.dtype == self.target else cast(leaf, self.target, row.target)
        if hashes is not None:
            hashes.add_leaf(self.config, row, leaf)
        return leaf

    def layers(self, row: Row, hashes: Hashes | None = None) -> Iterator[np.ndarray]:
        return iter(self.leaf(row, hashes))

    def hash_leaf(self, row: Row, hashes: Hashes) -> None:
        self.leaf(row, hashes)

    def _merged(self, row: Row, scratch) -> np.ndarray:
        if row.target in self.whole:
            return np.asarray(self.whole[row.target])
        leaf, pair = (
            self.base_model.leaf(row, None, scratch),
            self.pairs.get(row.target.removesuffix("/kernel")),
        )
        if self.base is not None and self.base.lora.quantize != "none":
            # The adapter was trained on the quantized weight.
            leaf = lora.prepare_base_leaf(row.target, jnp.asarray(leaf), self.base.lora)
        if pair is None and not isinstance(leaf, dict):
            return leaf
        return np.asarray(lora.merged_leaf(leaf, pair, self.target))


def open_model(
    directory: pathlib.Path,
    dtype: str | None = None,
    accept_fingerprint: bool = False,
    allow_nonfinite: bool = False,
) -> Released | Converted:
    """Opens a directory of `resolve_checkpoint`, a LoRA run with its adapters merged.

    It is checked completely before any array is read.

    Args:
      directory: the directory.
      dtype: name of the dtype to cast to; None keeps the stored one.
      accept_fingerprint: accept files that differ from when it was saved.
      allow_nonfinite: accept weights that are NaN or infinite.

    Raises:
      ConversionError, ValueError: it names the tensor or key that is wrong.
    """
    if is_checkpoint(directory):
        if Manifest.read(directory).base is not None:
            return open_run(directory, dtype, accept_fingerprint, allow_nonfinite=allow_nonfinite)
        with undamaged(directory, "full", accept_fingerprint):
            return open_converted(directory, dtype, accept_fingerprint, allow_nonfinite)
    with undamaged(directory, "full", accept_fingerprint):
        return open_released(directory, dtype, accept_fingerprint, allow_nonfinite)


def open_run(
    directory: pathlib.Path,
    dtype: str | None,
    accept_fingerprint: bool,
    base: str | None = None,
    allow_nonfinite: bool = False,
) -> Adapted:
    """Opens a step of a LoRA run; ValueError if its base has changed."""
    manifest = Manifest.read(directory) if is_checkpoint(directory) else None
    if manifest is None or manifest.base is None:
        raise ConversionError(f"{directory} is not a LoRA run, so it has no base; leave --base out")
    base_model = open_model(
        resolve_checkpoint(base or manifest.base.path),
        manifest.base.dtype,
        accept_fingerprint,
        allow_nonfinite,
    )
    with undamaged(directory, "full", accept_fingerprint):
        own = read_adapter(directory)
    leaves = ((row.target, base_model.leaf(row)) for row in active_rows(base_model.config))
    check_base(describe(leaves, manifest.base.dtype), own, manifest.base, str(directory))
    tokenizer, files = Tokenizer.from_directory(directory), base_model.files
    target = DTYPES[dtype or manifest.base.dtype]
    put_on = adapter(own, manifest.base.lora)
    return Adapted(
        base_model,
        put_on,
        manifest.base,
        manifest.processor,
        tokenizer,
        files,
        target,
        allow_nonfinite,
    )


def open_with_peft(
    base_model: Released | Converted,
    directory: pathlib.Path,
    dtype: str | None,
    allow_nonfinite: bool = False,
) -> Adapted:
    """Merges the adapter of a PEFT directory or hub id into a model."""
    directory = pathlib.Path(os.path.expanduser(directory))
    if not is_peft(directory):
        directory = resolve_hub_dir(str(directory))
    if not is_peft(directory):
        raise ConversionError(
            f"--adapter {directory} is not a PEFT directory: it has no {PEFT}. A LoRA run is "
            "converted by itself"
        )
    target, read = (
        DTYPES[dtype or base_model.dtype],
        read_peft(directory, base_model.config, allow_nonfinite),
    )
    return Adapted(
        base_model,
        read,
        None,
        base_model.processor,
        base_model.tokenizer,
        base_model.files,
        target,
        allow_nonfinite,
    )


def export_adapter(
    source: str, target: pathlib.Path, layout: str, base: str | None, overwrite: bool = False
) -> int:
    """Writes the adapter of a LoRA run or PEFT directory for PEFT; returns the number of tensors.

    Args:
      source: the LoRA run, PEFT directory or hub id.
      target: the new directory.
      layout: "internvl" or "hf".
      base: model that adapter_config.json names; for a PEFT directory, where that model is. None
        takes the one that the source names.
      overwrite: replace an existing export.
    """
    local = pathlib.Path(os.path.expanduser(source))
    if is_peft(local):
        named = base or _base_of_peft(local)
        model = open_model(resolve_checkpoint(named)).config
        read = read_peft(local, model)
        # 1: of no layer
        rank = next((leaf.shape[-1] for leaf in storage.by_path(read.lora).values()), 1)
        own, config = {lora.SUBTREE: read.lora} | read.whole, LoraConfig(rank=rank, alpha=rank)
    else:
        directory = resolve_checkpoint(source)
        manifest = Manifest.read(directory) if is_checkpoint(directory) else None
        if manifest is None or manifest.base is None:
            raise ConversionError(
                f"{directory} holds no adapter: it is neither a LoRA run nor a PEFT directory"
            )
        with undamaged(directory, "full", False):
            own, config, model, named = (
                read_adapter(directory),
                manifest.base.lora,
                manifest.model,
                base or manifest.base.path,
            )
    with directories.new_directory(target, overwrite, [source]) as partial:
        return len(write_peft(partial, own, config, model, layout, named))


def _base_of_peft(directory: pathlib.Path) -> str:
    named = settings_of(directory).base
    if not named:
        raise ConversionError(
            f"{directory / PEFT} names no base_model_name_or_path; say with --base which model it "
            "is for"
        )
    return named
