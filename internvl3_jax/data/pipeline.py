"""From a source of conversations to an endless stream of packed batches, by grain; its state is small JSON and resumes exactly."""

import grain.python as grain
import numpy as np

from internvl3_jax.config import DataConfig, ProcessorConfig
from internvl3_jax.data import digits, tiny_tokenizer
from internvl3_jax.data.batch import Sample, make_sample
from internvl3_jax.data.packing import pack
from internvl3_jax.data.tokenizer import Tokenizer
from internvl3_jax.positions import draw_deltas, parse_delta

_READ_AHEAD = grain.ReadOptions(num_threads=1, prefetch_buffer_size=32)


class _Encode(grain.RandomMapTransform):
    """A conversation to a `Sample`; the rng belongs to the item, so the deltas drawn do not depend on workers or order."""

    def __init__(self, config: DataConfig, processor: ProcessorConfig, tokenizer: Tokenizer):
        self.config, self.processor, self.tokenizer = config, processor, tokenizer

    def random_map(self, question, rng: np.random.Generator) -> Sample:
        count = len(question.pictures)
        deltas = draw_deltas(count, rng, [parse_delta(delta) for delta in self.config.deltas])
        where = f"{self.config.source}: a {question.task} conversation"
        sample = make_sample(question.messages, question.pictures, self.tokenizer, self.processor, deltas, where)
        for name, limit in (("tokens", self.config.tokens_per_row), ("tiles", self.config.tiles_per_row)):
            if len(sample[name]) > limit:
                raise ValueError(f"{where} has {len(sample[name])} {name}, a row holds {limit}: raise data.{name}_per_row")
        return sample


def make_tokenizer(config: DataConfig) -> Tokenizer:
    """The tokenizer of `config.tokenizer`, a directory; without one, that of the digits."""
    return Tokenizer.from_directory(config.tokenizer) if config.tokenizer else Tokenizer.from_files(tiny_tokenizer.build())


def make_batches(config: DataConfig, processor: ProcessorConfig, tokenizer: Tokenizer) -> grain.IterDataset:
    """Batches of `config.rows` packed rows, without end."""
    if config.source != "digits":
        raise ValueError(f"data.source {config.source!r} is not known; there is: digits")
    source = digits.DigitsSource(config.samples, config.seed)
    samples = grain.MapDataset.source(source).seed(config.seed).repeat().random_map(_Encode(config, processor, tokenizer))
    stream = samples.to_iter_dataset(_READ_AHEAD)
    return pack(stream, config.rows, config.tokens_per_row, config.tiles_per_row, config.packing_bins)
