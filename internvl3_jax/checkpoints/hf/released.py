"""Opens released safetensors directories, for loading and as the source of a conversion.

The interface of a source: `config`, `processor`, `tokenizer`, `dtype` (its name), `hashes` (stored
with it), `files` (name -> content of all files but the weights), and

    leaf(row, hashes)          reads a leaf of the parameter tree and adds its tensors' hashes
    layers(row, hashes)        yields the layers of a leaf instead
    hash_leaf(row, hashes)     only adds the hashes
"""

import dataclasses
import fnmatch
import hashlib
import logging
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping

import jax
import numpy as np

from internvl3_jax.checkpoints import storage
from internvl3_jax.checkpoints.fingerprint import compare, fingerprint
from internvl3_jax.checkpoints.hf.assemble import (
    ConversionError,
    Plan,
    Source,
    fill_leaf,
    has_head,
    layer_tensors,
    padded_shape,
    plan,
    read_tensors,
    stacked_indices,
)
from internvl3_jax.checkpoints.hf.config import from_hf, layout_of, processor_from_hf
from internvl3_jax.checkpoints.hf.internlm2 import table_source
from internvl3_jax.checkpoints.hf.mapping import Row, active_rows, bits, leaf_shape
from internvl3_jax.checkpoints.hf.safetensors import SafetensorsSource
from internvl3_jax.checkpoints.hf.sharded_leaves import sharded_leaf
from internvl3_jax.checkpoints.manifest import Manifest
from internvl3_jax.config import ModelConfig, ProcessorConfig, to_dict
from internvl3_jax.data.text.chat_template import TEMPLATES
from internvl3_jax.data.text.tokenizer import Tokenizer
from internvl3_jax.data.text.tokenizer_files import FILES
from internvl3_jax.io.checkpoint_paths import MANIFEST
from internvl3_jax.io.model_files import exists, read_file
from internvl3_jax.io.strict_json import Object, loads
from internvl3_jax.io.terminal import excerpt, one_line

# Files other than the tokenizer's. The Python files are the original layout's model code, to which
# its config.json points.
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "LICENSE*",
    "*.py",
)
# Fields that config.json of a released layout cannot express; internvl3_jax.json beside it has them
# (transformers calls the decoder of several families "llama").
UNSAID = ("vision.drop_path", "language.vocab_multiple", "language.family", "projector_norm_eps")
_LARGE = 1 << 30  # bytes; a larger leaf is assembled in a file that the system may page out

log = logging.getLogger(__name__)


class Hashes(dict):
    """The table's name of each tensor in the original layout -> sha256 in the target dtype.

    The hashes are the same for every layout.
    """

    def add(self, key: str, tensors: Iterable[np.ndarray]) -> None:
        """Adds a tensor that is given in parts, joined along their first axis."""
        digest = hashlib.sha256()
        for tensor in tensors:
            digest.update(np.ascontiguousarray(bits(tensor)).reshape(-1).view(np.uint8))
        self[key] = digest.hexdigest()

    def add_leaf(
        self, config: ModelConfig, row: Row, leaf: np.ndarray, layer: tuple[int, ...] = ()
    ) -> None:
        """Adds all tensors of a leaf, or of its only `layer`, which is then all of `leaf`."""
        for index in stacked_indices(row, config, layer):
            tensors = layer_tensors(config, row, leaf, index[len(layer) :], "internvl")
            self.add(row.keys("internvl", index)[0], tensors)


@dataclasses.dataclass
class Released:
    """A safetensors directory of either released layout."""

    directory: pathlib.Path
    config: ModelConfig
    processor: ProcessorConfig
    tokenizer: Tokenizer
    files: dict[str, bytes]
    tensors: Source
    checked: Plan
    hashes: dict[str, str]

    @property
    def dtype(self) -> str:
        return self.checked.dtype.name

    @property
    def allow_nonfinite(self) -> bool:
        return self.checked.allow_nonfinite

    def leaf(
        self, row: Row, hashes: Hashes | None = None, scratch: pathlib.Path | None = None
    ) -> np.ndarray:
        out = allocate(padded_shape(row, self.config), self.checked.dtype, scratch)
        fill_leaf(self.checked, self.tensors, row, out, None if hashes is None else hashes.add)
        return out

    def layers(self, row: Row, hashes: Hashes | None = None) -> Iterator[np.ndarray]:
        count, *shape = padded_shape(row, self.config)
        visit = hashes.add if hashes is not None else None
        for layer in range(count):
            out = np.empty(shape, self.checked.dtype)
            fill_leaf(self.checked, self.tensors, row, out, visit, (layer,))
            yield out

    def hash_leaf(self, row: Row, hashes: Hashes) -> None:
        for index in stacked_indices(row, self.config):
            tensors = read_tensors(self.checked, self.tensors, row, index)
            hashes.add(row.keys("internvl", index)[0], tensors)

    def params(
        self, shardings: Mapping[str, jax.sharding.Sharding], prepare: Callable | None = None
    ) -> dict:
        """Returns the parameter tree as jax arrays.

        A process has one tensor of the files and its local shards of one leaf in memory.

        Args:
          shardings: path -> sharding.
          prepare: maps each leaf's path and value to the value to keep.
        """
        prepare = prepare or (lambda path, leaf: leaf)
        # A tensor is in memory beside its leaf: the largest come first, while memory is empty.
        rows = sorted(
            active_rows(self.config), key=lambda row: -math.prod(leaf_shape(row, self.config))
        )
        return storage.nest(
            {
                row.target: prepare(
                    row.target, sharded_leaf(self.checked, self.tensors, row, shardings[row.target])
                )
                for row in rows
            }
        )


def allocate(shape: tuple[int, ...], dtype: np.dtype, scratch: pathlib.Path | None) -> np.ndarray:
    """Returns an array to fill; a large one is in an unlinked file that was at `scratch`."""
    if scratch is None or math.prod(shape) * dtype.itemsize < _LARGE:
        return np.empty(shape, dtype)
    leaf = np.memmap(scratch, dtype, "w+", shape=shape)
    scratch.unlink()  # the memory stays until the array goes
    return leaf


def companion_files(directory: pathlib.Path) -> dict[str, bytes]:
    """Returns name -> content of a model's files other than the weights.

    FileError as in `model_files.read_file`.
    """
    patterns = (*FILES, *COMPANIONS)  # glob would skip a dangling link
    names = [
        name
        for name in sorted(entry.name for entry in directory.iterdir())
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    ]
    return {
        name: read_file(directory / name)
        for name in names
        if exists(directory / name) and not _passed_over(directory / name)
    }


def _passed_over(path: pathlib.Path) -> bool:
    """Returns whether a folder matches only a pattern, as LICENSES; otherwise it is an error."""
    return path.is_dir() and path.name not in (*FILES, *COMPANIONS)


def read_json(
    files: dict[str, bytes], name: str, directory: str | pathlib.Path = ""
) -> dict | None:
    """Parses a file that holds an object, None if it is missing; JsonError names its path."""
    if name not in files:
        return None
    where = one_line(os.path.join(directory, name))
    return Object(loads(files[name], where), where).values


def preprocessor_config(files: dict[str, bytes], directory: str | pathlib.Path = "") -> dict | None:
    """Returns the image processor's settings from preprocessor_config.json.

    transformers 5 saves them in processor_config.json.
    """
    values, name = read_json(files, "processor_config.json", directory), "processor_config.json"
    whole = Object(values or {}, one_line(os.path.join(directory, name)))
    return read_json(files, "preprocessor_config.json", directory) or whole.get(
        "image_processor", dict, None
    )


def open_released(
    directory: pathlib.Path,
    dtype: str | None = None,
    accept_fingerprint: bool = False,
    allow_nonfinite: bool = False,
) -> Released:
    """Opens a safetensors directory of either released layout.

    All files, names, shapes and dtypes are checked; no tensor is read.

    Args:
      directory: the directory.
      dtype: name of the dtype to convert to; None keeps the stored one.
      accept_fingerprint: accept files of an export that differ from when it was written.
      allow_nonfinite: accept NaN and infinities when reading.
    """
    files = companion_files(directory)
    if "config.json" not in files:
        raise FileNotFoundError(f"{directory} has no config.json")
    values, preprocessor = (
        read_json(files, "config.json", directory),
        preprocessor_config(files, directory),
    )
    read_json(files, "generation_config.json", directory)
    place = one_line(os.path.join(directory, ""))
    layout = layout_of(values, place)
    tensors = SafetensorsSource(directory)
    tokenizer = Tokenizer.from_files(files, str(directory))
    head = has_head(tensors.infos())
    if layout == "hf" and values.get("tie_word_embeddings") is None:
        log.warning(
            "%s does not say whether the output head is tied; the weights decide: %s",
            "config.json",
            "own" if head else "tied",
        )
    token = tokenizer.token_id("<IMG_CONTEXT>")
    config = from_hf(
        values, image_token_id=token, has_head=head, preprocessor_config=preprocessor, place=place
    )
    processor = processor_from_hf(values, preprocessor, place)
    if processor.template not in TEMPLATES:
        raise ConversionError(
            f"{place}config.json: template {excerpt(processor.template)} is unknown; supported: "
            f"{', '.join(TEMPLATES)}"
        )
    check_vocabulary(config, tokenizer, directory)
    tensors = table_source(tensors, config.language, layout)
    hashes = {}
    checked = plan(config, tensors, layout, dtype, allow_nonfinite=allow_nonfinite)
    if (directory / MANIFEST).exists():
        manifest = Manifest.read(directory)
        config, processor = _merge(config, manifest.model, directory), manifest.processor
        checked = checked._replace(config=config)
        stored = checked.dtype.name if dtype is None else manifest.fingerprint.get("dtype")
        made = fingerprint(config, processor, tokenizer, stored)
        compare(manifest.fingerprint, made, str(directory), accept_fingerprint)
        hashes = manifest.hashes if checked.dtype.name == stored else {}
    return Released(directory, config, processor, tokenizer, files, tensors, checked, hashes)


def check_vocabulary(config: ModelConfig, tokenizer: Tokenizer, directory: pathlib.Path) -> None:
    """Raises ValueError if the tokenizer has ids for which the model has no row."""
    rows = config.language.vocab_size
    if tokenizer.vocab_size > rows:
        raise ValueError(
            f"{directory}: the tokenizer has {tokenizer.vocab_size:,} tokens, the model's "
            f"vocab_size is {rows:,}; tokens were added to the tokenizer alone, so resize the "
            "model's embeddings where that was done, or take the tokenizer that the model came "
            "with"
        )


def _merge(config: ModelConfig, exported: ModelConfig, directory: pathlib.Path) -> ModelConfig:
    """Returns the exported model's own configuration, after comparing it with config.json."""
    said, kept = storage.by_path(_plain(config)), storage.by_path(_plain(exported))
    wrong = [
        name for name in kept if name.replace("/", ".") not in UNSAID and said[name] != kept[name]
    ]
    if wrong:
        differing = ", ".join(
            f"{name.replace('/', '.')} ({said[name]} and {kept[name]})" for name in wrong
        )
        raise ValueError(
            f"{directory}: config.json and {MANIFEST} disagree about {differing}; remove "
            f"{MANIFEST} if config.json is right"
        )
    return exported


def _plain(config: ModelConfig) -> dict:
    """Returns to_dict with tuples as text, so that each is one value."""
    values = to_dict(config)
    values["vision"] |= {name: str(values["vision"][name]) for name in ("mean", "std")}
    return values
