"""Makes data sets of the rows of a meta JSON and takes samples from their stream."""

import itertools

from internvl3_jax.data.pipeline import sample_dataset, sample_stream
from tests.support.official_data import PROCESSOR, data_config, tokenizer


def make(source, **changes):
    config = data_config(source, **{"deltas": ("1", "1/2", "1/4"), "seed": 3} | changes)
    return sample_dataset(config, PROCESSOR, tokenizer())


def take(dataset, count, workers=0, shard=0, shards=1):
    iterator = iter(sample_stream(dataset, shard, shards, workers))
    try:
        return list(itertools.islice(iterator, count))
    finally:
        iterator.close()
