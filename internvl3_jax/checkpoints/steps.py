"""Steps of a training run, RUN/checkpoints/STEP: saved in the background, complete or not there,
verified, and deleted when they are old.

What a step holds is told in checkpoint.py, and what is promised of it in docs/checkpoints.md.
"""

import concurrent.futures
import json
import logging
import os
import pathlib
from collections.abc import Callable, Mapping

import jax

from internvl3_jax.checkpoints import storage
from internvl3_jax.checkpoints.manifest import Base, dtype_name, write_files
from internvl3_jax.checkpoints.verification import undamaged
from internvl3_jax.config import ModelConfig, ProcessorConfig
from internvl3_jax.io import integrity, strict_json
from internvl3_jax.io.checkpoint_paths import completed_steps, damage, is_checkpoint, latest_step
from internvl3_jax.io.integrity import TRAINING
from internvl3_jax.io.unfinished import absolute, remove_finished

DATA = "data"

log = logging.getLogger(__name__)


class Saving:
    """A step that is being written in the background.

    A call waits for this process's writes and makes the step complete; all processes make it
    together. Later calls do nothing.
    """

    def __init__(self, write: Callable[[], None], commit: Callable[[], None]):
        executor = concurrent.futures.ThreadPoolExecutor(1, "saving")
        self._written, self._commit = executor.submit(write), commit
        executor.shutdown(wait=False)

    def done(self) -> bool:
        """Whether this process's writes are finished; never waits. Raises what made them fail, as
        often as it is asked.
        """
        if not self._written.done():
            return False
        self._written.result()
        return True

    def __call__(self) -> None:
        self._written.result()
        commit, self._commit = self._commit, lambda: None
        commit()


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
) -> Saving:
    """Starts saving a step; training may go on (also donate the arrays) when this returns.

    Call the result, in every process, as soon as its `done()` is true and before the next save:
    that makes the step complete.

    Args:
      extra: JSON values needed to resume, the same in every process.
      data: states of this process's data streams, by shard.
      base: of a LoRA run, of whose parameters `params` are those that it trains.
      keep: delete all but this many of the newest steps once the new one is complete; None keeps
          all.
      keep_also: steps that are kept whatever their age.
    """
    unfinished = storage.start_step(steps_of(run) / str(step))
    partial = unfinished.path
    try:
        write_files(partial, model, processor, files, dtype_name(params), base=base)
        if jax.process_index() == 0:
            (partial / TRAINING).write_text(_json({"step": step, **extra}))
        for shard, state in (data or {}).items():
            (partial / DATA).mkdir(exist_ok=True)
            (partial / DATA / f"{shard}.json").write_text(_json(state))
        # Last: Orbax is done in one process when every process has come here and all of their
        # arrays are written.
        waits = [
            storage.start_saving(partial / "params", params),
            storage.start_saving(partial / "opt_state", opt_state),
        ]
    except BaseException:
        unfinished.abandon()
        raise

    def write() -> None:
        try:
            for wait in waits:
                wait()
            if unfinished.creates:
                integrity.seal(partial)
        except Exception as error:
            unfinished.abandon()
            raise OSError(
                f"{unfinished.final} could not be saved ({_first_line(error)}); earlier steps are "
                "whole"
            ) from error

    def commit() -> None:
        storage.commit_directory(unfinished)
        if keep is not None:
            delete_old_steps(run, keep, keep_also)

    return Saving(write, commit)


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]


def save_training(run, step, params, opt_state, **options) -> None:
    """`start_saving_training`, and waits."""
    start_saving_training(run, step, params, opt_state, **options)()


def restore_training(
    run: str | os.PathLike, step: int, abstract_params, abstract_opt_state, verify: str = "full"
) -> tuple:
    """(params, opt_state, extra) of a step; extra["data"] holds the states of all data streams.

    The abstract trees give dtypes and shardings (`jax.eval_shape` of what made the arrays). verify:
    as of `load`.

    Raises:
      FileNotFoundError: there is no such step.
      ValueError: it is damaged (Damaged), or is no step of a training run.
    """
    directory = steps_of(run) / str(step)
    if not is_checkpoint(directory):
        raise FileNotFoundError(
            f"{directory} is no complete checkpoint; the newest of this run is {latest_step(run)}"
        )
    with undamaged(directory, verify, False, together=True):
        values = read_training(run, step)
        data = {path.stem: _read(path) for path in sorted((directory / DATA).glob("*.json"))}
    params = storage.load_tree(directory / "params", abstract_params)
    opt_state = storage.load_tree(directory / "opt_state", abstract_opt_state)
    return params, opt_state, values | {"data": data}


def read_training(run: str | os.PathLike, step: int) -> dict:
    """What a step's training.json holds."""
    return _read(steps_of(run) / str(step) / TRAINING)


def _read(path: pathlib.Path) -> dict:
    return strict_json.read_object(path).values


def _json(values: Mapping) -> str:
    return json.dumps(values, indent=1, allow_nan=False)


def delete_old_steps(
    run: str | os.PathLike, keep: int, keep_also: Callable[[int], bool] = lambda step: False
) -> None:
    """Removes all complete steps of a run but the `keep` newest (one at least) and those that
    `keep_also` names.

    A step that is damaged, or that holds files of others, is left alone and named in the log.
    """
    if jax.process_index():
        return
    directory, whole = steps_of(run), []
    for step in completed_steps(run):
        if wrong := damage(directory / str(step), "sizes"):
            log.warning("%s is damaged and no longer counts: %s", directory / str(step), wrong)
        else:
            whole.append(step)
    for step in whole[: -max(keep, 1)]:
        if not keep_also(step) and (foreign := remove_finished(directory / str(step))):
            log.warning(
                "%s is not deleted: it holds %s, which was not saved with it",
                directory / str(step),
                foreign,
            )


def steps_of(run: str | os.PathLike) -> pathlib.Path:
    """Where a run's steps are."""
    return absolute(run) / "checkpoints"
