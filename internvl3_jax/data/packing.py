"""Packs samples into rows under a token budget and a tile budget at once, with grain's first-fit packer."""

import grain.python as grain
import numpy as np
from grain.experimental import FirstFitPackIterDataset

from internvl3_jax.data.batch import Batch


def pack(samples: grain.IterDataset, rows: int, tokens: int, tiles: int, bins: int) -> grain.IterDataset:
    """Batches of `rows` rows of `tokens` tokens and `tiles` tiles from a stream of `Sample`; a sample is never split.

    `bins` rows are open at a time: more of them fill better and cost memory and, after a restart, time to fill them again.
    """
    lengths = {"tokens": tokens, "targets": tokens, "loss_weights": tokens, "positions": tokens, "tiles": tiles}
    packed = FirstFitPackIterDataset(samples, length_struct=lengths, num_packing_bins=bins, meta_features=())
    return packed.map(_rename).batch(rows, drop_remainder=True)


def _rename(row: dict) -> Batch:
    batch = {name: row[name] for name in ("tokens", "targets", "loss_weights", "positions", "tiles")}
    return batch | {"segments": np.asarray(row["tokens_segment_ids"], np.int32)}
