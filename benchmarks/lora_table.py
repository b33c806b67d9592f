"""Tabulates what one device needs to train each size with adapters: `python -m internvl3_jax.fit`
by the devices' own compilers.

    python benchmarks/lora_table.py               resumes; compiles one program at a time for an
                                                  hour or two
    python benchmarks/lora_table.py --only h100   rows whose name begins so: KIND:SIZE:BASE, such
                                                  as v5e:8b:nf4
    python benchmarks/lora_table.py --markdown    prints the tables of results/lora_table.json and
                                                  compiles nothing

One row of 4,096 tokens and 13 tiles (an image of twelve and its thumbnail), everything recomputed
(remat "full"), adapters of rank 16 on all of the decoder's layers, the base in bfloat16, in 8 bits
or in 4. A GPU's compiler gives the peak of what does not fit as well, so every size is asked for; a
TPU's is asked for the largest that the analysis thinks fits, and for smaller ones while it refuses.

Needs libtpu and jax's CUDA plugin (docs/fit.md), each in the environment for its rows.
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Callable

from fit_table import ROOT, ask
from fit_table_markdown import GIB

from internvl3_jax.fit.advice import with_flags
from internvl3_jax.fit.memory import estimate
from internvl3_jax.fit.per_device import per_device
from internvl3_jax.fit.topology import parse
from internvl3_jax.model import lora

RESULTS = ROOT / "benchmarks" / "results" / "lora_table.json"
SIZES = ("1b", "2b", "8b", "9b", "14b", "38b", "78b")
BASES = ("none", "int8", "nf4")
CARDS = (16, 24, 40, 80)  # GB
GPU, CHIPS = "h100:1x1x1", {"v5e": "v5e:1x1", "v6e": "v6e:1x1", "v5p": "v5p:1x1x1"}
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="rows whose name begins so")
    parser.add_argument("--markdown", action="store_true", help="print the tables, compile nothing")
    parser.add_argument(
        "--output", type=pathlib.Path, default=RESULTS, help=f"JSON file ({RESULTS.name})"
    )
    options = parser.parse_args()
    rows = (
        {row["name"]: row for row in json.loads(options.output.read_text())}
        if options.output.exists()
        else {}
    )

    def row(kind: str, size: str, base: str) -> dict | None:
        name = f"{kind}:{size}:{base}"
        if name not in rows and name.startswith(options.only) and not options.markdown:
            topology = CHIPS.get(kind, GPU)
            flags = " ".join(
                f"--config.{field}={value}"
                for field, value in (SETTINGS | {"lora.quantize": base}).items()
            )
            rows[name] = ask(name, f"--config configs/lora.py:{size} --topology {topology} {flags}")
            options.output.write_text(
                json.dumps(list(rows.values()), indent=1) + "\n", encoding="utf-8"
            )
            print(name, rows[name].get("compiler", rows[name].get("error")), flush=True)
        return rows.get(name)

    for base in BASES:
        for size in SIZES:
            row("h100", size, base)
        for kind in CHIPS:
            largest_on(kind, base, row)
    print(markdown(rows))


def largest_on(kind: str, base: str, row: Callable[[str, str, str], dict | None]) -> dict | None:
    """Returns the row of the largest size that the compiler accepts for one chip; row(kind, size,
    base) compiles it, or knows it.
    """
    for size in reversed(SIZES):
        if (
            thinks_it_fits(kind, size, base)
            and (found := row(kind, size, base))
            and found.get("compiler", {}).get("fits")
        ):
            return found
    return None


def thinks_it_fits(kind: str, size: str, base: str) -> bool:
    """Returns whether the analysis does."""
    sys.path.insert(0, str(ROOT))
    from configs.lora import get_config

    topology = parse(CHIPS[kind])
    config = lora.freeze_base(with_flags(get_config(size), SETTINGS | {"lora.quantize": base}))
    return estimate(per_device(config, topology)).peak <= topology.chip.usable


def table(columns: list[str], lines: list[list[str]]) -> str:
    return "\n".join(
        f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *lines)
    )


def markdown(rows: dict[str, dict]) -> str:
    return "\n\n".join([by_size(rows), by_card(rows), by_chip(rows)])


def by_size(rows: dict) -> str:
    """Peaks by CUDA's compiler, and how far the analysis is off."""

    def cell(row: dict) -> str:
        peak = row["compiler"]["peak"]
        return f"{peak / 1e9:.1f} ({row['analysis']['peak'] / peak - 1:+.0%})"

    lines = [
        [size, *(cell(rows[f"h100:{size}:{base}"]) for base in BASES)]
        for size in SIZES
        if f"h100:{size}:nf4" in rows
    ]
    return table(["size", "base in bfloat16, GB", "int8", "nf4"], lines)


def by_card(rows: dict) -> str:
    """Returns the largest size of which nine tenths of a card hold the peak."""

    def largest(base: str, card: int) -> str:
        fits = [size for size in SIZES if peak_of(rows, size, base) <= 0.9e9 * card]
        return fits[-1] if fits else "-"

    return table(
        ["card", "bfloat16", "int8", "nf4"],
        [[f"{card} GB", *(largest(base, card) for base in BASES)] for card in CARDS],
    )


def peak_of(rows: dict, size: str, base: str) -> float:
    row = rows.get(f"h100:{size}:{base}", {})
    return row["compiler"]["peak"] if "compiler" in row else float("inf")


def by_chip(rows: dict) -> str:
    """Returns the largest size that a TPU's compiler accepts for one chip, with its peak."""

    def cell(kind: str, base: str) -> str:
        found = largest_on(kind, base, lambda *name: rows.get(":".join(name)))
        if found is None:
            return "-"
        peak = found["compiler"]["peak"]
        return f"{found['name'].split(':')[1]}: {peak / GIB:.1f} ({found['analysis']['peak'] / peak - 1:+.0%})"

    usable = {kind: parse(name).chip.usable / GIB for kind, name in CHIPS.items()}
    lines = [
        [f"{kind}, {usable[kind]:.1f} GiB", *(cell(kind, base) for base in BASES)] for kind in CHIPS
    ]
    return table(["one chip", "bfloat16, GiB", "int8", "nf4"], lines)


if __name__ == "__main__":
    main()
