"""Makes an endless stream of samples of the sources, by grain, with a JSON state that resumes
exactly.

A sample depends only on the seed and its place in the mixture: frames, recompression and deltas are
sampled from its own rng. So any number of workers and threads gives the same stream, and
`dataset[index]` makes a sample again.

A sample that cannot be used is replaced by a marker {"error": reason, "source", "row", "index",
"fatal"}. `sample_stream` raises SampleError at a fatal marker, in the training process; the packer
counts and logs the others.
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

# Sources are mixed in a fixed order (A B A B ...), of which a shard that takes every second sample
# would see only one source. So places are shuffled within windows.
_WINDOW = 1024
# A sample may have dozens of tiles of 600 kB, so only few of them are prepared ahead.
_MOST_THREADS = 16
_AHEAD = 4  # samples prepared ahead in each worker process


def make_tokenizer(config: DataConfig) -> Tokenizer:
    """Loads the tokenizer of `config.tokenizer`. ValueError if the setting is empty."""
    if not config.tokenizer:
        raise ValueError(
            "data.tokenizer is empty; name a directory with a tokenizer: "
            "--config.data.tokenizer=CHECKPOINT"
        )
    return Tokenizer.from_directory(config.tokenizer)


def sample_dataset(
    config: DataConfig,
    processor: ProcessorConfig,
    tokenizer: Tokenizer,
    sources: list | None = None,
) -> grain.MapDataset:
    """Makes the endless mixture of samples and markers, with random access by "index".

    sources: Of `open_sources(config)`; None opens them.

    Raises:
      ValueError: A file, entry or setting is wrong; raised before any sample is made.
    """
    if config.on_bad_sample not in ("stop", "skip"):
        raise ValueError(f"data.on_bad_sample is {config.on_bad_sample!r}; it must be stop or skip")
    builder = ExampleBuilder(config, processor, tokenizer)
    sources = open_sources(config) if sources is None else sources
    check_report(config)
    return _order(config, sources).map_with_index(_BuildExample(builder, sources))


def _order(config: DataConfig, sources: list) -> grain.MapDataset:
    """Makes the endless mixture of (source number, row)."""
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
                f"source {source.name!r}: repeat_time {source.repeat} and the drop list leave "
                f"none of its rows"
            )
    if len(sources) == 1 and sources[0].ordered:
        return grain.MapDataset.source(selections[0]).repeat()
    weights = mixture_weights(config, sources, [len(selection) for selection in selections])
    return mix(selections, weights, config.seed)


def mix(selections: Sequence[Selection], weights: Sequence[float], seed: int) -> grain.MapDataset:
    """Mixes (source number, row) endlessly; each source is shuffled anew in each of its epochs."""
    chosen = [
        (selection, weight)
        for selection, weight in zip(selections, weights, strict=True)
        if weight > 0
    ]
    datasets = []
    for selection, _ in chosen:
        source_seed = int(np.random.SeedSequence([seed, selection.source]).generate_state(1)[0])
        datasets.append(grain.MapDataset.source(selection).shuffle(seed=source_seed).repeat())
    if len(datasets) == 1:
        return datasets[0]
    mixture = grain.MapDataset.mix(datasets, weights=[weight for _, weight in chosen])
    return WindowShuffleMapDataset(mixture, window_size=_WINDOW, seed=seed % 2**31)


class _BuildExample:
    """Makes a sample or a marker of (index, (source number, row))."""

    def __init__(self, builder: ExampleBuilder, sources: list):
        self.builder, self.sources = builder, sources

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        _end_with_parent()  # it is only unpickled in worker processes

    def __call__(self, index: int, reference: tuple[int, int]) -> Sample | dict:
        number, row = reference
        config, source = self.builder.config, self.sources[number]
        identity = {"source": number, "row": row, "index": int(index)}
        try:
            # The precomputed reference is that of one sample per row, for every epoch.
            sample_seed = row if config.ref_logps_file else int(index)
            return (
                self.builder.sample(source, row, np.random.default_rng((config.seed, sample_seed)))
                | identity
            )
        except (ValueError, OSError) as error:
            dropped = isinstance(error, TooLong) and config.overlong == "drop"
            fatal = isinstance(error, ChangedError) or (
                config.on_bad_sample == "stop" and not dropped
            )
            return {"error": f"{source.locate(row)}: {error}", **identity, "fatal": fatal}


def _end_with_parent() -> None:
    """Ends a worker process with the training process, even if that is killed.

    Otherwise it would wait forever, with the output of the training process open.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        # Ctrl-C reaches all processes of the group; only the training process handles it.
        with contextlib.suppress(ValueError):
            signal.signal(signal.SIGINT, signal.SIG_IGN)

        def watch():
            parent.join()
            os._exit(1)

        threading.Thread(target=watch, daemon=True).start()


def sample_stream(
    dataset: grain.MapDataset, shard: int, shards: int, workers: int
) -> grain.IterDataset:
    """Prepares every `shards`-th sample from number `shard` on, ahead of time.

    workers: Number of processes that prepare samples; 0 takes threads of this process. The iterator
        has to be closed, or the processes print errors at exit.
    """
    own_samples = dataset[shard::shards] if shards > 1 else dataset
    if workers:
        # grain reads its settings from absl's flags, which a notebook does not parse.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        stream = own_samples.to_iter_dataset(
            grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        )
        stream = stream.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=_AHEAD)
        ).map(_copy_arrays)
    else:
        threads = min(_MOST_THREADS, os.cpu_count() or 1)
        stream = own_samples.to_iter_dataset(
            grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
        )
    return stream.map(_raise_at_error)


def _copy_arrays(sample: dict) -> dict:
    """Copies the arrays that a worker has put into shared memory.

    Each of them keeps a file open and takes space of /dev/shm, and Python's resource tracker prints
    an error for those that are released as the program ends.
    """
    return {
        name: np.array(value) if isinstance(value, np.ndarray) else value
        for name, value in sample.items()
    }


def _raise_at_error(sample: dict) -> dict:
    if sample.get("fatal"):
        raise SampleError(sample["error"])
    return sample
