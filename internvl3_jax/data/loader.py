"""From streams of samples to the batches of one process, prepared ahead of time, with a state that
resumes exactly.

The rows of a global batch come from `data.shards` streams, rows/shards from each, and every stream
packs its own. A process prepares the streams whose rows its devices compute (placement.py), so any
number of processes sees the same global sequence of batches, and a run may go on with another
number of them.
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

_AHEAD = 2  # batches ready before they are asked for


@dataclasses.dataclass
class HostBatch:
    """A batch of this process and what the log and the checkpoint need to know about it."""

    batch: Batch
    origins: list[list[tuple[int, int]]]  # of each row: (source, row in the source) of its samples
    states: dict[str, dict]  # shard -> state of its stream after this batch
    skipped: list[str]  # newest reasons of samples that were left out
    skipped_count: int  # since the run began, in this process
    waited: float = 0.0  # seconds that the caller had to wait for it


class BatchLoader:
    """Endless iterator of `HostBatch`. Close it, or use it as a context manager: it owns threads
    and maybe processes.
    """

    def __init__(
        self,
        config: DataConfig,
        processor: ProcessorConfig,
        tokenizer: Tokenizer,
        shards: Sequence[int] | None = None,
    ):
        """shards: the streams to prepare; None: all. `identity` says what the samples are made of;
        see data/identity.py.
        """
        if config.shards < 1 or config.rows % config.shards:
            raise ValueError(
                f"data.rows is {config.rows}; it must be a multiple of data.shards ({config.shards})"
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
                config.pairs_per_row if config.pairs else None,
            )
            for shard in self.shards
        }
        self.ready: queue.Queue = queue.Queue(_AHEAD)
        self.closing = threading.Event()
        self.thread: threading.Thread | None = None

    def restore(self, states: dict[str, dict]) -> None:
        """Goes on after the batch whose `states` these are; those of other processes' shards may be
        among them.
        """
        if self.thread:
            raise RuntimeError("restore comes before the first batch")
        missing = [shard for shard in self.shards if str(shard) not in states]
        if missing:
            raise ValueError(
                f"the checkpoint has data streams {sorted(states)}, not {missing}: data.shards has changed"
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
            self.ready.put(item)  # nothing comes after it
            raise item
        return dataclasses.replace(item, waited=time.perf_counter() - began)

    def _work(self) -> None:
        """Fills `ready`; an exception goes to the caller, who meets it in its place."""
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
