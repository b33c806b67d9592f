"""Loads the batches of one process ahead of time, with a state that resumes exactly.

The rows of a global batch come from `data.shards` streams, rows / shards from each, and every
stream packs its own rows. A process prepares the streams whose rows its devices compute
(parallel/data_shards.py). So any number of processes sees the same sequence of global batches, and
a run may resume with another number of processes.
"""

import dataclasses
import queue
import threading
import time
from collections.abc import Sequence

import numpy as np

from internvl3_jax.config import DataConfig, ProcessorConfig
from internvl3_jax.data.batch import Batch
from internvl3_jax.data.identity import data_identity
from internvl3_jax.data.packing import Packer
from internvl3_jax.data.pipeline import open_sources, sample_dataset, sample_stream
from internvl3_jax.data.text.tokenizer import Tokenizer

_AHEAD = 2  # batches prepared ahead of time


@dataclasses.dataclass
class HostBatch:
    """A batch of this process, with what the log and the checkpoint need.

    Attributes:
      origins: For each row, the (source, row in the source) of its samples.
      states: The state of each shard's stream after this batch.
      skipped: Newest reasons of skipped samples.
      skipped_count: Samples that this process has skipped in the run.
      waited: Seconds that the caller waited for the batch.
    """

    batch: Batch
    origins: list[list[tuple[int, int]]]
    states: dict[str, dict]
    skipped: list[str]
    skipped_count: int
    waited: float = 0.0


class BatchLoader:
    """Endless iterator of `HostBatch`, and context manager.

    It has to be closed, since it owns a thread and, with data.workers, processes.
    """

    def __init__(
        self,
        config: DataConfig,
        processor: ProcessorConfig,
        tokenizer: Tokenizer,
        shards: Sequence[int] | None = None,
    ):
        """Opens the data.

        shards: Streams to prepare; None takes all.
        """
        if config.shards < 1 or config.rows % config.shards:
            raise ValueError(
                f"data.rows is {config.rows}; it must be a multiple of data.shards "
                f"({config.shards})"
            )
        self.shards = range(config.shards) if shards is None else shards
        self.rows = config.rows // config.shards
        sources = open_sources(config)
        dataset = sample_dataset(config, processor, tokenizer, sources)
        self.identity = data_identity(config, sources, tokenizer)
        self.packers = {
            shard: Packer(
                iter(sample_stream(dataset, shard, config.shards, config.workers)),
                dataset.__getitem__,
                config.tokens_per_row,
                config.tiles_per_row,
                config.packing_buffer,
                config.max_samples,
            )
            for shard in self.shards
        }
        self.ready: queue.Queue = queue.Queue(_AHEAD)
        self.closing = threading.Event()
        self.thread: threading.Thread | None = None

    def restore(self, states: dict[str, dict]) -> None:
        """Resumes after the batch with these `states`; those of other shards are ignored."""
        if self.thread:
            raise RuntimeError("restore comes before the first batch")
        missing = [shard for shard in self.shards if str(shard) not in states]
        if missing:
            raise ValueError(
                f"the checkpoint has data streams {sorted(states)}, not {missing}: data.shards "
                f"has changed"
            )
        for shard, packer in self.packers.items():
            packer.set_state(states[str(shard)])

    def __iter__(self):
        return self

    def __next__(self) -> HostBatch:
        if not self.thread:
            self.thread = threading.Thread(target=self._work, name="batches", daemon=True)
            self.thread.start()
        began = time.perf_counter()
        item = self.ready.get()
        if isinstance(item, BaseException):
            self.ready.put(item)  # for every later call
            raise item
        return dataclasses.replace(item, waited=time.perf_counter() - began)

    def _work(self) -> None:
        """Fills `ready`; an exception takes the place of its batch and is raised to the caller."""
        while not self.closing.is_set():
            try:
                item = self._prepare()
            except BaseException as error:
                item = error
            while not self.closing.is_set():
                try:
                    self.ready.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if isinstance(item, BaseException):
                return

    def _prepare(self) -> HostBatch:
        rows, origins = [], []
        for packer in self.packers.values():
            for _ in range(self.rows):
                row, origin = next(packer)
                rows.append(row)
                origins.append(origin)
        batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        states = {str(shard): packer.get_state() for shard, packer in self.packers.items()}
        skipped = [
            str(marker["error"]) for packer in self.packers.values() for marker in packer.skipped
        ]
        return HostBatch(
            batch,
            origins,
            states,
            skipped,
            sum(packer.skipped_count for packer in self.packers.values()),
        )

    def close(self) -> None:
        self.closing.set()
        if self.thread:
            self.thread.join()
        for packer in self.packers.values():
            packer.close()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()
