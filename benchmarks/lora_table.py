"""What one device needs to train each size with adapters, by the analysis of internvl3_jax.fit; nothing is compiled.

    python benchmarks/lora_table.py           writes results/lora_table.json and prints its table

One row of 4,096 tokens and 13 tiles (a picture of twelve and its thumbnail), everything recomputed (remat "full"), adapters of rank 16 on
all of the decoder's layers, the base in bfloat16, in 8 bits or in 4. The last row says the largest size that nine tenths of a card hold.
"""

import datetime
import json
import os
import pathlib
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

from internvl3_jax import lora
from internvl3_jax.fit.advice import with_flags
from internvl3_jax.fit.memory import estimate
from internvl3_jax.fit.share import share_of
from internvl3_jax.fit.topology import parse

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "lora_table.json"
SIZES = ("1b", "2b", "8b", "9b", "14b", "38b", "78b")
BASES = ("none", "int8", "nf4")
CARDS = (16, 24, 40, 80)  # GB
SETTINGS = {
    "data.rows": 1,
    "data.tokens_per_row": 4096,
    "data.tiles_per_row": 13,
    "lora.rank": 16,
    "remat_vision": "full",
    "remat_language": "full",
    "loss_chunk": 256,
    "mesh.fsdp": 1,
}


def main() -> None:
    sys.path.insert(0, str(ROOT))
    from configs.lora import get_config

    rows = [{"size": size} | {base: peak(get_config(size), base) for base in BASES} for size in SIZES]
    found = {
        "command": "python benchmarks/lora_table.py",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "jax": jax.__version__,
        "settings": SETTINGS,
        "bytes": rows,
    }
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(markdown(rows))


def peak(config, base: str) -> int:
    config = lora.resolved(with_flags(config, SETTINGS | {"lora.quantize": base}))
    return estimate(share_of(config, parse("h100:1x1x1"))).peak


def markdown(rows: list[dict]) -> str:
    lines = ["| size | base in bfloat16, GB | int8 | nf4 |", "|---|---|---|---|"]
    lines += [f"| {row['size']} | {' | '.join(f'{row[base] / 1e9:.1f}' for base in BASES)} |" for row in rows]
    lines += ["", f"| card | {' | '.join(('bfloat16', 'int8', 'nf4'))} |", "|---|---|---|---|"]
    for card in CARDS:
        largest = [
            max((row["size"] for row in rows if row[base] <= 0.9e9 * card), key=SIZES.index, default="-") for base in BASES
        ]
        lines.append(f"| {card} GB | {' | '.join(largest)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
