"""Runs an engine on the cases of a pack and says what differs first, and why. Needs numpy alone."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from internvl3_jax.parity.causes import HINTS, causes_of, explain
from internvl3_jax.parity.compare import (
    STAGES,
    TOLERANCES,
    Difference,
    compare,
    derived,
    first_difference,
)
from internvl3_jax.parity.folder import Case, PackedModel, PackError, read_case


class EngineOfPack(Protocol):
    def run(self, root: pathlib.Path, case: Case) -> dict | None:
        """Returns stage -> value, of the stages that it has, and "error" if it stopped; None for a
        case that it cannot express.
        """


@dataclasses.dataclass
class CaseResult:
    """The outcome of a case.

    Attributes:
      compared: the stages that both have.
      difference: at the first stage that differs, or None.
      causes: the known faults that give the same there.
      text: the cause in words, or the engine's error; "" if all is equal.
      is_left_out: the engine cannot express the case.
      notes: what differs without counting.
    """

    case: str
    compared: list[str]
    difference: Difference | None = None
    causes: list[str] = dataclasses.field(default_factory=list)
    text: str = ""
    is_left_out: bool = False
    notes: list[str] = dataclasses.field(default_factory=list)

    @property
    def passed(self) -> bool:
        return self.difference is None and not self.text

    def lines(self) -> Iterator[str]:
        """Yields the lines of the report."""
        if self.is_left_out:
            yield f"  {self.case:8} left out: this engine has no such input"
            return
        if self.passed:
            yield f"  {self.case:8} equal: {', '.join(self.compared)}"
        elif self.difference is None:
            yield f"  {self.case:8} STOPPED: {self.text}"
        else:
            yield f"  {self.case:8} DIFFERS first at {self.difference.stage}: {self.difference.text}"
            yield f"{'':11}cause: {self.text}"
        for note in self.notes:
            yield f"{'':11}note: {note}"


def check_model(
    root: pathlib.Path,
    model: PackedModel,
    engine: EngineOfPack,
    dtype: str = "float32",
    cases: Sequence[str] = (),
    report: Callable[[str], None] = print,
) -> list[CaseResult]:
    """Compares an engine with the goldens of a model.

    Args:
      root: folder of the pack.
      dtype: of the engine's computation, which decides the tolerance.
      cases: names of cases; none: all.
      report: gets the lines of the report.

    Raises:
      PackError: there is no such case, or nothing could be compared.
    """
    if unknown := set(cases) - set(model.cases):
        raise PackError(f"there is no case {min(unknown)!r}; cases: {', '.join(model.cases)}")
    results = []
    for name in cases or model.cases:
        case = read_case(root / model.name, name)
        found = engine.run(root, case)
        results.append(compare_case(case, found, dtype))
        for line in results[-1].lines():
            report(line)
    if all(result.is_left_out for result in results):
        raise PackError(f"{model.name}: the engine can run none of the cases")
    return results


def compare_case(case: Case, found: dict | None, dtype: str) -> CaseResult:
    """Compares the stages of a case. found: as of `EngineOfPack.run`."""
    if found is None:
        return CaseResult(case.name, [], is_left_out=True)
    tolerance = TOLERANCES[dtype]
    # A server names tokens by their text, so only the values are compared, in order.
    by_value = "logprobs" in found and "logits" not in found
    golden = derived(case.stages, case.top, by_value)
    found = derived(found, case.top)
    faults = {name: derived(stages, case.top, by_value) for name, stages in case.faults.items()}
    case = dataclasses.replace(case, stages=golden, faults=faults)
    compared = [stage for stage in STAGES if stage in found and stage in golden]
    judged, notes = dict(found), []
    if dtype != "float32":
        # Near ties fall either way in few bits.
        for stage in ("answer_ids", "answer"):
            value = judged.pop(stage, None)
            if value is not None and compare(stage, value, golden[stage], tolerance):
                notes.append(f"{stage} differs; near ties do in {dtype}, so it is not judged")
    result = CaseResult(case.name, compared, notes=notes)
    result.difference = first_difference(judged, golden, tolerance)
    if result.difference is not None:
        result.causes = causes_of(found, case, result.difference, tolerance)
        result.text = explain(result.causes, result.difference, found, golden)
    elif "error" in found:
        result.text = _stopped(found["error"], compared, golden)
    elif not compared:
        result.text = f"the engine gave no stage of {', '.join(STAGES)}"
    return result


def _stopped(error: str, compared: list[str], golden: dict) -> str:
    """Returns what to say of an engine that stopped after stages that are equal."""
    given = [stage for stage in STAGES if stage in golden]
    last = max((given.index(stage) for stage in compared), default=-1)
    following = next((stage for stage in given[last + 1 :]), "answer")
    after = f"after {given[last]}" if last >= 0 else "before the first stage"
    return f"{after}: {error.strip() or 'an error without text'}; look at: {HINTS[following]}"
