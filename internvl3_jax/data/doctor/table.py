"""The doctor's report on the terminal, legible at 80 columns."""

import math
from collections.abc import Iterator

from internvl3_jax.data.doctor.report import ERRORS
from internvl3_jax.io.terminal import one_line


def print_report(report: dict, folder: str) -> None:
    """Prints a table of the sources, their errors and warnings, and how many rows they fill."""
    from rich.console import Console

    console = Console(emoji=False)
    console.print(_table(report))
    lines = [
        *(line for name, source in report["sources"].items() for line in _errors(name, source)),
        *(line for name, source in report["sources"].items() for line in _warnings(name, source)),
        *(f"warning: {warning}" for warning in report["warnings"]),
        _conclusion(report, folder),
        *_sizes(report),
    ]
    for line in lines:
        console.print(one_line(line), markup=False, highlight=False, soft_wrap=True)


def _table(report: dict):
    from rich import box
    from rich.table import Table
    from rich.text import Text

    # Plain text: brackets in it are no markup.
    table = Table(title=Text(one_line(report["meta"])), box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("source", overflow="fold")
    for name in ("rows", "errors", "images", "tokens\nmean", "\nmax", "tiles\nmean", "\nmax"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, source in report["sources"].items():
        tokens, tiles = source["tokens"], source["tiles"]
        numbers = [*(source[key] for key in ("rows", "errors", "images"))]
        numbers += [round(tokens["mean"]), tokens["max"], tiles["mean"], tiles["max"]]
        table.add_row(Text(one_line(name)), *(f"{number:,}" for number in numbers))
    return table


def _errors(name: str, source: dict) -> Iterator[str]:
    """Returns one line for each reason of the first errors, with its rows."""
    rows: dict[str, list[int]] = {}
    for error in source["first_errors"]:
        rows.setdefault(error["reason"], []).append(error["row"])
    for reason, numbers in rows.items():
        label = "row" if len(numbers) == 1 else "rows"
        yield f"{name} {label} {', '.join(map(str, numbers))}: {reason}"
    more = source["errors"] - len(source["first_errors"])
    if more:
        yield f"{name}: {more:,} more rows with errors"


def _warnings(name: str, source: dict) -> Iterator[str]:
    if count := source["shortened_or_dropped"]:
        first = source["first_warnings"][0]
        yield (
            f"warning: {name}: {_rows(count)} cut or dropped to fit a row, the first: row "
            f"{first['row']}: {first['reason']}"
        )
    if count := source["empty_answers"]:
        yield (
            f"warning: {name}: {_rows(count)} with an empty answer, the first: row "
            f"{source['first_empty_answers'][0]}; the model learns to say nothing there"
        )
    if count := source["literal_tags"]:
        yield (
            f"warning: {name}: {_rows(count)} with <image> or <video> in the text and no image for "
            f"it, the first: row {source['first_literal_tags'][0]}; the model sees the tag as text"
        )
    if count := source["duplicate_ids"]:
        id, times = next(iter(source["first_duplicate_ids"].items()))
        ids = "1 id that occurs" if count == 1 else f"{count:,} ids that occur"
        yield f"warning: {name}: {ids} more than once, such as {id!r} ({times:,} times)"


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count:,} rows"


def _conclusion(report: dict, folder: str) -> str:
    count = report["errors"]
    if not count:
        return "0 errors"
    path = f"{folder}/{ERRORS}"
    return (
        f"{count:,} {'error' if count == 1 else 'errors'}, listed in {path}; fix the rows, or "
        f"leave them out of training: --config.data.exclude_file={path}"
    )


def _sizes(report: dict) -> Iterator[str]:
    data = report["settings"]["data"]
    if any(source["images"] for source in report["sources"].values()):
        most = report["settings"]["processor"]["max_tiles"]
        rule = "of a sample share" if data["tiles"] == "shared" else "have each"
        yield f"tiles: {data['tiles']} (data.tiles): the images {rule} {most} tiles at most"
    yield (
        f"one pass fills at least {_rows(rows_of(report))} of {data['tokens_per_row']:,} tokens "
        f"and {data['tiles_per_row']} tiles"
    )


def rows_of(report: dict) -> int:
    """Returns the packed rows that one pass over the files fills if packing loses nothing.

    Divided by data.rows, it is the number of steps of an epoch.
    """
    needed = [
        sum(source[name]["sum"] for source in report["sources"].values())
        / max(1, report["settings"]["data"][f"{name}_per_row"])
        for name in ("tokens", "tiles")
    ]
    return math.ceil(max(needed))
