"""A training run's life in its directory: where it is resumed, when it is saved, why it stops.

WORKDIR/config.json        the resolved configuration; see workdir.py
WORKDIR/checkpoints/STEP   parameters, optimizer, data streams; see checkpoint.py
WORKDIR/log.jsonl          a row every `log_every` steps; see meter.py
WORKDIR/answers.jsonl      answers to held-out questions; see held_out.py
WORKDIR/skipped.txt        reasons of samples that were left out: step, tab, reason
"""

import contextlib
import logging
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np

from internvl3_jax.checkpoints import steps
from internvl3_jax.config import TrainConfig
from internvl3_jax.data.identity import check_identity
from internvl3_jax.data.loader import BatchLoader, HostBatch
from internvl3_jax.io import jsonl, remote_files, strict_json
from internvl3_jax.io.command_line import message
from internvl3_jax.io.terminal import one_line
from internvl3_jax.parallel import sharding
from internvl3_jax.parallel.data_shards import DataShards, total
from internvl3_jax.training import mpo
from internvl3_jax.training.optimizer import Optimizer
from internvl3_jax.training.param_table import frozen_hash
from internvl3_jax.training.run_log import LOG, read_rows
from internvl3_jax.training.start import (
    RunHistory,
    base_of,
    check_adapters_learn,
    check_frozen,
    restore_on_base,
    trainable,
    warm_start,
)
from internvl3_jax.training.step import (
    TrainState,
    init_loss_state,
    init_state,
    shardings_of,
    trained_paths,
)

UNKNOWN = -1  # a newest step that has not been looked for
_DISK = (
    "No space left on device",
    "Disk quota exceeded",
    "Read-only file system",
    "Permission denied",
    "Input/output error",
)

log = logging.getLogger(__name__)


def restore_or_init(
    config: TrainConfig,
    workdir: pathlib.Path,
    model,
    optimizer: Optimizer,
    batches: BatchLoader,
    mesh: jax.sharding.Mesh,
    step: int | None,
) -> tuple[TrainState, RunHistory]:
    """From a step of the run, which also sets `batches` to where they were; else from
    `config.init_from`, or random.

    step: of `agreed_step`.

    Each array is made or read where it belongs on the mesh, which may be another one than the
    checkpoint was saved from.
    """
    size = config.model.vision.image_size
    row = np.zeros((1, 1), np.int32)
    example = {
        "tokens": row,
        "positions": row,
        "segments": row,
        "tiles": np.zeros((1, 1, size, size, 3), np.uint8),
    }

    def init():
        return init_state(
            model,
            optimizer,
            example,
            config.seed,
            jnp.dtype(config.param_dtype),
            config.lora,
            init_loss_state(config),
        )

    if config.lora.rank and not config.init_from:
        raise ValueError(
            "lora.rank is above 0 and init_from is empty: name the base that the adapters are trained beside"
        )
    shapes = jax.eval_shape(init)
    check_adapters_learn(config, shapes.params)
    places = shardings_of(shapes, mesh, config.offload_optimizer)
    if step is None:
        past = RunHistory()
        if config.init_from:
            state = warm_start(config, optimizer, places, past)
        else:
            state = jax.jit(init, out_shardings=places)()
        past.frozen = frozen_hash(state.params, config.optimizer.freeze)
        return state, past
    check_data(config, workdir, batches, step)
    wanted = sharding.abstract(shapes, places)
    stored = trainable(config, wanted.params)
    params, opt_state, extra = steps.restore_training(workdir, step, stored, wanted.opt_state)
    past = RunHistory.of_saved(extra["past"])
    if config.lora.rank:
        params = restore_on_base(config, workdir, step, params, places, past)
    batches.restore(extra["data"])
    if jax.process_index() == 0:
        print(f"going on from step {step} of {workdir}", flush=True)
    check_frozen(config, params, past, step)
    loss_state = [_everywhere(np.float32(value), mesh) for value in extra["loss_state"]]
    loss_state = mpo.RewardShift(*loss_state) if loss_state else ()
    return TrainState(_everywhere(np.int32(step), mesh), params, opt_state, loss_state), past


def check_data(config: TrainConfig, workdir: pathlib.Path, batches: BatchLoader, step: int) -> None:
    """Before any array is read: that the samples are still made of the same. Steps of earlier
    versions do not say of what.
    """
    if saved := _training(workdir, step).get("identity", dict, {}):
        check_identity(saved, batches.identity, step, config.accept_changed_data)


def _training(workdir: pathlib.Path, step: int) -> strict_json.Object:
    return strict_json.Object(
        steps.read_training(workdir, step),
        str(workdir / "checkpoints" / str(step) / steps.TRAINING),
    )


def _everywhere(value, mesh):
    return jax.device_put(value, jax.NamedSharding(mesh, jax.P()))


def is_finished(config: TrainConfig, workdir: pathlib.Path, step: int | None) -> bool:
    """Whether the last step is saved."""
    return step == config.steps


def farewell(config: TrainConfig, workdir: pathlib.Path) -> str:
    """What to do with a run that has reached its end, and which step is best."""
    past = RunHistory.of_saved(_training(workdir, config.steps).get("past", dict, {}))
    step = past.best_step
    held_out = (
        f"; the lowest held-out loss, {past.best:.4g}, is that of step {step}"
        if config.held_out and step
        else ""
    )
    is_other = bool(held_out) and step != config.steps
    there = is_other and (workdir / "checkpoints" / str(step)).is_dir()
    chosen = workdir / "checkpoints" / str(step) if there else workdir
    gone = " (not kept: keep_best is off)" if is_other and not there else ""
    return (
        f"{workdir} is finished: step {config.steps} of {config.steps}{held_out}{gone}\n"
        f"ask it:    python infer.py --checkpoint {chosen}\n"
        f"export it: python -m convert {chosen} DIRECTORY --to hf{_wrong_log(config, workdir)}"
    )


def _wrong_log(config: TrainConfig, workdir: pathlib.Path) -> str:
    """A line about a log that does not tell of the whole run; a finished run does not write it
    again.
    """
    path = workdir / LOG
    try:
        reached = max((row["step"] for row in read_rows(path)), default=0)
        if reached >= config.steps and not jsonl.torn(path):
            return ""
        why = f"is damaged or incomplete: its last row is of step {reached} of {config.steps}"
    except (ValueError, OSError) as error:
        why = f"cannot be read ({message(error)})"
    return f"\nwarning: {path} {why}; the checkpoints are whole"


class AsyncSaver:
    """Saves steps in the background, one at a time. A step is complete when `poll` finds its writes
    done, or at the latest with `wait`.
    """

    def __init__(
        self,
        config: TrainConfig,
        workdir: pathlib.Path,
        placement: DataShards,
        files: dict[str, bytes],
        identity: dict[str, str],
    ):
        """identity: of the data; see data/identity.py."""
        self.config, self.workdir, self.placement, self.files, self.identity = (
            config,
            workdir,
            placement,
            files,
            identity,
        )
        self.saving: steps.Saving | None = None
        self.step = 0

    def __enter__(self):
        return self

    def __exit__(self, *exception) -> None:
        self.wait()

    def start(self, step: int, state: TrainState, prepared: HostBatch, past: RunHistory) -> None:
        """Training may go on, and donate the state, when this returns."""
        self.wait()
        check_frozen(self.config, state.params, past, step)
        best = past.best_step if self.config.keep_best else 0
        extra = {
            "past": past.saved(),
            "loss_state": [float(value) for value in state.loss_state],
            "identity": self.identity,
        }

        def keep_also(step: int) -> bool:
            return step == best or bool(
                self.config.keep_every and step % self.config.keep_every == 0
            )

        self.step = step
        with self._named():
            remote_files.flush()  # a complete step has its rows in the log
            self.saving = steps.start_saving_training(
                self.workdir,
                step,
                trainable(self.config, state.params),
                state.opt_state,
                model=self.config.model,
                processor=self.config.processor,
                files=self.files,
                extra=extra,
                base=base_of(self.config, past),
                data={shard: prepared.states[shard] for shard in map(str, self.placement.saved)},
                keep=self.config.keep,
                keep_also=keep_also,
            )

    def poll(self, together: bool) -> None:
        """Completes the step if all processes have written their parts of it; never waits for a
        disk.

        together: whether all processes are here. Where there are several, they ask each other only
            then.
        """
        if self.saving is None or (jax.process_count() > 1 and not together):
            return
        with self._named():
            done = self.saving.done()
        if int(total(np.array([done], np.int64))[0]) == jax.process_count():
            self.wait()

    def wait(self) -> None:
        """Until what was started is complete. OSError naming the step if it cannot be saved."""
        saving, self.saving = self.saving, None
        if saving is not None:
            with self._named():
                saving()

    @contextlib.contextmanager
    def _named(self):
        """A failed save in one line that names the step, whatever raised it; the steps before it
        stay.
        """
        try:
            yield
        except (OSError, ValueError, RuntimeError, ExceptionGroup) as error:
            self.saving = None
            number = error.errno if isinstance(error, OSError) else None
            place = self.workdir / "checkpoints" / str(self.step)
            text = f"step {self.step} cannot be saved ({_cause(error)}); the complete steps before it are kept"
            raise OSError(number or 0, text, str(place)) from error


def _cause(error: BaseException) -> str:
    """What is behind an error of the libraries that write, in a few words: the system's own if it
    is there.
    """
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    text = message(error)
    known = next((words for words in _DISK if words.lower() in text.lower()), None)
    return known or text[:300]


class FiniteCheck:
    """Stops the run at a step whose numbers make no sense, naming the samples that it was computed
    from.
    """

    def __init__(self, params, optimizer: Optimizer, sources: list[str]):
        self.paths, self.sources, self.latest = trained_paths(params, optimizer), sources, None

    def add(self, step: int, metrics: dict, prepared: HostBatch) -> None:
        """Looks at the step before this one, so that the device is never idle meanwhile."""
        self.check()
        self.latest = (step, metrics, prepared)

    def check(self) -> None:
        """Waits for the latest step. FloatingPointError at a loss or gradient that is not finite,
        or a trained leaf without gradient.
        """
        if self.latest is None:
            return
        (step, metrics, prepared), self.latest = self.latest, None
        if not bool(metrics["finite"]):
            values = ", ".join(f"{name} {float(metrics[name])}" for name in ("loss", "grad_norm"))
            raise FloatingPointError(f"{values} at step {step}{self._samples(prepared)}")
        index = int(metrics["zero_gradient"])
        if index >= 0 and (
            self.paths[index].removeprefix("lora/").startswith("language")
            or prepared.batch["tiles"].any()
        ):
            raise FloatingPointError(
                f"the gradient of {self.paths[index]} is all zero at step {step}{self._samples(prepared)}"
            )

    def _samples(self, prepared: HostBatch) -> str:
        rows = [
            ", ".join(f"{self.sources[source]} row {row}" for source, row in origin)
            for origin in prepared.origins
        ]
        return "; the last checkpoint is kept. Samples: " + " | ".join(rows)


class SkipLog:
    """Writes down each new reason for which a sample was left out, with the step at which it was
    noted.
    """

    def __init__(self, workdir: pathlib.Path, step: int):
        """step: at which the run is resumed; what was noted after it is dropped."""
        process = f".{jax.process_index()}" if jax.process_count() > 1 else ""
        self.path, self.known = workdir / f"skipped{process}.txt", set()
        if jax.process_index() == 0:
            for path in sorted(workdir.iterdir()):
                if re.fullmatch(r"skipped(\.\d+)?\.txt", path.name):
                    self._cut_back(path, step)

    def _cut_back(self, path: pathlib.Path, step: int) -> None:
        kept = []
        for line in (
            line.decode("utf-8", "replace").rstrip("\n") for line in jsonl.whole_lines(path)
        ):
            number, tab, reason = line.partition("\t")
            if not (tab and number.isdigit() and int(number) > step):
                kept.append(line)
                if path == self.path:
                    self.known.add(reason if tab and number.isdigit() else line)
        jsonl.rewrite(path, kept)

    def note(self, step: int, prepared: HostBatch) -> int:
        """Samples that all processes have left out since the run began; they wait for each other."""
        new = [
            reason
            for reason in dict.fromkeys(map(one_line, prepared.skipped))
            if reason not in self.known
        ]
        if new:
            self.known.update(new)
            jsonl.append(self.path, [f"{step}\t{reason}" for reason in new])
            log.warning("left out: %s", "; ".join(new))
        return int(total(np.array([prepared.skipped_count], np.int64))[0])
