"""Parts of the GPU benchmark, and the lines that they write.

A part is a module with `cases(size, smoke)`, which returns functions by name. Each returns the
values of one line of results.jsonl:

    {"part", "case", "began": true}      before a case
    {"part", "case", ...values}          after it
    {"part", "case", "error"}            in its place, if it failed or was stopped
    {"part", "status", "seconds"}        after the part: "finished", "stopped" or "failed"
    {"run": {...}}                       once per call: card, versions, command, date
"""

import dataclasses
import json
import pathlib

RESULTS = "results.jsonl"


@dataclasses.dataclass(frozen=True)
class Part:
    """One process of the benchmark.

    Attributes:
      name: shown, and given to --parts.
      target: module with `cases`.
      size: of the model, or "".
      seconds: time limit.
      xla_flags: added to XLA_FLAGS.
    """

    name: str
    target: str
    size: str
    seconds: float
    xla_flags: str = ""


def append(output: pathlib.Path, **row) -> None:
    """Writes one line, in one piece, so that nothing known is lost if the process ends."""
    with open(output / RESULTS, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read(output: pathlib.Path) -> list[dict]:
    """Returns all complete lines."""
    path = output / RESULTS
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue  # cut off while it was written
    return rows


def latest(rows: list[dict]) -> dict[tuple[str, str], dict]:
    """Returns the last line with values or an error of each (part, case)."""
    return {
        (row["part"], row["case"]): row for row in rows if "case" in row and not row.get("began")
    }


def unfinished(rows: list[dict], part: str) -> list[str]:
    """Returns the cases of a part that began and have neither values nor an error."""
    known = latest(rows)
    begun = (row["case"] for row in rows if row.get("part") == part and row.get("began"))
    return [case for case in dict.fromkeys(begun) if (part, case) not in known]


def known_cases(rows: list[dict], part: str, retry: bool) -> set[str]:
    """Returns the cases that need not run again."""
    return {
        case
        for (name, case), row in latest(rows).items()
        if name == part and not (retry and "error" in row)
    }
