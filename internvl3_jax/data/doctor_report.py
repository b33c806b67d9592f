"""What the doctor found, on disk: report.json, errors.tsv, histogram.png; and training's refusal to start on unresolved errors.

errors.tsv has the format of data.drop_list: source, row and reason with tabs between.
"""

import json
import os
import pathlib

import numpy as np

from internvl3_jax.config import DataConfig
from internvl3_jax.data.files import exists, is_remote, read_bytes

REPORT, ERRORS, HISTOGRAM = "report.json", "errors.tsv", "histogram.png"


class UnresolvedErrors(ValueError):
    """The doctor found samples that cannot be used, and nothing says what shall become of them."""


def report_folder(meta: str) -> str:
    """Where the doctor writes and training looks: beside the meta JSON, or in the working directory for one that is remote."""
    return f"{os.path.basename(meta) if is_remote(meta) else meta}.doctor"


def check_report(config: DataConfig) -> None:
    """Raises UnresolvedErrors if a doctor's report beside the meta JSON has errors that `config.drop_list` does not name.

    Does nothing where there is no report, or where data.on_error is skip: then training counts such samples and goes on.
    """
    folder = report_folder(config.source)
    if config.source == "digits" or config.on_error == "skip" or not exists(f"{folder}/{REPORT}"):
        return
    found = _samples(f"{folder}/{ERRORS}")
    dropped = _samples(config.drop_list) if config.drop_list else {}
    open_ones = [sample for sample in found if sample not in dropped]
    if open_ones:
        (source, row), reason = open_ones[0], found[open_ones[0]]
        raise UnresolvedErrors(
            f"{folder}/{ERRORS} names {len(open_ones):,} samples that cannot be used, the first: {source} row {row}: {reason}. "
            f"Mend them and run the doctor again, or leave them out with data.drop_list={folder}/{ERRORS}"
        )


def _samples(path: str) -> dict[tuple[str, str], str]:
    """(source, row) -> reason of a file in the format of errors.tsv."""
    rows = [line.split("\t") for line in read_bytes(path).decode().splitlines() if line and not line.startswith("#")]
    return {(source, row): "".join(reason) for source, row, *reason in rows}


def write_report(folder: pathlib.Path, report: dict, errors: list[tuple[str, int, str]], tokens, tiles) -> None:
    """Writes the three files. errors: source, row, reason; tokens, tiles: numbers of each readable sample."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["# source\trow\treason", *(f"{source}\t{row}\t{' '.join(reason.split())}" for source, row, reason in errors)]
    (folder / ERRORS).write_text("\n".join(lines) + "\n", encoding="utf-8")
    _draw(folder / HISTOGRAM, tokens, tiles)
    # Last: training looks for it.
    (folder / REPORT).write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _draw(path: pathlib.Path, tokens: np.ndarray, tiles: np.ndarray) -> None:
    from matplotlib.figure import Figure  # only here: nothing else of the data needs it

    figure = Figure(figsize=(9, 3), layout="constrained")
    for axes, values, name in zip(figure.subplots(1, 2), (tokens, tiles), ("tokens", "tiles"), strict=True):
        axes.hist(values, bins=min(60, max(1, len(np.unique(values)))))
        axes.set(xlabel=f"{name} of a sample", ylabel="samples")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def summary(tokens: np.ndarray) -> dict[str, float]:
    """Sum, mean, median, 99th percentile and largest of some numbers; all 0 if there are none."""
    values = tokens if len(tokens) else np.zeros(1, np.int64)
    return {
        "sum": int(values.sum()),
        "mean": round(float(values.mean()), 1),
        "median": float(np.median(values)),
        "p99": float(np.percentile(values, 99)),
        "max": int(values.max()),
    }
