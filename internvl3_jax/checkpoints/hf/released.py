"""Released safetensors directories and our own checkpoints as the sources of a conversion, behind
one interface.

An opened model has `config`, `processor`, `tokenizer`, `files` (all that travels, by name), `dtype`
(name), `hashes` (what was stored with it), `leaf(row, hashes)`, which reads one leaf of the
parameter tree and adds the hashes of its tensors, and `hash_leaf(row, hashes)`, which only adds
them.
"""

import dataclasses
import fnmatch
import hashlib
import logging
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping

import jax
import numpy as np

from internvl3_jax.checkpoints import storage
from internvl3_jax.checkpoints.fingerprint import compare, fingerprint
from internvl3_jax.checkpoints.hf.assemble import (
    ConversionError,
    Plan,
    Source,
    fill_leaf,
    fill_parts,
    has_head,
    layer_numbers,
    layer_tensors,
    padded_shape,
    plan,
    read_tensors,
)
from internvl3_jax.checkpoints.hf.config import from_hf, layout_of, processor_from_hf
from internvl3_jax.checkpoints.hf.internlm2 import table_source
from internvl3_jax.checkpoints.hf.mapping import Row, active_rows, bits
from internvl3_jax.checkpoints.hf.safetensors import SafetensorsSource
from internvl3_jax.checkpoints.manifest import Manifest
from internvl3_jax.config import ModelConfig, ProcessorConfig, to_dict
from internvl3_jax.data.text.chat_template import TEMPLATES
from internvl3_jax.data.text.tokenizer import Tokenizer
from internvl3_jax.data.text.tokenizer_files import FILES
from internvl3_jax.io.checkpoint_paths import MANIFEST
from internvl3_jax.io.model_files import exists, read_file
from internvl3_jax.io.strict_json import Object, loads
from internvl3_jax.io.terminal import excerpt, one_line

# Beside the tokenizer's files. The python files are the original layout's model code, which its
# config.json points to.
TRAVELLING = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "LICENSE*",
    "*.py",
)
# Of the configuration, what config.json of a released layout cannot say; internvl3_jax.json beside
# it keeps it (transformers calls the decoder of several families "llama").
UNSAID = ("vision.drop_path", "language.vocab_multiple", "language.family", "projector_norm_eps")
_LARGE = 1 << 30  # bytes; a leaf beyond is assembled in a file that the system may page out

log = logging.getLogger(__name__)


class Hashes(dict):
    """Tensor name in the original layout, as the table spells it, -> sha256 of its bytes, in the
    dtype of the conversion. The same for every layout.
    """

    def add(self, key: str, tensors: Iterable[np.ndarray]) -> None:
        """`tensors` are the parts of one tensor, joined along their first axis."""
        digest = hashlib.sha256()
        for tensor in tensors:
            digest.update(np.ascontiguousarray(bits(tensor)).reshape(-1).view(np.uint8))
        self[key] = digest.hexdigest()

    def add_leaf(self, config: ModelConfig, row: Row, leaf: np.ndarray) -> None:
        """Adds all tensors of one leaf."""
        for layer in layer_numbers(row, config):
            self.add(
                row.keys("internvl", layer)[0], layer_tensors(config, row, leaf, layer, "internvl")
            )


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
        fill_leaf(self.checked, self.tensors, row, out, hashes.add if hashes is not None else None)
        return out

    def hash_leaf(self, row: Row, hashes: Hashes) -> None:
        for layer in layer_numbers(row, self.config):
            hashes.add(
                row.keys("internvl", layer)[0], read_tensors(self.checked, self.tensors, row, layer)
            )

    def params(
        self, places: Mapping[str, jax.sharding.Sharding], prepare: Callable | None = None
    ) -> dict:
        """The parameter tree as jax arrays, each where `places` (by path) puts it. A process holds
        one tensor of the files and its own devices' parts of one leaf at a time. prepare: makes of
        a leaf's path and value what takes its place.
        """
        prepare = prepare or (lambda path, leaf: leaf)
        rows = active_rows(self.config)
        return storage.nest(
            {row.target: prepare(row.target, self._placed(row, places[row.target])) for row in rows}
        )

    def _placed(self, row: Row, place: jax.sharding.Sharding) -> jax.Array:
        shape = padded_shape(row, self.config)
        indices = {
            device: _bounds(index, shape)
            for device, index in place.addressable_devices_indices_map(shape).items()
        }
        parts = {
            bounds: np.empty([stop - start for start, stop in bounds], self.checked.dtype)
            for bounds in indices.values()
        }
        fill_parts(self.checked, self.tensors, row, parts)
        arrays = [jax.device_put(parts[bounds], device) for device, bounds in indices.items()]
        return jax.make_array_from_single_device_arrays(shape, place, arrays)


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """((start, stop), ...) of each dimension"""
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def allocate(shape: tuple[int, ...], dtype: np.dtype, scratch: pathlib.Path | None) -> np.ndarray:
    """An array to fill. A large one lies in a file at `scratch`, whose name is gone at once."""
    if scratch is None or math.prod(shape) * dtype.itemsize < _LARGE:
        return np.empty(shape, dtype)
    leaf = np.memmap(scratch, dtype, "w+", shape=shape)
    scratch.unlink()  # the memory stays until the array goes
    return leaf


def travelling_files(directory: pathlib.Path) -> dict[str, bytes]:
    """Name -> content of everything beside the weights that belongs to a model. FileError as
    `model_files.read_file`.
    """
    patterns = (*FILES, *TRAVELLING)  # not by glob, which passes over a link to nothing
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
    """A folder whose name only a pattern matches, such as LICENSES; one in the place of a file is
    an error.
    """
    return path.is_dir() and path.name not in (*FILES, *TRAVELLING)


def read_json(
    files: dict[str, bytes], name: str, directory: str | pathlib.Path = ""
) -> dict | None:
    """The object that a file holds, None if there is none. JsonError names it, in its directory."""
    if name not in files:
        return None
    where = one_line(os.path.join(directory, name))
    return Object(loads(files[name], where), where).values


def preprocessor_config(files: dict[str, bytes], directory: str | pathlib.Path = "") -> dict | None:
    """Settings of the image processor: a file of its own, or a part of processor_config.json as
    transformers 5 saves it.
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
    """Opens a safetensors directory of either released layout; see `convert.open.open_model`."""
    files = travelling_files(directory)
    if "config.json" not in files:
        raise FileNotFoundError(f"{directory} has no config.json")
    values, pictures = (
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
        values, image_token_id=token, has_head=head, preprocessor_config=pictures, place=place
    )
    processor = processor_from_hf(values, pictures, place)
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
    """ValueError if the tokenizer has ids for which the model has no row."""
    rows = config.language.vocab_size
    if tokenizer.vocab_size > rows:
        raise ValueError(
            f"{directory}: the tokenizer has {tokenizer.vocab_size:,} tokens, the model's "
            f"vocab_size is {rows:,}; tokens were added to the "
            "tokenizer alone, so resize the model's embeddings where that was done, or take the "
            "tokenizer that the model came with"
        )


def _merge(config: ModelConfig, ours: ModelConfig, directory: pathlib.Path) -> ModelConfig:
    """Our own record of an exported model, after checking that config.json still says the same."""
    said, kept = storage.by_path(_plain(config)), storage.by_path(_plain(ours))
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
    return ours


def _plain(config: ModelConfig) -> dict:
    """to_dict with tuples as text, so that they count as one value."""
    values = to_dict(config)
    values["vision"] |= {name: str(values["vision"][name]) for name in ("mean", "std")}
    return values
