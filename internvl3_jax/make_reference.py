"""Log-probabilities of all pairs of a configuration, held-out ones too, under its reference model: training need not hold that model.

    python -m internvl3_jax.make_reference --config configs/mpo.py:runs/sft-8b --config.data.source=pairs.json --output reference.jsonl
    python train.py --config configs/mpo.py:runs/sft-8b --config.data.source=pairs.json --config.data.reference=reference.jsonl ...

A pair is known by its tokens, positions and pictures. So what training otherwise draws anew in every epoch (V2PE deltas, frames of a video,
recompression) is drawn once for each row here, and in a run with data.reference. Started again, it goes on where it stopped.
"""

import dataclasses
import functools
import json
import pathlib
import sys
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from ml_collections import config_flags

from internvl3_jax import checkpoint, sharding
from internvl3_jax.checksum import tree_hash
from internvl3_jax.config import DataConfig, TrainConfig
from internvl3_jax.data.batch import Batch, Sample
from internvl3_jax.data.mixture import read_drop_list
from internvl3_jax.data.overlong import TooLong
from internvl3_jax.data.packing import join
from internvl3_jax.data.pipeline import make_tokenizer
from internvl3_jax.data.prepare import Preparer
from internvl3_jax.data.reference import key_of
from internvl3_jax.data.sources import open_sources
from internvl3_jax.held_out import held_out_data
from internvl3_jax.model import InternVL
from internvl3_jax.objective import Head
from internvl3_jax.preference import reference_dtype
from internvl3_jax.questions import whole_lines
from internvl3_jax.storage import by_path
from internvl3_jax.train_step import make_model, reference_log_probabilities


def make_reference(config: TrainConfig, output: pathlib.Path) -> int:
    """Writes what the file lacks; returns how many pairs it has."""
    check(config)
    name = config.loss.reference or config.init_from
    mesh = sharding.make_mesh(config.mesh)
    source = checkpoint.load(name, dtype=config.param_dtype, mesh=mesh)
    header = {"reference": str(source.directory), "hash": tree_hash(by_path(source.params)), "dtype": config.compute_dtype}
    start_file(output, header)
    known = read_known(output, header)
    params = jax.tree.map(lambda leaf: leaf.astype(reference_dtype(config)), source.params)
    tokenizer = make_tokenizer(config.data)
    with output.open("a", encoding="utf-8") as file, jax.set_mesh(mesh):
        for data in (config.data, *([held_out_data(config)] if config.held_out else [])):
            data = dataclasses.replace(data, rows=data.rows // config.micro_batches)  # as many as training computes at a time
            compute = jax.jit(functools.partial(log_probabilities, make_model(config), config, data))
            preparer = Preparer(dataclasses.replace(data, reference=""), config.processor, tokenizer)
            for rows, batch in batches(data, new_samples(data, preparer, known)):
                batch = {field: jax.device_put(value, sharding.batch_sharding(mesh, field)) for field, value in batch.items()}
                for samples, values in zip(rows, np.asarray(compute(params, batch)), strict=True):
                    for sample, (chosen, rejected) in zip(samples, values.tolist(), strict=False):
                        file.write(json.dumps({"key": key_of(sample), "chosen": chosen, "rejected": rejected}) + "\n")
                file.flush()
    return len(known)


def check(config: TrainConfig) -> None:
    data = config.data
    if config.loss.kind != "mpo" or not data.pairs or not (config.loss.reference or config.init_from):
        raise ValueError("the configuration trains on no pairs (loss.kind mpo, data.pairs, init_from)")


def start_file(output: pathlib.Path, header: dict) -> None:
    """With its first line, if there is none yet."""
    if not output.exists() or "\n" not in output.read_text(encoding="utf-8"):
        output.write_text(json.dumps(header) + "\n", encoding="utf-8")


def read_known(output: pathlib.Path, header: dict) -> set[str]:
    """Keys that the file has; a last line that was cut off is removed. ValueError if it is of another reference."""
    lines = whole_lines(output)
    if json.loads(lines[0]) != header:
        raise ValueError(f"{output} is not of {header['reference']} with these parameters and dtype; name another --output")
    output.write_text("".join(lines), encoding="utf-8")
    return {json.loads(line)["key"] for line in lines[1:]}


def new_samples(config: DataConfig, preparer: Preparer, known: set[str]) -> Iterator[Sample]:
    """Every pair of every source that is not known yet, in order; it is known afterwards."""
    from rich.progress import track

    sources = open_sources(config)
    dropped = read_drop_list(config.drop_list, [source.name for source in sources], [len(source) for source in sources])
    for number, source in enumerate(sources):
        rows = [row for row in range(len(source)) if row not in dropped.get(number, ())]
        for row in track(rows, description=source.name, disable=not sys.stderr.isatty()):
            try:
                sample = preparer.sample(source, row, np.random.default_rng((config.seed, row)))
            except (ValueError, OSError) as error:
                chosen = isinstance(error, TooLong) and config.overlong == "drop"
                if config.on_error == "stop" and not chosen:
                    raise ValueError(f"{source.locate(row)}: {error}") from error
                print(f"left out: {source.locate(row)}: {error}", file=sys.stderr)
                continue
            if (key := key_of(sample)) not in known:
                known.add(key)
                yield sample


def batches(config: DataConfig, samples: Iterator[Sample]) -> Iterator[tuple[list[list[Sample]], Batch]]:
    """(the samples of each row, batch), rows filled in order; the last batch is filled up with empty rows."""
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
    batch = {name: np.stack([row[name] for row in filled]) for name in filled[0] if name != "sources"}
    missing = config.rows - len(filled)
    return {name: np.pad(value, ((0, missing), *((0, 0),) * (value.ndim - 1))) for name, value in batch.items()}


def log_probabilities(model: InternVL, config: TrainConfig, data: DataConfig, params, batch):
    """f32[B,K,2]"""
    scaling = "none" if data.deltas != ("1",) else None
    head = Head(model.config.language.vocab_size, config.loss_chunk)
    return reference_log_probabilities(model, head, params, params, batch, data.pairs_per_row, scaling).astype(jnp.float32)


def main(argv) -> int:
    if len(argv) > 1:
        raise app.UsageError(f"what is {argv[1]!r}? Settings are --config.FIELD=VALUE")
    try:
        count = make_reference(flags.FLAGS.config, pathlib.Path(flags.FLAGS.output))
    # What the user can mend is one line; anything else is our fault and keeps its traceback.
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{flags.FLAGS.output} has the log-probabilities of {count:,} pairs")
    return 0


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "File with get_config() -> TrainConfig.", lock_config=False)
    flags.DEFINE_string("output", None, "JSONL file to write.", required=True)
    app.run(main)
