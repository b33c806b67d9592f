"""Runs the cases of one part; the runner starts it with the part's settings as JSON."""

import importlib
import json
import pathlib
import sys
import time
import traceback

from benchmarks.gpu_parts.part import append, known_cases, read, unfinished


def run(settings: dict) -> None:
    """Runs the cases that have no line yet. Those that an earlier call was stopped in come last."""
    output, name = pathlib.Path(settings["output"]), settings["name"]
    rows = read(output)
    known = known_cases(rows, name, settings["retry"])
    last = unfinished(rows, name)
    module = importlib.import_module(settings["target"])
    cases = module.cases(settings["size"], settings["smoke"])
    for case, function in sorted(cases.items(), key=lambda item: item[0] in last):
        if case in known:
            continue
        append(output, part=name, case=case, began=True)
        began = time.perf_counter()
        try:
            values = function()
        except Exception as error:
            traceback.print_exc()
            values = {"error": f"{type(error).__name__}: {str(error)[:400]}"}
        append(output, part=name, case=case, **values, wall_s=round(time.perf_counter() - began, 2))


if __name__ == "__main__":
    run(json.loads(sys.argv[1]))
