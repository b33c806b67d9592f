"""Steps of a training run, RUN/checkpoints/STEP: saved in the background, restored, deleted.

checkpoint.py lists the files of a step; docs/checkpoints.md says what is guaranteed.
"""

import concurrent.futures
import json
import logging
import os
import pathlib
from collections.abc import Callable, Mapping

import jax

from internvl3_jax.checkpoints import directories, storage
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

    Calling it waits for this process's writes and completes the step; all processes call it
    together. Later calls do nothing.
    """

    def __init__(self, write: Callable[[], None], commit: Callable[[], None]):
        executor = concurrent.futures.ThreadPoolExecutor(1, "saving")
        self._written, self._commit = executor.submit(write), commit
        executor.shutdown(wait=False)

    def done(self) -> bool:
        """Returns whether this process's writes are finished; never waits. Raises their error."""
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
    """Starts saving a step. Training may continue, and donate the arrays, when this returns.

    Every process calls the result as soon as its `done()` is true and before the next save; that
    completes the step.

    Args:
      run: the training run's directory.
      step: its number.
      params: parameters; of a LoRA run only those that it trains.
      opt_state: state of the optimizer.
      model: configuration of the model.
      processor: how images and messages become tiles and ids.
      files: name -> content of the other files, the tokenizer's among them.
      extra: JSON values needed to resume, the same in every process.
      data: states of this process's data streams, by shard.
      base: the base of a LoRA run.
      keep: how many of the newest steps to keep once this one is complete; None keeps all.
      keep_also: returns whether to keep a step of any age.
    """
    # Small files first, then the arrays in the background.
    unfinished = directories.start_step(steps_of(run) / str(step))
    partial, waits = unfinished.path, []
    try:
        write_files(partial, model, processor, files, dtype_name(params), base=base)
        if jax.process_index() == 0:
            (partial / TRAINING).write_text(_json({"step": step, **extra}))
        for shard, state in (data or {}).items():
            (partial / DATA).mkdir(exist_ok=True)
            (partial / DATA / f"{shard}.json").write_text(_json(state))
        # Last, because Orbax finishes when all processes have started and written their arrays.
        waits.append(storage.start_saving(partial / "params", params))
        waits.append(storage.start_saving(partial / "opt_state", opt_state))
    except BaseException:
        _first_error(waits)
        unfinished.abandon()
        raise

    def write() -> None:
        try:
            if error := _first_error(waits):
                raise error
            if unfinished.creates:
                integrity.seal(partial)
        except Exception as error:
            unfinished.abandon()
            raise OSError(
                f"{unfinished.final} could not be saved ({_first_line(error)}); earlier steps are "
                "whole"
            ) from error

    def commit() -> None:
        directories.commit_directory(unfinished)
        if keep is not None:
            delete_old_steps(run, keep, keep_also)

    return Saving(write, commit)


def _first_error(waits: list[Callable[[], None]]) -> Exception | None:
    """Waits for all writes, also after an error: the directory is removed when none is under way,
    or what they still create would stay.
    """
    errors = []
    for wait in waits:
        try:
            wait()
        except Exception as error:
            errors.append(error)
    return errors[0] if errors else None


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]


def save_training(run, step, params, opt_state, **options) -> None:
    """Saves a step and waits for it; see `start_saving_training`."""
    start_saving_training(run, step, params, opt_state, **options)()


def restore_training(
    run: str | os.PathLike, step: int, abstract_params, abstract_opt_state, verify: str = "full"
) -> tuple:
    """Returns (params, opt_state, extra) of a step; extra["data"] holds all data streams' states.

    All processes call it together.

    Args:
      run: the training run's directory.
      step: its number.
      abstract_params: shapes, dtypes and shardings of the parameters.
      abstract_opt_state: those of the optimizer's state.
      verify: see `load`.

    Raises:
      FileNotFoundError: there is no such step.
      ValueError: it is damaged (Damaged) or not a step of a training run.
    """
    directory = steps_of(run) / str(step)
    if not is_checkpoint(directory):
        raise FileNotFoundError(
            f"{directory} is not a complete checkpoint; the newest of this run is "
            f"{latest_step(run)}"
        )
    with undamaged(directory, verify, False, together=True):
        values = read_training(run, step)
        data = {path.stem: _read(path) for path in sorted((directory / DATA).glob("*.json"))}
    params = storage.load_tree(directory / "params", abstract_params)
    opt_state = storage.load_tree(directory / "opt_state", abstract_opt_state)
    return params, opt_state, values | {"data": data}


def read_training(run: str | os.PathLike, step: int) -> dict:
    """Reads training.json of a step."""
    return _read(steps_of(run) / str(step) / TRAINING)


def _read(path: pathlib.Path) -> dict:
    return strict_json.read_object(path).values


def _json(values: Mapping) -> str:
    return json.dumps(values, indent=1, allow_nan=False)


def delete_old_steps(
    run: str | os.PathLike, keep: int, keep_also: Callable[[int], bool] = lambda step: False
) -> None:
    """Deletes all complete steps but the `keep` newest (at least one) and those of `keep_also`.

    A step that is damaged or holds other files stays and is named in the log.
    """
    if jax.process_index():
        return
    directory, intact = steps_of(run), []
    for step in completed_steps(run):
        if wrong := damage(directory / str(step), "sizes"):
            log.warning("%s is damaged and no longer counts: %s", directory / str(step), wrong)
        else:
            intact.append(step)
    for step in intact[: -max(keep, 1)]:
        if not keep_also(step) and (foreign := remove_finished(directory / str(step))):
            log.warning(
                "%s is not deleted: it holds %s, which was not saved with it",
                directory / str(step),
                foreign,
            )


def steps_of(run: str | os.PathLike) -> pathlib.Path:
    """Returns RUN/checkpoints."""
    return absolute(run) / "checkpoints"
