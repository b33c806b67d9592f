"""The doctor's report on the terminal."""

import math

from internvl3_jax.data.doctor.report import ERRORS
from internvl3_jax.io.terminal import one_line


def print_report(report: dict, folder: str) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(emoji=False)
    # of plain text: brackets in it are no markup
    table = Table(title=Text(one_line(report["meta"])))
    table.add_column("source", overflow="fold")
    for name in (
        "rows",
        "errors",
        "cut or dropped",
        "same id",
        "pictures",
        "tokens mean",
        "max",
        "tiles mean",
        "max",
    ):
        table.add_column(name, justify="right")
    for name, source in report["sources"].items():
        tokens, tiles = source["tokens"], source["tiles"]
        counts = [
            source[key]
            for key in ("rows", "errors", "shortened_or_dropped", "duplicate_ids", "pictures")
        ]
        table.add_row(
            Text(one_line(name)),
            *(
                f"{n:,}"
                for n in [*counts, tokens["mean"], tokens["max"], tiles["mean"], tiles["max"]]
            ),
        )
    console.print(table)

    def say(text: str) -> None:
        console.print(one_line(text), markup=False, highlight=False, soft_wrap=True)

    for name, source in report["sources"].items():
        for error in source["first_errors"]:
            say(f"{name} row {error['row']}: {error['reason']}")
        if source["empty_answers"]:
            say(
                f"warning: {name}: {source['empty_answers']:,} rows have an empty answer, the first: row "
                f"{source['first_empty_answers'][0]}; the model learns to say nothing there"
            )
    for warning in report["warnings"]:
        say(f"warning: {warning}")
    say(
        f"{report['errors']:,} errors; all of them in {folder}/{ERRORS}"
        if report["errors"]
        else "0 errors"
    )
    data = report["settings"]["data"]
    room = f"{data['tokens_per_row']:,} tokens and {data['tiles_per_row']} tiles"
    if any(source["pictures"] for source in report["sources"].values()):
        whose = "of a sample share" if data["tiles"] == "shared" else "have each"
        say(
            f"tiles: {data['tiles']} (data.tiles): the images {whose} {report['settings']['processor']['max_tiles']} tiles at most"
        )
    say(f"one pass fills at least {rows_of(report):,} rows of {room}")


def rows_of(report: dict) -> int:
    """Packed rows that one sample of each row of the files would fill if packing lost nothing:
    divided by data.rows, an epoch's steps.
    """
    needed = [
        sum(source[name]["sum"] for source in report["sources"].values())
        / max(1, report["settings"]["data"][f"{name}_per_row"])
        for name in ("tokens", "tiles")
    ]
    return math.ceil(max(needed))
