"""Checks of a run while it trains: finite losses, equal hosts, and which samples were skipped.

WORKDIR/skipped.txt   one line for each reason: step, tab, reason
"""

import json
import logging
import pathlib
import re
import zlib

import jax
import numpy as np

from internvl3_jax.config import TrainConfig, to_dict
from internvl3_jax.data.batch import Batch
from internvl3_jax.data.loader import HostBatch
from internvl3_jax.io import jsonl
from internvl3_jax.io.terminal import one_line
from internvl3_jax.parallel import multihost
from internvl3_jax.parallel.data_shards import total
from internvl3_jax.training.optimizer import Optimizer
from internvl3_jax.training.step import trained_paths

log = logging.getLogger(__name__)


class FiniteCheck:
    """Raises if the loss or gradients are not finite, naming the samples of the step."""

    def __init__(self, params: dict, optimizer: Optimizer, sources: list[str]):
        """Remembers no step yet. sources: names of the data sources."""
        self.paths, self.sources, self.latest = trained_paths(params, optimizer), sources, None

    def add(self, step: int, metrics: dict, prepared: HostBatch) -> None:
        """Checks the step before this one, so that the device is never idle meanwhile."""
        self.check()
        self.latest = (step, metrics, prepared)

    def check(self) -> None:
        """Waits for the latest step and checks it.

        Raises:
          FloatingPointError: The loss or a gradient is not finite, or the gradient of a trained
            leaf is zero.
        """
        if self.latest is None:
            return
        (step, metrics, prepared), self.latest = self.latest, None
        if not bool(metrics["finite"]):
            values = ", ".join(f"{name} {float(metrics[name])}" for name in ("loss", "grad_norm"))
            raise FloatingPointError(f"{values} at step {step}{self._samples(prepared)}")

        # A batch without images gives the vision tower and projector no gradient.
        index = int(metrics["zero_gradient"])
        if index < 0:
            return
        is_language = self.paths[index].removeprefix("lora/").startswith("language")
        if is_language or prepared.batch["tiles"].any():
            raise FloatingPointError(
                f"the gradient of {self.paths[index]} is all zero at step {step}"
                f"{self._samples(prepared)}"
            )

    def _samples(self, prepared: HostBatch) -> str:
        rows = [
            ", ".join(f"{self.sources[source]} row {row}" for source, row in origin)
            for origin in prepared.origins
        ]
        return "; the last checkpoint is kept. Samples: " + " | ".join(rows)


def compare_hosts(
    config: TrainConfig, identity: dict[str, str], batch: Batch, step: int, first: bool
) -> None:
    """Raises on every host unless all have the same configuration, data, shapes and JAX version.

    Args:
      identity: What the data are made of; see data/identity.py.
      first: Whether the hosts have just compiled. One with a filled compilation cache is ready at
        once, another takes minutes.
    """
    shapes = ", ".join(
        f"{name} {array.dtype}{list(array.shape[1:])}" for name, array in sorted(batch.items())
    )
    values = {
        "configuration": zlib.crc32(json.dumps(to_dict(config)).encode()),
        "a row of the batch": shapes,
        "the data": zlib.crc32(json.dumps(identity).encode()),
        "jax": jax.__version__,
    }
    multihost.assert_same_on_all_hosts(step, values, seconds=3600 if first else 300)


class SkipLog:
    """Writes each new reason for which a sample was skipped, with the step that noted it."""

    def __init__(self, workdir: pathlib.Path, step: int):
        """Opens the file. step: number of steps that are done already; later lines are dropped."""
        process = f".{jax.process_index()}" if jax.process_count() > 1 else ""
        self.path, self.known = workdir / f"skipped{process}.txt", set()
        if jax.process_index() == 0:
            for path in sorted(workdir.iterdir()):
                if re.fullmatch(r"skipped(\.\d+)?\.txt", path.name):
                    self._cut_back(path, step)

    def _cut_back(self, path: pathlib.Path, step: int) -> None:
        kept = []
        for raw in jsonl.whole_lines(path):
            line = raw.decode("utf-8", "replace").rstrip("\n")
            number, _, reason = line.partition("\t")
            if number.isdecimal() and int(number) > step:
                continue
            kept.append(line)
            if path == self.path:
                self.known.add(reason)
        jsonl.rewrite(path, kept)

    def note(self, step: int, prepared: HostBatch) -> int:
        """Writes new reasons. Returns the number of samples skipped since the run began.

        All processes must call this together; the number is the sum over them.
        """
        reasons = dict.fromkeys(map(one_line, prepared.skipped))
        new = [reason for reason in reasons if reason not in self.known]
        if new:
            self.known.update(new)
            jsonl.append(self.path, [f"{step}\t{reason}" for reason in new])
            log.warning("skipped: %s", "; ".join(new))
        return int(total(np.array([prepared.skipped_count], np.int64))[0])
