"""Judges what a program did with an input."""

import dataclasses
import re

from tools.fuzz.server import MOST_RESIDENT, Outcome

GOOD = ("clear", "warned", "rightly accepted")
BAD = ("SILENT", "TRACEBACK", "HANG", "MEMORY", "WRONG", "UNNAMED")
MOST_LINES = 15  # of a message: a list of tensors, say

# Lines that are not the message: warnings, and what argparse and absl print before it.
_BESIDE = re.compile(r"^(usage:|warning|ignoring|\s|[WIE]\d{4} |$)", re.IGNORECASE)
_OUT_OF_MEMORY = re.compile(
    r"MemoryError|std::bad_alloc|Unable to allocate|RESOURCE_EXHAUSTED|[Oo]ut of memory|Cannot allocate memory"
)


@dataclasses.dataclass(frozen=True)
class Verdict:
    name: str
    message: str  # first line of what the program said of it, or what is wrong

    @property
    def is_good(self) -> bool:
        return self.name in GOOD


def judge(outcome: Outcome, wanted: str) -> Verdict:
    """Judges an outcome. wanted: the result of the undamaged input."""
    said = outcome.err + outcome.out
    message = _message(outcome)
    if outcome.status is None:
        return Verdict("HANG", f"killed after {outcome.seconds:.0f} s")
    if outcome.resident > MOST_RESIDENT or _OUT_OF_MEMORY.search(said):
        return Verdict("MEMORY", f"{outcome.resident >> 20} MiB; {message}")
    if (
        "Traceback (most recent call last)" in said
        or outcome.status < 0
        or outcome.status not in (0, 1, 2)
    ):
        last = next((line for line in reversed(outcome.err.splitlines()) if line.strip()), "")
        return Verdict("TRACEBACK", f"status {outcome.status}: {last[:200]}")
    if "\x1b" in said:
        return Verdict("WRONG", "control characters reach the terminal")
    if outcome.status:
        return _refused(outcome, message, said)
    return _accepted(outcome, wanted, said)


def _refused(outcome: Outcome, message: str, said: str) -> Verdict:
    case = outcome.case
    if case.expect == "accept":
        return Verdict("WRONG", f"refused: {message}")
    if outcome.changed:
        return Verdict(
            "WRONG", f"refused, but it left or changed {', '.join(outcome.changed)}: {message}"
        )
    if not any(name in said for name in case.names):
        return Verdict("UNNAMED", message)
    lines = [line for line in outcome.err.splitlines() if not _BESIDE.match(line)]
    if len(lines) > MOST_LINES:
        return Verdict("UNNAMED", f"{len(lines)} lines: {message}")
    return Verdict("clear", message)


def _accepted(outcome: Outcome, wanted: str, said: str) -> Verdict:
    expect, equal = outcome.case.expect, outcome.result == wanted
    warned = any(name in outcome.err or name in outcome.out for name in outcome.case.names)
    if expect == "refuse":
        return Verdict("SILENT", "accepted")
    # Reading the result may fail on what the program reported.
    if outcome.result.startswith("no result") and not (expect == "tell" and warned):
        return Verdict("WRONG", outcome.result)
    if expect == "accept" and not equal:
        return Verdict("WRONG", "another result than that of the undamaged input")
    if expect == "same" and not equal:
        return Verdict("SILENT", "accepted, with another result")
    if expect == "tell" and not equal:
        return (
            Verdict("warned", _message(outcome))
            if warned
            else Verdict("SILENT", "accepted, with another result and no word")
        )
    if expect == "warn":
        return (
            Verdict("warned", _message(outcome))
            if warned
            else Verdict("SILENT", "accepted without a warning")
        )
    return Verdict("rightly accepted", "")


def _message(outcome: Outcome) -> str:
    """Returns the line that says what is wrong."""
    lines = [line for line in (outcome.err + "\n" + outcome.out).splitlines() if line.strip()]
    found = next((line for line in lines if "error" in line.lower()), lines[-1] if lines else "")
    return found[:300]
