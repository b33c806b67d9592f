"""Our own checkpoints as the source of a conversion, with the interface of `released.Released`."""

import dataclasses
import pathlib
from collections.abc import Iterator

import numpy as np

from internvl3_jax.checkpoints import storage
from internvl3_jax.checkpoints.fingerprint import compare, fingerprint
from internvl3_jax.checkpoints.hf.assemble import (
    DTYPES,
    ConversionError,
    by_layer,
    cast,
    check_params,
)
from internvl3_jax.checkpoints.hf.mapping import Row, active_rows
from internvl3_jax.checkpoints.hf.released import Hashes, check_vocabulary, companion_files
from internvl3_jax.checkpoints.hf.values import nonfinite, refuse_nonfinite
from internvl3_jax.checkpoints.manifest import Manifest
from internvl3_jax.config import ModelConfig, ProcessorConfig
from internvl3_jax.data.text.tokenizer import Tokenizer


@dataclasses.dataclass
class Converted:
    """An opened checkpoint (Orbax)."""

    directory: pathlib.Path
    config: ModelConfig
    processor: ProcessorConfig
    tokenizer: Tokenizer
    files: dict[str, bytes]
    reader: storage.TreeReader
    target: np.dtype
    hashes: dict[str, str]
    allow_nonfinite: bool = False

    @property
    def dtype(self) -> str:
        return self.target.name

    def leaf(
        self, row: Row, hashes: Hashes | None = None, scratch: pathlib.Path | None = None
    ) -> np.ndarray:
        leaf = self.reader.read(row.target)
        if not self.allow_nonfinite and nonfinite(leaf):
            refuse_nonfinite(self._all_layers())
        if leaf.dtype != self.target:
            leaf = cast(leaf, self.target, row.target)
        if hashes is not None:
            hashes.add_leaf(self.config, row, leaf)
        return leaf

    def layers(self, row: Row, hashes: Hashes | None = None) -> Iterator[np.ndarray]:
        for layer, part in enumerate(self.reader.layers(row.target)):
            if not self.allow_nonfinite and nonfinite(part):
                refuse_nonfinite(self._all_layers())
            if part.dtype != self.target:
                part = cast(part, self.target, row.target)
            if hashes is not None:
                hashes.add_leaf(self.config, row, part, (layer,))
            yield part

    def _all_layers(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yields (name, values) of all leaves, of large ones layer by layer."""
        for row in active_rows(self.config):
            if by_layer(row, self.config, self.target):
                for layer, part in enumerate(self.reader.layers(row.target)):
                    yield f"{row.target}, layer {layer}", part
            else:
                yield row.target, self.reader.read(row.target)

    def hash_leaf(self, row: Row, hashes: Hashes) -> None:
        if by_layer(row, self.config, self.target):
            for _ in self.layers(row, hashes):
                pass
        else:
            self.leaf(row, hashes)


def open_converted(
    directory: pathlib.Path, dtype: str | None, accept_fingerprint: bool, allow_nonfinite: bool
) -> Converted:
    manifest = Manifest.read(directory)
    if manifest.weights:
        origin = f" ({manifest.source})" if manifest.source else ""
        raise ConversionError(
            f"{directory} holds {manifest.weights} weights, of which the original ones cannot be "
            f"made again; convert from the original{origin}"
        )
    reader = storage.TreeReader(
        directory / "params", [row.target for row in active_rows(manifest.model)]
    )
    check_params(manifest.model, reader.infos)
    names = sorted({info.dtype.name for info in reader.infos.values()})
    if dtype is None and len(names) > 1:
        raise ConversionError(
            f"{directory} holds parameters of several dtypes ({', '.join(names)}); name one with "
            "--dtype"
        )
    tokenizer = Tokenizer.from_directory(directory)
    check_vocabulary(manifest.model, tokenizer, directory)
    compare(
        manifest.fingerprint,
        fingerprint(manifest.model, manifest.processor, tokenizer, "+".join(names)),
        str(directory),
        accept_fingerprint,
    )
    target = DTYPES[dtype or names[0]]
    hashes = manifest.hashes if [target.name] == names else {}
    files = companion_files(directory)
    return Converted(
        directory,
        manifest.model,
        manifest.processor,
        tokenizer,
        files,
        reader,
        target,
        hashes,
        allow_nonfinite,
    )
