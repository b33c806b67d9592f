"""Which rows of the global batch a process prepares, and how they become arrays of all devices.

A global batch of R rows comes from S data streams ("shards", data/batches.py), R/S consecutive rows
from each. The mesh says which rows a process's devices compute; the process prepares the streams
that hold them. Where the tensor or context axis spans processes, several prepare the same rows,
which are the same bytes; the first of them saves the stream's state and counts its rows.
"""

import logging
import math
import zlib
from collections.abc import Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils

from internvl3_jax.config import DataConfig
from internvl3_jax.parallel import sharding

log = logging.getLogger(__name__)


class DataShards:
    """Of one process.

    shards: streams that it prepares. rows: their rows' numbers in the global batch. first: of each,
        whether it is the first process with this row. saved: the streams whose states it saves.
    """

    def __init__(self, mesh: jax.sharding.Mesh, config: DataConfig):
        self.mesh, self.config, self.each = mesh, config, config.rows // config.shards
        processes = sorted({device.process_index for device in mesh.devices.flat})
        needed = {process: self._shards(process) for process in processes}
        mine = jax.process_index()
        self.shards = needed[mine]
        self.rows = [
            row
            for shard in self.shards
            for row in range(shard * self.each, (shard + 1) * self.each)
        ]
        before = {shard for process in processes if process < mine for shard in needed[process]}
        self.saved = [shard for shard in self.shards if shard not in before]
        self.first = [row // self.each not in before for row in self.rows]
        share = math.ceil(config.shards / len(processes))
        if len(self.shards) > share and mine == 0:
            log.warning(
                "each of %d processes prepares up to %d of %d data streams; with data.shards = %d none would be prepared twice "
                "(a new order of the data: choose it when a run begins)",
                *(
                    len(processes),
                    max(map(len, needed.values())),
                    config.shards,
                    math.gcd(config.rows, len(processes)),
                ),
            )

    def _shards(self, process: int) -> list[int]:
        return sorted(
            {row // self.each for row in sharding.local_rows(self.mesh, self.config.rows, process)}
        )

    def arrays(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """A batch of this process's rows as arrays of the global batch."""
        return sharding.global_batch(self.mesh, self.config.rows, batch, self.rows)

    def counted(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Those of this process's rows that no earlier process has."""
        return {name: array[self.first] for name, array in batch.items()}

    def digest(self, batch: Mapping[str, np.ndarray]) -> int:
        """Tells whether two runs saw the same bytes in the same rows, whatever their processes.
        Waits for all processes.
        """
        own = np.zeros(self.config.rows, np.uint32)
        for local, (row, first) in enumerate(zip(self.rows, self.first, strict=True)):
            if first:
                for name in sorted(batch):
                    own[row] = zlib.crc32(batch[name][local], int(own[row]))
        return zlib.crc32(np.ascontiguousarray(total(own)))


def total(values: np.ndarray) -> np.ndarray:
    """The sum over all processes, which wait for each other."""
    if jax.process_count() == 1:
        return values
    words = np.ascontiguousarray(values).view(np.uint32)  # jax would cut 64 bits to 32
    gathered = np.asarray(multihost_utils.process_allgather(words)).view(values.dtype)
    return gathered.sum(axis=0, dtype=values.dtype)
