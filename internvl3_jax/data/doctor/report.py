"""Writes the doctor's report (report.json, errors.tsv, histogram.png), and stops training that
starts with unresolved errors.

errors.tsv has the format of data.exclude_file: source, row and reason with tabs between.
"""

import io
import json
import os
import pathlib
import tempfile

import numpy as np

from internvl3_jax.config import DataConfig
from internvl3_jax.data.sources.files import FileError, exists, is_remote
from internvl3_jax.data.sources.meta import expand_user
from internvl3_jax.data.sources.mixture import drop_lines
from internvl3_jax.io import safe_files
from internvl3_jax.io.safe_files import open_regular, replace
from internvl3_jax.io.terminal import one_line

REPORT, ERRORS, HISTOGRAM = "report.json", "errors.tsv", "histogram.png"
_HEADER = "# source\trow\treason"  # of errors.tsv


class UnresolvedErrors(ValueError):
    """The doctor found samples that cannot be used and that no setting excludes."""


def report_folder(source: str) -> str:
    """Returns the folder of the report: next to data.source, or where the run is if that is an
    address.
    """
    return f"{os.path.basename(source) if is_remote(source) else expand_user(source)}.doctor"


def check_report(config: DataConfig) -> None:
    """Raises UnresolvedErrors if a report has errors that `config.exclude_file` does not name.

    Does nothing without a report, or if data.on_bad_sample is skip: training then skips such samples.
    """
    folder = report_folder(config.source)
    if config.on_bad_sample == "skip" or not exists(f"{folder}/{REPORT}"):
        return
    dropped = (
        {(source, row) for _, source, row, _ in drop_lines(config.exclude_file)}
        if config.exclude_file
        else set()
    )
    count, first = 0, None
    for _, source, row, reason in drop_lines(f"{folder}/{ERRORS}"):
        if (source, row) not in dropped:
            count, first = count + 1, first or (source, row, reason)
    if first:
        source, row, reason = first
        raise UnresolvedErrors(
            f"{folder}/{ERRORS} names {count:,} samples that cannot be used, the first: {source} "
            f"row {row}: {reason}. Fix them and run the doctor again, or leave them out with "
            f"data.exclude_file={folder}/{ERRORS}"
        )


def claim_folder(folder: pathlib.Path) -> None:
    """Makes the folder and checks that a report can be written to it, before hours of work.

    Raises:
      OSError: It cannot be written.
      FileError: It has files with the names of a report that the doctor has not written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0" * 4096)
    except OSError as error:
        raise OSError(
            error.errno,
            f"the report cannot be written there ({safe_files.reason(error)}); name another folder "
            f"with --report",
            str(folder),
        ) from error
    for name in (REPORT, ERRORS, HISTOGRAM):
        path = folder / name
        if os.path.lexists(path) and not _is_ours(folder, name):
            raise FileError(
                f"{one_line(str(path))}: was not written by the doctor; name another folder with "
                f"--report"
            )


def _is_ours(folder: pathlib.Path, name: str) -> bool:
    """Returns whether a file of the folder is part of a report; the image is if another file is."""
    if name == HISTOGRAM:
        return any(
            (folder / other).is_file() and _is_ours(folder, other) for other in (REPORT, ERRORS)
        )
    try:
        with open_regular(folder / name) as file:
            start = file.read(len(_HEADER) + 2)
    except FileError:
        return False
    return start.startswith((_HEADER if name == ERRORS else '{\n "meta":').encode()) or not start


def write_report(
    folder: pathlib.Path, report: dict, errors: list[tuple[str, int, str]], tokens, tiles
) -> None:
    """Writes the three files; adds a warning to the report if the histogram is left out.

    Args:
      errors: (source, row, reason), each in one line.
      tokens, tiles: Numbers of each readable sample.
    """
    lines = [_HEADER, *(f"{source}\t{row}\t{reason}" for source, row, reason in errors)]
    replace(folder / ERRORS, "\n".join(lines) + "\n")
    image = _draw_or_reason(tokens, tiles)
    if isinstance(image, str):
        report["warnings"].append(f"{HISTOGRAM} is left out: {image}")
    else:
        replace(folder / HISTOGRAM, image)
    # Last, since training looks for it. Half surrogates, of file names that are not UTF-8, are
    # escaped as in JSON.
    text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
    replace(folder / REPORT, text.encode("utf-8", "backslashreplace"))


def _draw_or_reason(tokens: np.ndarray, tiles: np.ndarray) -> bytes | str:
    """Draws the histograms as PNG, or returns the reason why it cannot."""
    try:
        return _draw(tokens, tiles)
    except ImportError:
        return "matplotlib is not installed (pip install matplotlib)"
    except Exception as error:
        # The report does not depend on another library's version or settings.
        return f"matplotlib cannot draw it ({one_line(str(error))})"


def _draw(tokens: np.ndarray, tiles: np.ndarray) -> bytes:
    from matplotlib.figure import Figure  # optional

    figure = Figure(figsize=(9, 3), layout="constrained")
    for axes, values, name in zip(
        figure.subplots(1, 2), (tokens, tiles), ("tokens", "tiles"), strict=True
    ):
        axes.hist(values, bins=integer_bins(values))
        axes.set(xlabel=f"{name} of a sample", ylabel="samples")
        axes.grid(alpha=0.3)
    file = io.BytesIO()
    figure.savefig(file, dpi=120, format="png")
    return file.getvalue()


def integer_bins(values: np.ndarray, most: int = 60) -> np.ndarray:
    """Returns the edges f64[n + 1] of n <= `most` bins, each of the same number of integers."""
    low, high = (int(values.min()), int(values.max())) if len(values) else (0, 0)
    width = -(-(high - low + 1) // most)
    return np.arange(low, high + width + 1, width) - 0.5


def summary(tokens: np.ndarray) -> dict[str, float]:
    """Returns sum, mean, median, 99th percentile and maximum; all 0 if there are no numbers."""
    values = tokens if len(tokens) else np.zeros(1, np.int64)
    return {
        "sum": int(values.sum()),
        "mean": round(float(values.mean()), 1),
        "median": float(np.median(values)),
        "p99": float(np.percentile(values, 99)),
        "max": int(values.max()),
    }
