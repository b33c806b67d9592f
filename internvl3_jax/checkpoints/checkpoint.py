"""Opens and saves checkpoints.

    DIR/params/              the parameter tree (Orbax), layers stacked, vocabulary padded
    DIR/internvl3_jax.json   model and processor configuration, fingerprint, hashes
    DIR/tokenizer.json ...   the tokenizer and other files of the released model
    DIR/opt_state/, DIR/training.json, DIR/data/SHARD.json
                             in the steps of a training run (RUN/checkpoints/STEP is such a DIR)
    DIR/files.json           size and sha256 of every file, written last

A step of a LoRA run holds only adapters and names their base (adapters.py); `load` merges the two.
It also opens released safetensors directories of either layout, and hub ids.
"""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from internvl3_jax.checkpoints import directories, storage
from internvl3_jax.checkpoints.adapters import (
    Adapter,
    adapter,
    attach,
    check_base,
    check_model,
    check_processor,
    describe,
    read_adapter,
)
from internvl3_jax.checkpoints.fingerprint import compare, fingerprint
from internvl3_jax.checkpoints.hf.peft import read_peft
from internvl3_jax.checkpoints.hf.released import open_released
from internvl3_jax.checkpoints.load_options import (
    Quantizing,
    Reading,
    base_dtype_of,
    check_dtype,
    check_weights,
    named_adapters,
)
from internvl3_jax.checkpoints.load_targets import load_targets, mesh_of, shardings_by_path
from internvl3_jax.checkpoints.manifest import Manifest, dtype_name, write_files
from internvl3_jax.checkpoints.verification import (
    check_finite,
    spans_all_processes,
    undamaged,
)
from internvl3_jax.config import ModelConfig, ProcessorConfig
from internvl3_jax.data.text.tokenizer import Tokenizer
from internvl3_jax.io import integrity
from internvl3_jax.io.checkpoint_paths import (
    PEFT,
    is_checkpoint,
    is_peft,
    resolve_checkpoint,
)
from internvl3_jax.io.remote_files import as_path
from internvl3_jax.model import lora
from internvl3_jax.model.internvl import InternVL
from internvl3_jax.model.weights import check, format_in
from internvl3_jax.param_tree import own


@dataclasses.dataclass(repr=False)
class Checkpoint:
    """An opened checkpoint. `model.apply({"params": params}, batch)` computes logits."""

    model: InternVL
    config: ModelConfig
    params: dict | None  # None: they were donated
    processor: ProcessorConfig
    tokenizer: Tokenizer
    directory: pathlib.Path
    # Adapters that `Chat` can choose from, by name.
    adapters: dict[str, Adapter] = dataclasses.field(default_factory=dict)
    # `adapters.describe` before quantization, of a LoRA run's base or of what adapters name.
    described: dict[str, str] | None = None
    described_dtype: str | None = None  # None: the dtype of the computation
    # Format of quantized kernels (model/weights.py); None: there are none.
    weights: str | None = None

    def take_params(self, donate: bool = False) -> dict:
        """Returns the parameters; donated ones may be emptied, and `params` is None afterwards.

        Raises:
          ValueError: they were donated before.
        """
        if self.params is None:
            raise ValueError(
                f"the parameters of {self.directory} were donated (Chat(..., donate=True)); load "
                "it again, or leave donate out"
            )
        if not donate:
            return self.params
        params, self.params = own(self.params), None
        return params

    def __repr__(self) -> str:
        # One line, for notebooks: the parameters themselves would fill pages.
        leaves = jax.tree.leaves(self.params)  # none if they were donated
        dtypes = ", ".join(sorted({str(leaf.dtype) for leaf in leaves}))
        vision, language = self.config.vision, self.config.language
        adapters = f", adapters {', '.join(self.adapters)}" if self.adapters else ""
        return (
            f"Checkpoint({str(self.directory)!r}: {sum(leaf.size for leaf in leaves):,} parameters"
            f" in {dtypes}, vision {vision.num_layers} x {vision.hidden_size},"
            f" language {language.num_layers} x {language.hidden_size}{adapters})"
        )


def save_checkpoint(
    directory,
    params,
    model: ModelConfig,
    processor: ProcessorConfig,
    files: Mapping[str, bytes],
    *,
    overwrite: bool = False,
) -> None:
    """Writes a checkpoint.

    Args:
      directory: the new directory.
      params: tree of jax or numpy arrays.
      model: configuration of the parameters.
      processor: how images and messages become tiles and ids.
      files: name -> content of the other files; the tokenizer's (`tokenizer.files()`) are required.
      overwrite: replace a directory that this program wrote.
    """
    with directories.new_directory(directory, overwrite) as partial:
        stored = format_in(storage.by_path(params))
        write_files(partial, model, processor, files, dtype_name(params), weights=stored)
        storage.start_saving(partial / "params", params)()


# --- opening -------------------------------------------------------------------------------------


def load(
    path: str | os.PathLike,
    *,
    dtype=None,
    mesh: jax.sharding.Mesh | None = None,
    accept_fingerprint: bool = False,
    adapters: Mapping[str, str | os.PathLike] | str | os.PathLike | None = None,
    base: str | os.PathLike | None = None,
    prepare: Callable[[str, jax.Array], object] | None = None,
    verify: str = "full",
    allow_nonfinite: bool = False,
    weights: str | None = None,
    quantize_tower: bool = False,
) -> Checkpoint:
    """Opens a checkpoint directory, a training run, a released safetensors directory or a hub id.

    A LoRA run is opened with its adapters merged: `params` is an ordinary tree.

    Args:
      path: what to open. Of a training run, the newest step that passes `verify` is opened.
      dtype: of the parameters and of the computation; None keeps the stored one.
      mesh: from `sharding.make_mesh`; each device reads its shard of each parameter from the files.
        None puts all parameters on the default device.
      accept_fingerprint: accept files other than the arrays that differ from when it was saved.
      adapters: name -> LoRA run or PEFT directory, or one path, whose last part is the name. `Chat`
        chooses among them.
      base: where the base of a LoRA run is now.
      prepare: maps each parameter's path and value, as soon as it is read, to the value to keep.
      verify: how closely files are compared before they are used: "full" hashes all bytes (a share
        in each process of a mesh), "sizes" compares names and sizes, "none" nothing.
      allow_nonfinite: accept parameters that are NaN or infinite.
      weights: "int8", "fp8" or "nf4": quantize the kernels of decoder layers and head for inference
        while they are read (model/weights.py). None keeps them as stored.
      quantize_tower: with `weights`, quantize those of the vision tower and projector, too.

    Raises:
      FileNotFoundError: nothing that can be opened is there.
      ValueError: the checkpoint is damaged (Damaged), has parameters that are not finite, or
        contradicts itself (FingerprintError); the message says where. Or the devices cannot compute
        with such weights, or they are quantized already.
    """
    integrity.check_level(verify)
    check_dtype(dtype)
    check_weights(weights, quantize_tower, mesh)
    named = named_adapters(adapters)
    if weights:
        prepare = Quantizing(weights, quantize_tower, base_dtype_of(named), prepare)
    directory = resolve_checkpoint(path, verify)
    reading = Reading(dtype, mesh, accept_fingerprint, prepare, verify, allow_nonfinite)
    manifest = Manifest.read(directory) if is_checkpoint(directory) else None
    if weights and manifest is not None and manifest.weights:
        raise ValueError(
            f"weights is {weights}: {directory} holds {manifest.weights} weights already; leave "
            f"weights out, or load the checkpoint that it was converted from"
        )
    if manifest is None:
        opened = _load_released(directory, reading)
    elif manifest.base is None:
        opened = _load_converted(directory, manifest, reading)
    else:
        opened = _load_lora(directory, manifest, reading, base)
    if base is not None and (manifest is None or manifest.base is None):
        raise ValueError(
            f"base is {base}: {directory} is not a LoRA run, so it has no base; leave base out"
        )
    if weights:
        opened.weights, opened.described = weights, prepare.described
        opened.described_dtype = prepare.base_dtype
    opened.adapters = {
        name: load_adapter(where, opened, accept_fingerprint, verify, allow_nonfinite)
        for name, where in named.items()
    }
    return opened


def _load_released(directory: pathlib.Path, reading: Reading) -> Checkpoint:
    dtype = reading.dtype and jnp.dtype(reading.dtype).name
    with reading.undamaged(directory):
        source = open_released(
            directory, dtype, reading.accept_fingerprint, reading.allow_nonfinite
        )
    params = source.params(shardings_by_path(source.config, reading.mesh), reading.prepare)
    return _opened(directory, source.config, source.processor, source.tokenizer, params)


def _load_converted(directory: pathlib.Path, manifest: Manifest, reading: Reading) -> Checkpoint:
    with reading.undamaged(directory):
        stored = storage.leaf_infos(directory / "params")
        tokenizer = _tokenizer(directory, manifest, dtype_name(stored), reading.accept_fingerprint)
        target = load_targets(directory, manifest, stored, reading.dtype, reading.mesh)
    if manifest.weights:
        check(manifest.weights, reading.mesh, str(directory))
    # Leaf by leaf only if each becomes smaller; reading all together is faster.
    params = storage.load_params(
        directory / "params", target, reading.prepare and reading.checked(directory)
    )
    if reading.prepare is None and not reading.allow_nonfinite:
        check_finite(storage.by_path(params), str(directory))
    opened = _opened(directory, manifest.model, manifest.processor, tokenizer, params)
    opened.weights = manifest.weights
    return opened


def _load_lora(directory: pathlib.Path, manifest: Manifest, reading: Reading, base) -> Checkpoint:
    """Opens the run's base and merges the adapters into it."""
    with reading.undamaged(directory):
        adapter_params = read_adapter(directory, reading.mesh)
        tokenizer = _tokenizer(
            directory, manifest, dtype_name(adapter_params), reading.accept_fingerprint
        )
    base_checkpoint = load(
        base or manifest.base.path,
        dtype=manifest.base.dtype,
        mesh=reading.mesh,
        accept_fingerprint=reading.accept_fingerprint,
        verify=reading.verify,
        allow_nonfinite=reading.allow_nonfinite,
    )
    check_not_quantized(base_checkpoint, "the base of adapters")
    check_model(manifest.model, base_checkpoint.config, str(directory))
    check_base(
        describe(storage.by_path(base_checkpoint.params).items(), manifest.base.dtype),
        adapter_params,
        manifest.base,
        str(directory),
    )
    tree = attach(base_checkpoint.params, adapter_params, manifest.base)
    del base_checkpoint
    params = lora.merged(tree, manifest.base.lora, reading.dtype or manifest.base.dtype)
    prepare = reading.checked(directory)
    params = storage.nest(
        {path: prepare(path, leaf) for path, leaf in storage.by_path(params).items()}
    )
    return _opened(directory, manifest.model, manifest.processor, tokenizer, params)


def load_adapter(
    path: str | os.PathLike,
    opened: Checkpoint,
    accept_fingerprint: bool = False,
    verify: str = "full",
    allow_nonfinite: bool = False,
) -> Adapter:
    """Reads the adapter of a LoRA run, a PEFT directory (either layout) or a hub id.

    Args:
      path: the adapter.
      opened: the checkpoint that it is used with.
      accept_fingerprint: accept an adapter that was trained with another processor.
      verify: see `load`.
      allow_nonfinite: see `load`.

    Raises:
      FileNotFoundError: there is neither a LoRA run nor a PEFT directory.
      ValueError: the adapter was trained on another model or other weights. See also `load`.
    """
    local = as_path(path) if "://" in os.fspath(path) else pathlib.Path(os.path.expanduser(path))
    directory = local if is_peft(local) else resolve_checkpoint(path, verify)
    if is_peft(directory):
        return read_peft(directory, opened.config)
    manifest = Manifest.read(directory) if is_checkpoint(directory) else None
    if manifest is None or manifest.base is None:
        raise ValueError(
            f"{directory} holds no adapter: it is neither a LoRA run nor a PEFT directory (with "
            f"{PEFT})"
        )
    check_model(manifest.model, opened.config, str(directory))
    if not accept_fingerprint:
        check_processor(manifest.processor, opened.processor, str(directory))
    mesh = mesh_of(opened.params)
    together = spans_all_processes(mesh)
    with undamaged(directory, verify, accept_fingerprint, together=together):
        adapter_params = read_adapter(directory, mesh)
    if not allow_nonfinite:
        check_finite(storage.by_path(adapter_params), str(directory))
    if opened.described is None and opened.weights is None:
        description = describe(storage.by_path(opened.params).items(), manifest.base.dtype)
    else:
        dtype = opened.described_dtype or opened.model.dtype.name
        description = opened.described if dtype == manifest.base.dtype else None
    check_base(description, adapter_params, manifest.base, str(directory))
    return adapter(adapter_params, manifest.base.lora)


def check_not_quantized(opened: Checkpoint, use: str) -> None:
    """Raises ValueError if a checkpoint is stored quantized, which `use` does not allow."""
    if opened.weights:
        raise ValueError(
            f"{opened.directory} holds {opened.weights} weights, which are for inference alone and "
            f"cannot be {use}; name the checkpoint that it was converted from"
        )


def _opened(
    directory, config: ModelConfig, processor: ProcessorConfig, tokenizer: Tokenizer, params: dict
) -> Checkpoint:
    compute = params["vision"]["class_embedding"].dtype  # of a leaf that is never quantized
    return Checkpoint(InternVL(config, compute), config, params, processor, tokenizer, directory)


def _tokenizer(
    directory: pathlib.Path, manifest: Manifest, dtype: str, accept_fingerprint: bool
) -> Tokenizer:
    """Reads the tokenizer and checks that the fingerprint is still the saved one."""
    tokenizer = Tokenizer.from_directory(directory)
    made = fingerprint(manifest.model, manifest.processor, tokenizer, dtype)
    compare(manifest.fingerprint, made, str(directory), accept_fingerprint)
    return tokenizer
