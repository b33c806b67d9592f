"""Measures how full packed rows are: our rule, first fit and the reference's, on the same stream of
sample sizes.

    python benchmarks/packing.py            writes results/packing.json

The streams imitate fine-tuning mixtures: sizes only, no pixels; shares and lengths are ours.
"images": 30 % text, 60 % one image, 10 % two to six; "video": 8 % videos of 8 to 32 frames
besides, where the tiles run out before the tokens. Tiles by the grid rule on random image sizes,
256 tokens each; text log-normal around 300 tokens (text-only samples around 900). The reference's
rule is that of its dataset_packed.py: open rows sorted by their tiles, first fit, a full row or the
fullest of more than 20 goes out.
"""

import argparse
import datetime
import json
import pathlib
import platform

import numpy as np

from internvl3_jax.config import ProcessorConfig
from internvl3_jax.data.media.tiles import count_tiles, image_limit
from internvl3_jax.data.packing import choose

RESULTS = pathlib.Path(__file__).resolve().parent / "results" / "packing.json"
TOKENS, TILES = 16_384, 48
REFERENCE_BUFFER = 20
# text, one image, several, video
MIXTURES = {"pictures": (0.3, 0.6, 0.1, 0.0), "video": (0.25, 0.57, 0.1, 0.08)}


def stream(count: int, shares, seed: int) -> np.ndarray:
    """Returns i64[count,2]: tokens and tiles of each sample."""
    rng, processor = np.random.default_rng(seed), ProcessorConfig(tiles="shared")
    sizes = np.zeros((count, 2), np.int64)
    for number, kind in enumerate(rng.choice(4, count, p=shares)):
        pictures = (0, 1, int(rng.integers(2, 7)), 0)[kind]
        tiles = int(rng.integers(8, 33)) if kind == 3 else 0
        for _ in range(pictures):
            width, height = np.exp(rng.normal(6.7, 0.5, 2)).astype(int)
            tiles += count_tiles(
                int(width), int(height), processor, image_limit(processor, pictures)
            )
        text = int(np.clip(rng.lognormal(np.log(900 if kind == 0 else 300), 0.9), 20, 8192))
        sizes[number] = text + 256 * tiles, tiles
    return sizes


def first_fit(sizes: np.ndarray, budgets: np.ndarray) -> list[int]:
    """Indices of a row's samples, as `choose`: the next in order of arrival that fits."""
    chosen, room = [], budgets
    for index, size in enumerate(sizes):
        if (size <= room).all():
            chosen.append(index)
            room = room - size
    return chosen


RULES = {"balanced": choose, "first_fit": first_fit}


def ours(sizes: np.ndarray, rule: str, buffer: int) -> list[np.ndarray]:
    """Yields the size of each row, tokens and tiles, while the stream lasts."""
    budgets, waiting, rows, taken = np.array([TOKENS, TILES]), [], [], 0
    while True:
        more = buffer - len(waiting)
        if taken + more > len(sizes):
            return rows
        waiting += list(sizes[taken : taken + more])
        taken += more
        chosen = RULES[rule](np.array(waiting), budgets)
        rows.append(np.sum([waiting[index] for index in chosen], axis=0))
        waiting = [size for index, size in enumerate(waiting) if index not in set(chosen)]


def reference(sizes: np.ndarray, buffer: int = REFERENCE_BUFFER) -> list[np.ndarray]:
    open_rows, rows = [], []
    for size in sizes:
        fits = next(
            (
                i
                for i, row in enumerate(open_rows)
                if row[0] + size[0] <= TOKENS and row[1] + size[1] <= TILES
            ),
            None,
        )
        row = size if fits is None else open_rows.pop(fits) + size
        if row[0] == TOKENS or row[1] == TILES:
            rows.append(row)
            continue
        open_rows = sorted([*open_rows, row], key=lambda row: -row[1])
        if len(open_rows) > buffer:
            rows.append(open_rows.pop(0))
    return rows


def fill(rows: list[np.ndarray]) -> dict[str, float]:
    tokens, tiles = np.mean(rows, axis=0) / (TOKENS, TILES)
    return {"tokens": round(float(tokens), 4), "tiles": round(float(tiles), 4), "rows": len(rows)}


def compare(sizes: np.ndarray) -> dict:
    totals = sizes.sum(axis=0)
    # No rule can do better: when one budget of every row is full, the mixture has no more of the
    # other to give.
    tokens, tiles = totals[0] / TOKENS, totals[1] / TILES
    possible = {"tokens": min(1.0, float(tokens / tiles)), "tiles": min(1.0, float(tiles / tokens))}
    found = {f"reference, buffer {REFERENCE_BUFFER}": fill(reference(sizes))}
    for buffer in (20, 64, 256):
        found |= {f"{rule}, buffer {buffer}": fill(ours(sizes, rule, buffer)) for rule in RULES}
    return {"possible": possible, "fill": found}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS)
    options = parser.parse_args()
    results = {
        name: compare(stream(options.samples, shares, seed=0)) for name, shares in MIXTURES.items()
    }
    for name, result in results.items():
        possible = result["possible"]
        print(
            f"{name}: at best {possible['tokens']:.1%} of the tokens and {possible['tiles']:.1%} of the tiles"
        )
        for rule, row in result["fill"].items():
            print(
                f"  {rule:<24} tokens {row['tokens']:7.2%}  tiles {row['tiles']:7.2%}  {row['rows']:,} rows"
            )
    report = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "samples": options.samples,
        "mixtures": results,
    }
    options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
