r"""Writes the log-probabilities of all pairs under the reference model of an MPO configuration.

Training with that file need not load the reference model. It also has the pairs of the evaluation
data.

    python -m internvl3_jax.training.make_reference --config configs/mpo.py:runs/sft-8b \
        --config.data.source=pairs.json --output reference.jsonl
    python train.py --config configs/mpo.py:runs/sft-8b \
        --config.data.source=pairs.json --config.data.ref_logps_file=reference.jsonl ...

A pair is identified by its tokens, positions and images. What training otherwise samples in every
epoch (V2PE deltas, frames of a video, recompression) is therefore sampled once per row, here and in
a run with data.ref_logps_file. Started again, it resumes where it stopped.
"""

import dataclasses
import functools
import json
import os
import pathlib
import sys
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags, logging

from internvl3_jax.checkpoints import checkpoint
from internvl3_jax.checkpoints.param_hash import tree_hash
from internvl3_jax.checkpoints.storage import by_path
from internvl3_jax.config import DataConfig, LoraConfig, TrainConfig
from internvl3_jax.data.batch import Batch, Sample
from internvl3_jax.data.example import ExampleBuilder
from internvl3_jax.data.packing import join
from internvl3_jax.data.pipeline import make_tokenizer
from internvl3_jax.data.reference_table import key_of
from internvl3_jax.data.sources.catalog import open_sources
from internvl3_jax.data.sources.mixture import read_drop_list
from internvl3_jax.data.truncation import TooLong
from internvl3_jax.inference.output_path import check_output_path, path_beside
from internvl3_jax.io import command_line, jsonl, safe_files
from internvl3_jax.io.terminal import one_line
from internvl3_jax.parallel import sharding
from internvl3_jax.training import checks, settings
from internvl3_jax.training.evaluation import eval_data_config
from internvl3_jax.training.loss_choice import make_loss
from internvl3_jax.training.mpo import reference_dtype
from internvl3_jax.training.objective import MpoLoss
from internvl3_jax.training.step import make_model


def make_reference(config: TrainConfig, output: pathlib.Path) -> int:
    """Writes the pairs that the file lacks; returns how many it has then."""
    # Reference model
    check(config)
    name = config.loss.ref_model or config.init_from
    mesh = sharding.make_mesh(config.mesh)
    source = checkpoint.load(name, dtype=config.param_dtype, mesh=mesh)
    checkpoint.check_not_quantized(source, "a reference model")
    header = {
        "reference": str(source.directory),
        "hash": tree_hash(by_path(source.params)),
        "dtype": config.compute_dtype,
    }
    known, kept = read_known(output, header)
    params = jax.tree.map(lambda leaf: leaf.astype(reference_dtype(config)), source.params)

    # Training and evaluation pairs, in batches of as many rows as training computes at a time
    tokenizer = make_tokenizer(config.data)
    with jsonl.Appender(output, kept) as file, jax.set_mesh(mesh):
        if not kept:
            file.write([json.dumps(header)])
        for data in (config.data, *([eval_data_config(config)] if config.eval.source else [])):
            data = dataclasses.replace(data, rows=data.rows // config.micro_batches)
            loss_fn = make_loss(
                dataclasses.replace(config, data=data, lora=LoraConfig()), make_model(config)
            )
            compute = jax.jit(functools.partial(log_probabilities, loss_fn))
            builder = ExampleBuilder(
                dataclasses.replace(data, ref_logps_file=""), config.processor, tokenizer
            )
            for rows, batch in batches(data, new_samples(data, builder, known)):
                batch = {
                    field: jax.device_put(value, sharding.batch_sharding(mesh, field))
                    for field, value in batch.items()
                }
                by_row = zip(rows, np.asarray(compute(params, batch)).tolist(), strict=True)
                pairs = [
                    pair
                    for samples, values in by_row
                    for pair in zip(samples, values, strict=False)
                ]
                file.write(
                    [
                        jsonl.dumps({"key": key_of(sample), "chosen": chosen, "rejected": rejected})
                        for sample, (chosen, rejected) in pairs
                    ]
                )
    return len(known)


def check(config: TrainConfig) -> None:
    """Raises ValueError unless the configuration trains on pairs."""
    data = config.data
    if (
        config.loss.kind != "mpo"
        or not data.pairs
        or not (config.loss.ref_model or config.init_from)
    ):
        raise ValueError(
            "the configuration trains on no pairs (loss.kind mpo, data.pairs, init_from)"
        )


def read_known(output: pathlib.Path, header: dict) -> tuple[set[str], int]:
    """Returns the keys that the file has, and its size in bytes without a last line that is torn.

    Args:
      header: First line of the file. The path of the reference model in it may have changed.

    Raises:
      ValueError: The file is of something else, or of other parameters or another dtype.
    """
    if not output.exists():
        return set(), 0
    lines, torn = jsonl.whole_lines(output), jsonl.torn(output)
    rows = [row.values for row in jsonl.parse(lines, output)]
    start = b'{"key": "' if rows else json.dumps(header).encode()
    is_table = not rows or (
        header.keys() == rows[0].keys()
        and all(row.keys() == {"key", "chosen", "rejected"} for row in rows[1:])
    )
    if not is_table or not (torn.startswith(start) or start.startswith(torn)):
        raise ValueError(f"{output} is not a file of make_reference; name another --output")
    if rows and any(rows[0][name] != header[name] for name in ("hash", "dtype")):
        raise ValueError(
            f"{output} is not of {header['reference']} with these parameters and dtype; "
            f"name another --output"
        )
    return {row["key"] for row in rows[1:]}, sum(map(len, lines))


def new_samples(config: DataConfig, builder: ExampleBuilder, known: set[str]) -> Iterator[Sample]:
    """Yields every pair whose key is not in `known`, in the sources' order, and adds its key."""
    import rich.markup
    from rich.progress import track

    sources = open_sources(config)
    excluded = read_drop_list(
        config.exclude_file,
        [source.name for source in sources],
        [len(source) for source in sources],
    )
    for number, source in enumerate(sources):
        rows = [row for row in range(len(source)) if row not in excluded.get(number, ())]
        for row in track(
            rows,
            description=rich.markup.escape(one_line(source.name)),
            disable=not sys.stderr.isatty(),
        ):
            try:
                sample = builder.sample(source, row, np.random.default_rng((config.seed, row)))
            except (ValueError, OSError) as error:
                is_dropped = isinstance(error, TooLong) and config.overlong == "drop"
                if config.on_bad_sample == "stop" and not is_dropped:
                    raise ValueError(f"{source.locate(row)}: {error}") from error
                print(f"skipped: {source.locate(row)}: {error}", file=sys.stderr)
                continue
            if (key := key_of(sample)) not in known:
                known.add(key)
                yield sample


def batches(
    config: DataConfig, samples: Iterator[Sample]
) -> Iterator[tuple[list[list[Sample]], Batch]]:
    """Yields (samples of each row, batch), rows filled in order; empty rows fill the last batch."""
    limits = (config.tokens_per_row, config.tiles_per_row, config.pairs_per_row)
    rows, used = [[]], np.zeros(3, int)
    for sample in samples:
        size = np.array([len(sample["tokens"]), len(sample["tiles"]), 1])
        if (used + size > limits).any():
            if len(rows) == config.rows:
                yield rows, _stack(rows, config)
                rows = []
            rows.append([])
            used = np.zeros(3, int)
        rows[-1].append(sample)
        used += size
    if rows[0]:
        yield rows + [[]] * (config.rows - len(rows)), _stack(rows, config)


def _stack(rows: list[list[Sample]], config: DataConfig) -> Batch:
    filled = [join(row, config.tokens_per_row, config.tiles_per_row) for row in rows]
    batch = {
        name: np.stack([row[name] for row in filled]) for name in filled[0] if name != "sources"
    }
    missing = config.rows - len(filled)
    return {
        name: np.pad(value, ((0, missing), *((0, 0),) * (value.ndim - 1)))
        for name, value in batch.items()
    }


def log_probabilities(loss_fn: MpoLoss, params, batch):
    """Returns the log-probabilities of answers under `params`, f32[B,K,2]."""
    return loss_fn.ref_logps(params, params, batch).astype(jnp.float32)


def main(argv) -> None:
    logging.set_verbosity(logging.WARNING)  # jax and orbax log every step of every load
    if len(argv) > 1:
        raise command_line.UsageError(f"what is {argv[1]!r}? Settings are --config.FIELD=VALUE")
    config, output = settings.load().config, pathlib.Path(os.path.expanduser(flags.FLAGS.output))
    checks.validate(config)
    if not output.parent.is_dir():
        raise ValueError(f"--output is {output}: there is no folder {output.parent}; make it")
    check_output_path(output, [config.data.source], "--output")
    with safe_files.Lock(path_beside(output, "lock"), str(output)):
        count = make_reference(config, output)
    print(f"{output} has the log-probabilities of {count:,} pairs")


if __name__ == "__main__":
    flags.DEFINE_string("output", None, "JSONL file to write.", required=True)
    flags.adopt_module_key_flags(settings)
    settings.take_overrides(sys.argv)
    command_line.run(main)
