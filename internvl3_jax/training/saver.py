"""Saves the steps of a run in the background, as WORKDIR/checkpoints/STEP."""

import contextlib
import pathlib

import jax
import numpy as np

from internvl3_jax.checkpoints import steps
from internvl3_jax.checkpoints.orbax_errors import cause
from internvl3_jax.config import TrainConfig
from internvl3_jax.data.loader import HostBatch
from internvl3_jax.io import remote_files
from internvl3_jax.parallel.data_shards import DataShards, total
from internvl3_jax.training.history import RunHistory
from internvl3_jax.training.state import base_of, check_frozen, saved_params
from internvl3_jax.training.step import TrainState


class AsyncSaver:
    """Saves one step at a time while the training continues.

    A step is complete when `poll` finds its writes done, or at the latest with `wait`.
    """

    def __init__(
        self,
        config: TrainConfig,
        workdir: pathlib.Path,
        placement: DataShards,
        files: dict[str, bytes],
        identity: dict[str, str],
    ):
        """Prepares saving; nothing is written yet.

        Args:
          files: Contents by name of the tokenizer's and other files of every checkpoint.
          identity: What the data are made of; see data/identity.py.
        """
        self.config, self.workdir, self.placement = config, workdir, placement
        self.files, self.identity = files, identity
        self.saving: steps.Saving | None = None
        self.step = 0

    def __enter__(self):
        return self

    def __exit__(self, *exception) -> None:
        self.wait()

    def save(self, step: int, state: TrainState, prepared: HostBatch, history: RunHistory) -> None:
        """Starts saving a step; the state may be donated when this returns.

        Args:
          prepared: Batch of the step, with the states of the data streams after it.

        Raises:
          ValueError: Frozen parameters have changed.
          OSError: The step before this one, or this one, cannot be written.
        """
        self.wait()
        check_frozen(self.config, state.params, history, step)
        keeping = self.config.checkpoint
        best = history.best_step if keeping.keep_best else 0
        extra = {
            "past": history.saved(),
            "loss_state": [np.asarray(value).tolist() for value in state.loss_state],
            "identity": self.identity,
        }

        def is_kept(step: int) -> bool:
            return step == best or bool(keeping.keep_every and step % keeping.keep_every == 0)

        self.step = step
        with self._named_errors():
            # A complete step has its rows in the log.
            remote_files.flush()
            self.saving = steps.start_saving_training(
                self.workdir,
                step,
                saved_params(self.config, state.params),
                state.opt_state,
                model=self.config.model,
                processor=self.config.processor,
                files=self.files,
                extra=extra,
                base=base_of(self.config, history),
                data={shard: prepared.states[shard] for shard in map(str, self.placement.saved)},
                keep=keeping.keep,
                keep_also=is_kept,
            )

    def poll(self, together: bool) -> None:
        """Completes the step if all processes have written their shards of it; never blocks.

        Args:
          together: Whether all processes call this at the same step. With several processes they
            ask each other only then.
        """
        if self.saving is None or (jax.process_count() > 1 and not together):
            return
        with self._named_errors():
            done = self.saving.done()
        if int(total(np.array([done], np.int64))[0]) == jax.process_count():
            self.wait()

    def wait(self) -> None:
        """Blocks until the started step is complete. Raises OSError, naming it, if that fails."""
        saving, self.saving = self.saving, None
        if saving is not None:
            with self._named_errors():
                saving()

    @contextlib.contextmanager
    def _named_errors(self):
        """Turns whatever a failed save raises into an OSError of one line that names the step."""
        try:
            yield
        except (OSError, ValueError, RuntimeError, ExceptionGroup) as error:
            self.saving = None
            number = error.errno if isinstance(error, OSError) else None
            path = self.workdir / "checkpoints" / str(self.step)
            text = (
                f"step {self.step} cannot be saved ({cause(error)}); "
                f"the complete steps before it are kept"
            )
            raise OSError(number or 0, text, str(path)) from error
