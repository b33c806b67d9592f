"""Rows of the global batch that each process prepares, and how they become global arrays.

A global batch of R rows comes from S data shards (streams of data/loader.py), R/S consecutive rows
from each. The mesh determines which rows the devices of a process compute, and the process prepares
the shards that hold them. Where the tensor or context axis spans processes, several processes
prepare the same rows, with the same bytes. The lowest-ranked of them saves the state of the shard
and counts its rows.
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
    """The data shards of this process.

    Attributes:
      shards: Indices of the shards that this process prepares.
      rows: Indices of their rows in the global batch.
      first: For each row, whether no lower-ranked process prepares it.
      saved: The shards whose states this process saves.
    """

    def __init__(self, mesh: jax.sharding.Mesh, config: DataConfig):
        self.mesh, self.config = mesh, config
        self.rows_per_shard = config.rows // config.shards
        processes = sorted({device.process_index for device in mesh.devices.flat})
        shards = {process: self._shards(process) for process in processes}

        # The rows of this process's shards.
        rank = jax.process_index()
        self.shards = shards[rank]
        self.rows = [
            row
            for shard in self.shards
            for row in range(shard * self.rows_per_shard, (shard + 1) * self.rows_per_shard)
        ]

        # Which of them no lower-ranked process has.
        lower = {shard for process in processes if process < rank for shard in shards[process]}
        self.saved = [shard for shard in self.shards if shard not in lower]
        self.first = [row // self.rows_per_shard not in lower for row in self.rows]

        if rank == 0 and len(self.shards) > math.ceil(config.shards / len(processes)):
            log.warning(
                "each of %d processes prepares up to %d of %d data shards; with data.shards = %d "
                "none is prepared twice. That changes the order of the data, so set it before the "
                "run starts",
                len(processes),
                max(map(len, shards.values())),
                config.shards,
                math.gcd(config.rows, len(processes)),
            )

    def _shards(self, process: int) -> list[int]:
        rows = sharding.local_rows(self.mesh, self.config.rows, process)
        return sorted({row // self.rows_per_shard for row in rows})

    def arrays(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """Makes global arrays of a batch of this process's rows."""
        return sharding.global_batch(self.mesh, self.config.rows, batch, self.rows)

    def counted(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Returns the rows of a batch that no lower-ranked process has."""
        return {name: array[self.first] for name, array in batch.items()}

    def digest(self, batch: Mapping[str, np.ndarray]) -> int:
        """Hashes the global batch; equal batches give equal hashes on any number of processes.

        Collective: every process must call it.
        """
        hashes = np.zeros(self.config.rows, np.uint32)
        for local, (row, first) in enumerate(zip(self.rows, self.first, strict=True)):
            if first:
                for name in sorted(batch):
                    hashes[row] = zlib.crc32(batch[name][local], int(hashes[row]))
        return zlib.crc32(np.ascontiguousarray(total(hashes)))


def total(values: np.ndarray) -> np.ndarray:
    """Returns the sum of `values` over all processes; every process must call it."""
    if jax.process_count() == 1:
        return values
    words = np.ascontiguousarray(values).view(np.uint32)  # jax would truncate 64 bits to 32
    gathered = np.asarray(multihost_utils.process_allgather(words)).view(values.dtype)
    return gathered.sum(axis=0, dtype=values.dtype)
