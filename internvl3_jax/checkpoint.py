"""Checkpoints: what a directory holds, and how any of them is opened.

    DIR/params/              the parameter tree (Orbax), layers stacked, vocabulary padded
    DIR/internvl3_jax.json   model and processor configuration, fingerprint, hashes
    DIR/tokenizer.json ...   the tokenizer and whatever else travelled along
    DIR/opt_state/, DIR/training.json, DIR/data/SHARD.json
                             in the steps of a training run (RUN/checkpoints/STEP is such a DIR)
    DIR/files.json           sizes of all of it, so that a damaged step is recognised without reading it

A step of a LoRA run holds adapters alone and names their base (adapters.py). `load` puts them on it; it also opens released safetensors
directories of either layout and hub ids.
"""

import dataclasses
import functools
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from internvl3_jax import lora, storage
from internvl3_jax.adapters import Adapter, adapter, check_base, check_model, check_processor, describe, put_on, read_own
from internvl3_jax.config import ModelConfig, ProcessorConfig
from internvl3_jax.data.tokenizer import Tokenizer
from internvl3_jax.find import MANIFEST, PEFT, damage, find, is_checkpoint, is_peft, latest_step
from internvl3_jax.fingerprint import compare, fingerprint
from internvl3_jax.manifest import Base, Manifest, write_files
from internvl3_jax.model import InternVL, abstract_params
from internvl3_jax.sharding import param_shardings

TRAINING = "training.json"
DATA = "data"


@dataclasses.dataclass
class Checkpoint:
    """An opened checkpoint. `model.apply({"params": params}, batch)` computes logits."""

    model: InternVL
    config: ModelConfig
    params: dict
    processor: ProcessorConfig
    tokenizer: Tokenizer
    directory: pathlib.Path
    adapters: dict[str, Adapter] = dataclasses.field(default_factory=dict)  # that can be put on, by name
    described: dict[str, str] | None = None  # of a training's base: `adapters.describe`, before it was quantized


def save_checkpoint(
    directory, params, model: ModelConfig, processor: ProcessorConfig, files: Mapping[str, bytes], *, overwrite: bool = False
) -> None:
    """Writes a checkpoint from a tree of jax or numpy arrays. `files` must hold the tokenizer's (`tokenizer.files()`)."""
    with storage.new_directory(directory, overwrite) as partial:
        finish = storage.start_saving(partial / "params", params)
        write_files(partial, model, processor, files, _dtype_name(params))
        finish()


def _dtype_name(params) -> str:
    names = sorted({jnp.dtype(leaf.dtype).name for leaf in jax.tree.leaves(params)})
    return "+".join(names)


# --- opening ------------------------------------------------------------------------------------------------------------------


def load(
    path: str | os.PathLike,
    *,
    dtype=None,
    mesh: jax.sharding.Mesh | None = None,
    accept_fingerprint: bool = False,
    adapters: Mapping[str, str | os.PathLike] | None = None,
    base: str | os.PathLike | None = None,
    prepare: Callable[[str, jax.Array], object] | None = None,
) -> Checkpoint:
    """Opens a checkpoint directory, a training run, a released safetensors directory (either layout) or a hub id.

    A LoRA run is opened with its adapters merged: `params` is an ordinary tree.

    Args:
      dtype: of the parameters and of the computation; None keeps what is stored.
      mesh: of `sharding.make_mesh`: each device gets its part of each parameter, straight from the files. None puts all on the default
        device.
      accept_fingerprint: go on although the files no longer agree with how the checkpoint was made.
      adapters: name -> LoRA run or PEFT directory; `Checkpoint.adapters` holds them, for `Chat` to choose from.
      base: of a LoRA run, where its base is now.
      prepare: called with each parameter's path and value as soon as it is read; what it returns takes its place.

    Raises:
      FileNotFoundError: nothing that can be opened is there.
      ValueError: it is damaged, or contradicts itself (FingerprintError), naming what.
    """
    directory = find(path)
    manifest = Manifest.read(directory) if is_checkpoint(directory) else None
    if manifest is None:
        opened = _load_released(directory, dtype, mesh, accept_fingerprint, prepare)
    elif manifest.base is None:
        opened = _load_whole(directory, manifest, dtype, mesh, accept_fingerprint, prepare)
    else:
        opened = _load_lora(directory, manifest, dtype, mesh, accept_fingerprint, base)
        if prepare is not None:
            opened.params = storage.nest({path: prepare(path, leaf) for path, leaf in storage.by_path(opened.params).items()})
    if base is not None and (manifest is None or manifest.base is None):
        raise ValueError(f"{directory} is no LoRA run: it has no base, and {base} would not be looked at")
    opened.adapters = {name: load_adapter(where, opened, accept_fingerprint) for name, where in (adapters or {}).items()}
    return opened


def _load_released(directory: pathlib.Path, dtype, mesh, accept_fingerprint: bool, prepare) -> Checkpoint:
    # The one upward import of the package: reading a released directory is a conversion in memory.
    from convert.source import open_released

    source = open_released(directory, dtype and jnp.dtype(dtype).name, accept_fingerprint)
    params = source.params(_places(source.config, mesh), prepare)
    return _opened(directory, source.config, source.processor, source.tokenizer, params)


def _load_whole(directory: pathlib.Path, manifest: Manifest, dtype, mesh, accept_fingerprint: bool, prepare) -> Checkpoint:
    stored = storage.leaf_infos(directory / "params")
    tokenizer = _tokenizer(directory, manifest, _dtype_name(stored), accept_fingerprint)
    target = _targets(directory, manifest.model, stored, dtype, _places(manifest.model, mesh))
    params = storage.load_tree(directory / "params", target, prepare)
    return _opened(directory, manifest.model, manifest.processor, tokenizer, params)


def _load_lora(directory: pathlib.Path, manifest: Manifest, dtype, mesh, accept_fingerprint: bool, base) -> Checkpoint:
    """The run's base with its adapters merged into it."""
    own = read_own(directory, mesh)
    tokenizer = _tokenizer(directory, manifest, _dtype_name(own), accept_fingerprint)
    under = load(base or manifest.base.path, dtype=manifest.base.dtype, mesh=mesh, accept_fingerprint=accept_fingerprint)
    check_model(manifest.model, under.config, str(directory))
    check_base(describe(storage.by_path(under.params).items(), manifest.base.dtype), own, manifest.base, str(directory))
    tree = put_on(under.params, own, manifest.base)
    del under
    params = lora.merged(tree, manifest.base.lora, dtype or manifest.base.dtype)
    return _opened(directory, manifest.model, manifest.processor, tokenizer, params)


def load_adapter(path: str | os.PathLike, opened: Checkpoint, accept_fingerprint: bool = False) -> Adapter:
    """The adapter of a LoRA run, or of a PEFT directory or hub id (either layout), to be put on an opened checkpoint.

    Raises:
      FileNotFoundError: neither is there.
      ValueError: it is an adapter of another model, or of this one with other weights; or, unless accept_fingerprint, one that was trained
        with another processor.
    """
    local = pathlib.Path(path).expanduser()
    directory = local if is_peft(local) else find(path)
    if is_peft(directory):
        from convert.peft import read_peft

        return read_peft(directory, opened.config)
    manifest = Manifest.read(directory) if is_checkpoint(directory) else None
    if manifest is None or manifest.base is None:
        raise ValueError(f"{directory} holds no adapter: it is neither a LoRA run nor a PEFT directory (with {PEFT})")
    check_model(manifest.model, opened.config, str(directory))
    if not accept_fingerprint:
        check_processor(manifest.processor, opened.processor, str(directory))
    own = read_own(directory, _mesh_of(opened.params))
    if opened.described is None:
        found = describe(storage.by_path(opened.params).items(), manifest.base.dtype)
    else:
        found = opened.described if opened.model.dtype == jnp.dtype(manifest.base.dtype) else None
    check_base(found, own, manifest.base, str(directory))
    return adapter(own, manifest.base.lora)


def _opened(directory, config: ModelConfig, processor: ProcessorConfig, tokenizer: Tokenizer, params: dict) -> Checkpoint:
    compute = params["vision"]["class_embedding"].dtype  # of a leaf that is never quantized
    return Checkpoint(InternVL(config, compute), config, params, processor, tokenizer, directory)


def _tokenizer(directory: pathlib.Path, manifest: Manifest, dtype: str, accept_fingerprint: bool) -> Tokenizer:
    """The directory's, after checking that with it the fingerprint is what it was."""
    tokenizer = Tokenizer.from_directory(directory)
    made = fingerprint(manifest.model, manifest.processor, tokenizer, dtype)
    compare(manifest.fingerprint, made, str(directory), accept_fingerprint)
    return tokenizer


def _mesh_of(params: dict) -> jax.sharding.Mesh | None:
    sharding = jax.tree.leaves(params)[0].sharding
    return sharding.mesh if isinstance(sharding, jax.NamedSharding) else None


def _places(config: ModelConfig, mesh: jax.sharding.Mesh | None) -> dict[str, jax.sharding.Sharding]:
    """Path -> where the parameter goes."""
    wanted = _abstract_params(config)
    if mesh is None:
        return dict.fromkeys(storage.by_path(wanted), jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    return storage.by_path(param_shardings(wanted, mesh))


@functools.cache
def _abstract_params(config: ModelConfig) -> dict:
    return abstract_params(config)  # tracing takes longer than reading a small checkpoint


def _targets(directory: pathlib.Path, config: ModelConfig, stored: dict, dtype, places: dict):
    """The abstract tree to load: shapes of the configuration, checked against what is stored."""
    wanted = storage.by_path(_abstract_params(config))
    wrong = [
        f"\n  {path}: stored {_shape(stored.get(path))}, wanted {_shape(wanted.get(path))}"
        for path in sorted(stored.keys() | wanted.keys())
        if _shape(stored.get(path)) != _shape(wanted.get(path))
    ]
    if wrong:
        raise ValueError(f"{directory}: the parameters do not fit the model in {MANIFEST}:{''.join(wrong[:12])}")
    return storage.nest(
        {
            path: jax.ShapeDtypeStruct(leaf.shape, dtype or stored[path].dtype, sharding=places[path])
            for path, leaf in wanted.items()
        }
    )


def _shape(leaf) -> str:
    return "nothing" if leaf is None else str(tuple(leaf.shape))


# --- training runs ------------------------------------------------------------------------------------------------------------


def start_saving_training(
    run: str | os.PathLike,
    step: int,
    params,
    opt_state,
    *,
    model: ModelConfig,
    processor: ProcessorConfig,
    files: Mapping[str, bytes],
    extra: Mapping,
    data: Mapping[str, Mapping] | None = None,
    base: Base | None = None,
    keep: int | None = None,
    keep_also: Callable[[int], bool] = lambda step: False,
) -> Callable[[], None]:
    """Starts saving a step; training may go on (also donate the arrays) when this returns.

    Call the result before the next save: it waits until the step is complete.

    Args:
      extra: JSON values needed to resume, the same in every process.
      data: states of this process's data streams, by shard.
      base: of a LoRA run, of whose parameters `params` are those that it trains.
      keep: delete all but this many of the newest steps once the new one is complete; None keeps all.
      keep_also: steps that are kept whatever their age.
    """
    final = pathlib.Path(run).absolute() / "checkpoints" / str(step)
    partial = storage.start_directory(final, overwrite=final.exists() and damage(final) is not None)
    waits = [storage.start_saving(partial / "params", params), storage.start_saving(partial / "opt_state", opt_state)]
    write_files(partial, model, processor, files, _dtype_name(params), base=base)
    if jax.process_index() == 0:
        (partial / TRAINING).write_text(json.dumps({"step": step, **extra}, indent=1))
    for shard, state in (data or {}).items():
        (partial / DATA).mkdir(exist_ok=True)
        (partial / DATA / f"{shard}.json").write_text(json.dumps(state))

    def finish() -> None:
        for wait in waits:
            wait()
        storage.commit_directory(final, listed=True)
        if keep is not None:
            delete_old_steps(run, keep, keep_also)

    return finish


def save_training(run, step, params, opt_state, **options) -> None:
    """`start_saving_training`, and waits."""
    start_saving_training(run, step, params, opt_state, **options)()


def restore_training(run: str | os.PathLike, step: int, abstract_params, abstract_opt_state) -> tuple:
    """(params, opt_state, extra) of a step; extra["data"] holds the states of all data streams.

    The abstract trees give dtypes and shardings (`jax.eval_shape` of what made the arrays).
    """
    directory = pathlib.Path(run).absolute() / "checkpoints" / str(step)
    if not is_checkpoint(directory):
        raise FileNotFoundError(f"{directory} is no complete checkpoint; the newest of this run is {latest_step(run)}")
    params = storage.load_tree(directory / "params", abstract_params)
    opt_state = storage.load_tree(directory / "opt_state", abstract_opt_state)
    data = {path.stem: json.loads(path.read_text()) for path in sorted((directory / DATA).glob("*.json"))}
    return params, opt_state, json.loads((directory / TRAINING).read_text()) | {"data": data}


def delete_old_steps(run: str | os.PathLike, keep: int, keep_also: Callable[[int], bool] = lambda step: False) -> None:
    """Removes all complete steps of a run but the `keep` newest and those that `keep_also` names."""
    directory = pathlib.Path(run).absolute() / "checkpoints"
    steps = sorted(int(entry.name) for entry in directory.iterdir() if entry.name.isdigit() and is_checkpoint(entry))
    if jax.process_index() == 0:
        for step in steps[:-keep] if keep else steps:
            if not keep_also(step):
                shutil.rmtree(directory / str(step))
