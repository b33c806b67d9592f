"""Measures how fast the host prepares training data: samples and tiles a second, and how many cores
a device needs for it.

    python benchmarks/input_pipeline.py            writes results/input_pipeline.json

Photographs of scikit-learn and noise on them, saved as 1920 x 1440 JPEG, one a conversation, cut
into 12 tiles and a thumbnail of 448 pixels with recompression on, packed into rows of 16,384 tokens
and 48 tiles: the whole way from a meta JSON to batches. The tokenizer is the digits model's, which
is no slower than the released one. "needed" are the tiles a second that one H100 takes at 40 % MFU
when all of a model is trained on such samples; FLOPs by internvl3_jax/training/flops.py.
"""

import argparse
import dataclasses
import datetime
import json
import os
import pathlib
import platform
import tempfile
import time

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from internvl3_jax.config import DataConfig, ProcessorConfig
from internvl3_jax.data.loader import BatchLoader
from internvl3_jax.data.pipeline import make_tokenizer
from internvl3_jax.sizes import SIZES
from internvl3_jax.training.flops import batch_counts, train_flops
from internvl3_jax.training.hardware import CHIPS

RESULTS = pathlib.Path(__file__).resolve().parent / "results" / "input_pipeline.json"
MFU = 0.4


def write_data(folder: pathlib.Path, count: int) -> str:
    rng, photographs = np.random.default_rng(0), load_sample_images().images
    rows = []
    for number in range(count):
        image = Image.fromarray(photographs[number % len(photographs)]).resize((1920, 1440))
        noise = rng.integers(-8, 9, (1440, 1920, 3), dtype=np.int16)
        pixels = np.clip(np.asarray(image, np.int16) + noise, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.jpg", quality=90)
        turns = [
            {"from": "human", "value": "<image>\nDescribe it."},
            {"from": "gpt", "value": "It is a photograph. " * 20},
        ]
        rows.append({"id": number, "image": f"{number}.jpg", "conversations": turns})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    meta = {
        "photographs": {
            "root": str(folder),
            "annotation": str(folder / "rows.jsonl"),
            "data_augment": True,
        }
    }
    (folder / "meta.json").write_text(json.dumps(meta))
    return str(folder / "meta.json")


def measure(config: DataConfig, batches: int, model) -> dict:
    """Samples and tiles a second over `batches` batches, after one that is not timed; and the
    counts of the last.
    """
    with BatchLoader(config, ProcessorConfig(), make_tokenizer(config)) as stream:
        next(stream)
        began, samples, tiles = time.perf_counter(), 0, 0
        for _ in range(batches):
            prepared = next(stream)
            samples += sum(map(len, prepared.origins))
            tiles += sum(map(len, prepared.origins)) * 13
        seconds = time.perf_counter() - began
    counts = batch_counts(prepared.batch, model)
    return {
        "samples_per_second": samples / seconds,
        "tiles_per_second": tiles / seconds,
        "counts": counts,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", type=int, default=24)
    parser.add_argument("--batches", type=int, default=12)
    parser.add_argument(
        "--workers",
        type=int,
        nargs="*",
        default=[0, 2],
        help="processes; 0 is threads of one process",
    )
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS)
    options = parser.parse_args()
    results, cores = {}, len(os.sched_getaffinity(0))
    # The digits' tokenizer has another number for the visual token.
    models = {
        size: dataclasses.replace(SIZES[size], image_token_id=453) for size in ("1b", "2b", "8b")
    }
    with tempfile.TemporaryDirectory() as folder:
        meta = write_data(pathlib.Path(folder), options.pictures)
        for workers in options.workers:
            config = DataConfig(source=meta, rows=1, workers=workers, packing_buffer=8)
            found = measure(config, options.batches, models["1b"])
            counts = found.pop("counts")
            name = f"{workers} processes" if workers else "threads"
            results[name] = {key: round(value, 2) for key, value in found.items()}
            per_core = found["tiles_per_second"] / cores
            print(
                f"{name:<12} {found['samples_per_second']:6.1f} samples/s {found['tiles_per_second']:7.1f} tiles/s, {per_core:.0f} a core"
            )
    best = max(row["tiles_per_second"] for row in results.values()) / cores
    needed = {}
    for size, model in models.items():
        rate = counts["tiles"] / (train_flops(model, counts) / (MFU * CHIPS["h100"].flops))
        needed[size] = {"tiles_per_second": round(rate, 1), "cores": round(rate / best, 1)}
        print(
            f"{size} on one H100 at {MFU:.0%} MFU takes {rate:.0f} tiles/s: {rate / best:.1f} of these cores"
        )
    report = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cores": cores,
        "python": platform.python_version(),
        "measured": results,
        "needed_by_one_h100": needed,
    }
    options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
