"""Checkpoints: what a directory holds, and how any of them is opened.

    DIR/params/              the parameter tree (Orbax), layers stacked, vocabulary padded
    DIR/internvl3_jax.json   model and processor configuration, fingerprint, hashes
    DIR/tokenizer.json ...   the tokenizer and whatever else travelled along
    DIR/opt_state/, DIR/training.json, DIR/data/SHARD.json
                             in the steps of a training run (RUN/checkpoints/STEP is such a DIR)
    DIR/files.json           sizes of all of it, so that a damaged step is recognised without reading it

`load` also opens released safetensors directories of either layout and hub ids.
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

from internvl3_jax import storage
from internvl3_jax.config import ModelConfig, ProcessorConfig, from_dict, to_dict
from internvl3_jax.data.tokenizer import Tokenizer
from internvl3_jax.find import MANIFEST, damage, find, is_checkpoint, latest_step
from internvl3_jax.fingerprint import compare, fingerprint
from internvl3_jax.model import InternVL, abstract_params
from internvl3_jax.sharding import param_shardings

FORMAT = 1
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


@dataclasses.dataclass
class Manifest:
    """internvl3_jax.json"""

    model: ModelConfig
    processor: ProcessorConfig
    fingerprint: dict
    hashes: dict[str, str] = dataclasses.field(default_factory=dict)

    def write(self, directory: pathlib.Path) -> None:
        values = {"format": FORMAT, **{name: to_dict(getattr(self, name)) for name in ("model", "processor")}}
        values |= {"fingerprint": self.fingerprint, "hashes": self.hashes}
        (directory / MANIFEST).write_text(json.dumps(values, indent=1, ensure_ascii=False), encoding="utf-8")

    @classmethod
    def read(cls, directory: pathlib.Path) -> "Manifest":
        path = directory / MANIFEST
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        if values.get("format") != FORMAT:
            raise ValueError(f"{path} has format {values.get('format')!r}; this version reads {FORMAT}")
        model = from_dict(ModelConfig, values["model"], f"{path}: model")
        processor = from_dict(ProcessorConfig, values["processor"], f"{path}: processor")
        return cls(model, processor, values["fingerprint"], values["hashes"])


def save_checkpoint(
    directory, params, model: ModelConfig, processor: ProcessorConfig, files: Mapping[str, bytes], *, overwrite: bool = False
) -> None:
    """Writes a checkpoint from a tree of jax or numpy arrays. `files` must hold the tokenizer's (`tokenizer.files()`)."""
    with storage.new_directory(directory, overwrite) as partial:
        finish = storage.start_saving(partial / "params", params)
        write_files(partial, model, processor, files, _dtype_name(params))
        finish()


def write_files(
    directory: pathlib.Path,
    model: ModelConfig,
    processor: ProcessorConfig,
    files: Mapping[str, bytes],
    dtype: str,
    hashes: dict[str, str] | None = None,
) -> None:
    """Writes everything of a checkpoint directory but its arrays; the tokenizer among `files` must fit the configuration."""
    tokenizer = Tokenizer.from_files(dict(files), str(directory))
    made = fingerprint(model, processor, tokenizer, dtype)
    if jax.process_index() == 0:
        for name, content in files.items():
            (directory / name).write_bytes(content)
        Manifest(model, processor, made, hashes or {}).write(directory)


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
) -> Checkpoint:
    """Opens a checkpoint directory, a training run, a released safetensors directory (either layout) or a hub id.

    Args:
      dtype: of the parameters and of the computation; None keeps what is stored.
      mesh: of `sharding.make_mesh`: each device gets its part of each parameter, straight from the files. None puts all on the default
        device.
      accept_fingerprint: go on although the files no longer agree with how the checkpoint was made.

    Raises:
      FileNotFoundError: nothing that can be opened is there.
      ValueError: it is damaged, or contradicts itself (FingerprintError), naming what.
    """
    directory = find(path)
    if is_checkpoint(directory):
        manifest = Manifest.read(directory)
        config, processor = manifest.model, manifest.processor
        stored = storage.leaf_infos(directory / "params")
        tokenizer = Tokenizer.from_directory(directory)
        made = fingerprint(config, processor, tokenizer, _dtype_name(stored))
        compare(manifest.fingerprint, made, str(directory), accept_fingerprint)
        target = _targets(directory, config, stored, dtype, _places(config, mesh))
        params = storage.load_tree(directory / "params", target)
    else:
        # The one upward import of the package: reading a released directory is a conversion in memory.
        from convert.source import open_released

        source = open_released(directory, dtype and jnp.dtype(dtype).name, accept_fingerprint)
        config, processor, tokenizer = source.config, source.processor, source.tokenizer
        params = source.params(_places(config, mesh))
    compute = jax.tree.leaves(params)[0].dtype
    return Checkpoint(InternVL(config, compute), config, params, processor, tokenizer, directory)


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
    keep: int | None = None,
    keep_also: Callable[[int], bool] = lambda step: False,
) -> Callable[[], None]:
    """Starts saving a step; training may go on (also donate the arrays) when this returns.

    Call the result before the next save: it waits until the step is complete.

    Args:
      extra: JSON values needed to resume, the same in every process.
      data: states of this process's data streams, by shard.
      keep: delete all but this many of the newest steps once the new one is complete; None keeps all.
      keep_also: steps that are kept whatever their age.
    """
    final = pathlib.Path(run).absolute() / "checkpoints" / str(step)
    partial = storage.start_directory(final, overwrite=final.exists() and damage(final) is not None)
    waits = [storage.start_saving(partial / "params", params), storage.start_saving(partial / "opt_state", opt_state)]
    write_files(partial, model, processor, files, _dtype_name(params))
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
