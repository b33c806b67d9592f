"""Writes results/fit_table.csv: every training row of results/fit_table.json, one a line.

python benchmarks/fit_csv.py

Nothing is compiled. `fit_table.py` makes the JSON file, and prints the same rows as Markdown.
"""

import csv
import io
import json

import fit_table
from fit_table_markdown import GIB, is_analytic, setting_text

from internvl3_jax.fit.topology import parse

PATH = fit_table.RESULTS.with_suffix(".csv")
COLUMNS = (
    "stage",
    "size",
    "devices",
    "mesh",
    "remat vision",
    "remat language",
    "micro-batches",
    "peak from",
    "peak GiB",
    "available GiB",
    "fits",
    "analysis off by %",
    "seconds per step at least",
    "MFU at most",
)


def main() -> None:
    rows = json.loads(fit_table.RESULTS.read_text(encoding="utf-8"))
    PATH.write_text(text(rows), encoding="utf-8")


def text(rows: list[dict]) -> str:
    """Returns the text of the CSV file, compiled rows first."""
    compiled = [row for row in rows if "peak" in row.get("compiler", {})]
    analytic = [row for row in rows if "error" not in row and is_analytic(row)]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in compiled + analytic:
        writer.writerow([*setting(row), *memory(row), *speed(row)])
    return out.getvalue()


def setting(row: dict) -> list[str]:
    stage, size, devices, mesh, remat, micro_batches = setting_text(row).split(" | ")
    return [stage, size, devices, mesh, *remat.split(", "), micro_batches]


def memory(row: dict) -> list[str]:
    """Returns peak from, peak GiB, available GiB, fits, error of the analysis in percent."""
    peak = row["analysis"]["peak"]
    if is_analytic(row):
        available, fits, error = parse(row["topology"]).chip.usable, row["status"] == 0, ""
        source = "analysis"
    else:
        compiled = row["compiler"]
        available, fits = compiled["available"], compiled["fits"]
        error = f"{100 * (peak / compiled['peak'] - 1):.1f}"
        source, peak = "compiler", compiled["peak"]
    numbers = [f"{value / GIB:.1f}" for value in (peak, available)]
    return [source, *numbers, "yes" if fits else "no", error]


def speed(row: dict) -> list[str]:
    return [f"{max(row['floor_seconds'].values()):.2f}", f"{row['mfu_at_most']:.2f}"]


if __name__ == "__main__":
    main()
