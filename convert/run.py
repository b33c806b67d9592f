"""The conversion loop: copies an opened model into a checkpoint or a safetensors directory."""

import dataclasses
import itertools
import math
import os
import pathlib
from collections.abc import Callable, Iterable

import numpy as np

from convert.compose import Composed
from convert.converted import Converted
from convert.hf_files import export_files
from convert.open import Adapted, open_model
from convert.quantized import Quantization
from internvl3_jax.checkpoints import directories, manifest, storage
from internvl3_jax.checkpoints.fingerprint import fingerprint
from internvl3_jax.checkpoints.hf.assemble import (
    DTYPES,
    ConversionError,
    by_layer,
    layer_tensors,
    padded_shape,
    stacked_indices,
)
from internvl3_jax.checkpoints.hf.internlm2 import FileWriter, file_tensors
from internvl3_jax.checkpoints.hf.mapping import Row, active_rows, source_shape, stacked_axes
from internvl3_jax.checkpoints.hf.released import Hashes, Released
from internvl3_jax.checkpoints.hf.safetensors import SafetensorsWriter
from internvl3_jax.checkpoints.manifest import Manifest
from internvl3_jax.config import ModelConfig
from internvl3_jax.io.checkpoint_paths import MANIFEST, hub_source

Model = Released | Converted | Composed | Adapted
HEAD, EMBEDDING = ("language_model.lm_head.weight", "language_model.model.embed_tokens.weight")


class OrbaxSink:
    """Writes leaves into a checkpoint."""

    def __init__(self, directory: pathlib.Path, model: Model, quantize: Quantization | None):
        self.directory, self.model, self.quantize = directory, model, quantize
        self.writer = storage.TreeWriter(directory / "params")
        self.dtypes = set()

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    def add_layers(self, row: Row, layers: Iterable[np.ndarray]) -> None:
        """Adds a leaf layer by layer; not of quantized weights."""
        self.dtypes.add(self.model.dtype)
        shape = padded_shape(row, self.config)
        self.writer.add_layers(row.target, shape, DTYPES[self.model.dtype], layers)

    def add(self, row: Row, leaf: np.ndarray) -> None:
        parts = (
            {row.target: leaf} if self.quantize is None else self.quantize.parts(row.target, leaf)
        )
        self.dtypes |= {part.dtype.name for part in parts.values()}
        for path, part in parts.items():
            self.writer.add(path, part)

    def close(self, hashes: Hashes) -> None:
        self.writer.close()
        model = self.model
        manifest.write_files(
            self.directory,
            model.config,
            model.processor,
            model.files,
            "+".join(sorted(self.dtypes)),
            hashes,
            source=source_of(model),
            weights=self.quantize and self.quantize.weights,
        )


class SafetensorsSink:
    """Writes leaves into a directory of a released layout; the original one never ties the head."""

    def __init__(self, directory: pathlib.Path, model: Model, layout: str, shard_size: int):
        self.directory, self.model, self.layout = directory, model, layout
        language = model.config.language
        if layout == "internvl":
            language = dataclasses.replace(language, tie_embeddings=False)
        self.config = dataclasses.replace(model.config, language=language)
        self.unties = language != model.config.language
        files = export_files(
            self.config, model.processor, model.tokenizer, layout, model.dtype, model.files
        )
        for name, content in files.items():
            (directory / name).write_bytes(content)
        tensors = file_tensors(planned(self.config, layout), self.config, layout)
        writer = SafetensorsWriter(directory, tensors, DTYPES[model.dtype], shard_size)
        self.writer = FileWriter(writer, self.config, layout)

    def add(self, row: Row, leaf: np.ndarray) -> None:
        for index in stacked_indices(row, self.config):
            tensors = layer_tensors(self.config, row, leaf, index, self.layout)
            for key, tensor in zip(row.keys(self.layout, index), tensors, strict=True):
                self.writer.write(key, tensor)
        if row.target == "language/embedding" and self.unties:
            self.add(
                next(
                    row for row in active_rows(self.config) if row.target == "language/head/kernel"
                ),
                leaf.T,
            )

    def add_layers(self, row: Row, layers: Iterable[np.ndarray]) -> None:
        """Adds a leaf layer by layer."""
        for layer, part in enumerate(layers):
            for index in stacked_indices(row, self.config, (layer,)):
                tensors = layer_tensors(self.config, row, part, index[1:], self.layout)
                for key, tensor in zip(row.keys(self.layout, index), tensors, strict=True):
                    self.writer.write(key, tensor)

    def close(self, hashes: Hashes) -> None:
        self.writer.close()
        model = self.model
        if self.unties:
            hashes[HEAD] = hashes[EMBEDDING]
        made = fingerprint(self.config, model.processor, model.tokenizer, model.dtype)
        Manifest(self.config, model.processor, made, hashes, source=source_of(model)).write(
            self.directory
        )


def source_of(model: Model) -> str | None:
    """Returns owner/name@commit of a model from the hub, also of its converted checkpoint."""
    directory = getattr(model, "directory", None)
    if directory is None:
        return None
    return hub_source(directory) or (
        Manifest.read(directory).source if (directory / MANIFEST).is_file() else None
    )


def planned(config: ModelConfig, layout: str) -> list[tuple[str, tuple[int, ...]]]:
    """Returns (name, shape) of all tensors, grouped by layer so that shards hold full layers."""
    planned = []
    for _, rows in itertools.groupby(
        active_rows(config), lambda row: (row.target.split("/")[0], stacked_axes(row, config)[:1])
    ):
        rows = list(rows)
        for layer in np.ndindex(*stacked_axes(rows[0], config)[:1]):
            planned += [
                (key, source_shape(row, config, layout))
                for row in rows
                for expert in np.ndindex(*stacked_axes(row, config)[1:])
                for key in row.keys(layout, layer + expert)
            ]
    return planned


def convert(
    model: Model,
    target: str | pathlib.Path,
    *,
    to: str | None = None,
    quantize: Quantization | None = None,
    check: Callable[[pathlib.Path], None] | None = None,
    verify: bool = False,
    shard_size: int = 5 * 10**9,
    overwrite: bool = False,
    sources: Iterable[str | os.PathLike] = (),
    advance: Callable[[str, int, int], None] = lambda phase, done, total: None,
) -> dict[str, str]:
    """Writes an opened model (`open_model`, `open_parts`) to `target`.

    Args:
      model: the source.
      target: the new directory.
      to: "internvl" or "hf" for a safetensors directory of that layout, None for a checkpoint.
      quantize: of a checkpoint, which kernels are written in fewer bits; None: none.
      check: called with the directory when it is complete; what it raises leaves nothing behind.
      verify: read source and result again and compare the sha256 of every tensor.
      shard_size: most bytes of tensors in one safetensors file.
      overwrite: replace a checkpoint or an export that this program wrote.
      sources: other directories that are read; they and the model's own are never replaced.
      advance: called with (phase, parameters done, parameters in total).

    Returns:
      The hashes: name in the original layout -> sha256.

    Raises:
      FileExistsError, ValueError (also ConversionError): nothing is written to `target`.
    """
    with directories.new_directory(
        target, overwrite, (*sources, *filter(None, [getattr(model, "directory", None)]))
    ) as partial:
        if to:
            sink = SafetensorsSink(partial, model, to, shard_size)
        else:
            sink = OrbaxSink(partial, model, quantize)
        hashes = Hashes()
        for row in _with_progress(model.config, "converting", advance):
            # Quantized weights and merged adapters are made of whole leaves.
            if quantize is None and by_layer(row, model.config, DTYPES[model.dtype]):
                sink.add_layers(row, model.layers(row, hashes))
            else:
                sink.add(row, model.leaf(row, hashes, partial / "leaf.tmp"))
        sink.close(hashes)
        if verify:
            _compare("the source has changed since its hashes were stored", model.hashes, hashes)
            _verify(
                model,
                hashes,
                "the source gave other values when read again",
                "verifying source",
                advance,
            )
            if quantize is not None:
                quantize.verify(model, partial)
        if verify and quantize is None:
            written = open_model(partial, allow_nonfinite=model.allow_nonfinite)
            _verify(
                written,
                hashes,
                "the written checkpoint differs from the source",
                "verifying result",
                advance,
            )
        if check is not None:
            check(partial)
    return hashes


def _with_progress(config: ModelConfig, phase: str, advance: Callable):
    rows = active_rows(config)
    sizes = [math.prod(padded_shape(row, config)) for row in rows]
    for index, row in enumerate(rows):
        yield row
        advance(phase, sum(sizes[: index + 1]), sum(sizes))


def _verify(model: Model, hashes: Hashes, what: str, phase: str, advance: Callable) -> None:
    again = Hashes()
    for row in _with_progress(model.config, phase, advance):
        model.hash_leaf(row, again)
    _compare(what, again, hashes)


def _compare(what: str, some: dict[str, str], others: dict[str, str]) -> None:
    """Raises ConversionError naming the tensors present in both with different hashes."""
    differing = sorted(name for name in some.keys() & others.keys() if some[name] != others[name])
    if differing:
        more = f" and {len(differing) - 12} more" if len(differing) > 12 else ""
        raise ConversionError(f"{what}: {', '.join(differing[:12])}{more}")
