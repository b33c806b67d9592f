"""From a source of conversations to an endless stream of samples, by grain; its state is small JSON
and resumes exactly.

A sample depends on the seed and its place in the mixture alone: frames, recompression and deltas
are drawn from an rng of its own.
So any number of workers and threads gives the same stream, and `dataset[index]` makes a sample
again.

A sample that cannot be used becomes a marker {"error": why, "source", "row", "index", "fatal"} in
its place. `sample_stream` raises SampleError at a fatal one, in the training process; the others
are for the packer to count and log.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence

import grain.python as grain
import numpy as np
from absl import flags
from grain.experimental import WindowShuffleMapDataset

from internvl3_jax.config import DataConfig, ProcessorConfig
from internvl3_jax.data.batch import Sample, SampleError
from internvl3_jax.data.doctor.report import check_report
from internvl3_jax.data.example import ExampleBuilder
from internvl3_jax.data.sources.catalog import open_sources, source_names
from internvl3_jax.data.sources.files import ChangedError
from internvl3_jax.data.sources.meta import MetaError
from internvl3_jax.data.sources.mixture import Selection, mixture_weights, read_drop_list
from internvl3_jax.data.text.tokenizer import Tokenizer
from internvl3_jax.data.truncation import TooLong

__all__ = [
    "make_tokenizer",
    "mix",
    "open_sources",
    "sample_dataset",
    "sample_stream",
    "source_names",
]

# Sources are mixed in a fixed rhythm (A B A B ...), in which a shard that takes every second sample
# would meet one source only.
_WINDOW = 1024  # places that are shuffled among themselves against it
# A sample may hold dozens of tiles of 600 kB, so few of them wait.
_MOST_THREADS = 16
_AHEAD = 4  # samples that wait in each worker process


def make_tokenizer(config: DataConfig) -> Tokenizer:
    """Loads the tokenizer of `config.tokenizer`, a directory. ValueError if the setting is empty."""
    if not config.tokenizer:
        raise ValueError(
            "data.tokenizer is empty; name a directory with a tokenizer: --config.data.tokenizer=CHECKPOINT"
        )
    return Tokenizer.from_directory(config.tokenizer)


def sample_dataset(
    config: DataConfig,
    processor: ProcessorConfig,
    tokenizer: Tokenizer,
    sources: list | None = None,
) -> grain.MapDataset:
    """Endless mixture of samples and, where one cannot be used, markers. Random access by "index".

    sources: of `open_sources(config)`, where they are open already.

    Raises:
      ValueError: a subclass naming the file, entry or field that is wrong, before any sample is
      made.
    """
    if config.on_bad_sample not in ("stop", "skip"):
        raise ValueError(f"data.on_bad_sample is {config.on_bad_sample!r}; it must be stop or skip")
    preparer = ExampleBuilder(config, processor, tokenizer)
    sources = open_sources(config) if sources is None else sources
    check_report(config)
    return _order(config, sources).map_with_index(_BuildExample(preparer, sources))


def _order(config: DataConfig, sources: list) -> grain.MapDataset:
    """Endless (source number, row)."""
    dropped = read_drop_list(
        config.exclude_file,
        [source.name for source in sources],
        [len(source) for source in sources],
    )
    selections = [
        Selection(number, len(source), source.repeat, dropped.get(number, ()))
        for number, source in enumerate(sources)
    ]
    for source, selection in zip(sources, selections, strict=True):
        if not len(selection):
            raise MetaError(
                f"source {source.name!r}: repeat_time {source.repeat} and the drop list leave none of its rows"
            )
    if len(sources) == 1 and sources[0].ordered:
        return grain.MapDataset.source(selections[0]).repeat()
    weights = mixture_weights(config, sources, [len(selection) for selection in selections])
    return mix(selections, weights, config.seed)


def mix(selections: Sequence[Selection], weights: Sequence[float], seed: int) -> grain.MapDataset:
    """Endless (source number, row): each source in an order of its own, new in every epoch over it."""
    chosen = [
        (selection, weight)
        for selection, weight in zip(selections, weights, strict=True)
        if weight > 0
    ]
    parts = []
    for selection, _ in chosen:
        own_seed = int(np.random.SeedSequence([seed, selection.source]).generate_state(1)[0])
        parts.append(grain.MapDataset.source(selection).shuffle(seed=own_seed).repeat())
    if len(parts) == 1:
        return parts[0]
    mixed = grain.MapDataset.mix(parts, weights=[weight for _, weight in chosen])
    return WindowShuffleMapDataset(mixed, window_size=_WINDOW, seed=seed % 2**31)


class _BuildExample:
    """(index, (source number, row)) to a sample or a marker."""

    def __init__(self, preparer: ExampleBuilder, sources: list):
        self.preparer, self.sources = preparer, sources

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        _end_with_parent()  # it is unpickled in worker processes alone

    def __call__(self, index: int, reference: tuple[int, int]) -> Sample | dict:
        number, row = reference
        config, source = self.preparer.config, self.sources[number]
        identity = {"source": number, "row": row, "index": int(index)}
        try:
            # What was computed beforehand is of one sample of each row, whatever the epoch.
            drawn = row if config.ref_logps_file else int(index)
            return (
                self.preparer.sample(source, row, np.random.default_rng((config.seed, drawn)))
                | identity
            )
        except (ValueError, OSError) as error:
            chosen = isinstance(error, TooLong) and config.overlong == "drop"
            fatal = isinstance(error, ChangedError) or (
                config.on_bad_sample == "stop" and not chosen
            )
            return {"error": f"{source.locate(row)}: {error}", **identity, "fatal": fatal}


def _end_with_parent() -> None:
    """Makes a worker process end with the training process, also when that is killed; it would wait
    for ever, and hold its output open.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        # Ctrl-C goes to the whole group; the training process decides what becomes of it
        with contextlib.suppress(ValueError):
            signal.signal(signal.SIGINT, signal.SIG_IGN)

        def watch():
            parent.join()
            os._exit(1)

        threading.Thread(target=watch, daemon=True).start()


def sample_stream(
    dataset: grain.MapDataset, shard: int, shards: int, workers: int
) -> grain.IterDataset:
    """Every `shards`-th sample of `sample_dataset` from number `shard` on, prepared ahead of time.

    workers: processes that prepare samples; 0: threads of this one. Close the iterator, or its
        processes complain at exit.
    """
    part = dataset[shard::shards] if shards > 1 else dataset
    if workers:
        # grain reads its settings from absl's flags, which a notebook never parses
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        stream = part.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
        stream = stream.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=_AHEAD)
        ).map(_own)
    else:
        threads = min(_MOST_THREADS, os.cpu_count() or 1)
        stream = part.to_iter_dataset(
            grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
        )
    return stream.map(_raise_at_error)


def _own(sample: dict) -> dict:
    """Copies the arrays that a worker has put into shared memory. Each of them holds an open file
    and its share of /dev/shm, and those that are let go of as the program ends are left to Python's
    resource tracker, which complains.
    """
    return {
        name: np.array(value) if isinstance(value, np.ndarray) else value
        for name, value in sample.items()
    }


def _raise_at_error(sample: dict) -> dict:
    if sample.get("fatal"):
        raise SampleError(sample["error"])
    return sample
