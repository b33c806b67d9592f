"""Gives damaged inputs of every kind to the programs: each must be refused in one clear line, or
give the right result.

    python -m tools.fuzz                                     all inputs
    python -m tools.fuzz --kinds config rows --count 200     some of two kinds
    python -m tools.fuzz --only config-1a2b3c4d              one input again, with all that the program said
    python -m tools.fuzz --list                              the number of inputs of each kind

Good inputs are made from a tiny random model. Each damaged one is given to the program itself, in a
process and folder of its own, with a limit of time and memory. Verdicts: clear, warned, rightly
accepted; or SILENT (accepted, or with another result), TRACEBACK, HANG, MEMORY, WRONG (a good input
refused, another result, or something left behind) and UNNAMED (a message without the file or
field). The same seed makes the same inputs. The exit status is 1 if an input got one of the latter
verdicts.
"""

import argparse
import collections
import json
import os
import pathlib
import random
import sys
import tempfile
import time
from collections.abc import Iterator

from tools.fuzz import kinds_models
from tools.fuzz.case import Case, Kind, all_cases, undamaged

# Set before anything imports jax.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
os.environ["HF_HUB_OFFLINE"] = "1"


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    with tempfile.TemporaryDirectory(prefix="fuzz_") as scratch:
        scratch = pathlib.Path(scratch)
        os.environ["INTERNVL3_JAX_CACHE"] = str(scratch / "row_indices")
        names = [options.only.rpartition("-")[0]] if options.only else options.kinds
        kinds = [kind for kind in all_kinds() if not names or kind.name in names]
        corpus = prepare(scratch, kinds)
        work = chosen(kinds, options.seed, options.count, options.only)
        if options.list:
            for kind in kinds:
                print(f"{kind.name:16} {sum(one is kind for one, _ in work):5}")
            print(f"{'all':16} {len(work):5}")
            return 0
        if options.only and not work:
            sys.exit(
                f"error: there is no input {options.only}; the seed decides about some of them"
            )
        rows = []
        with open(options.output or os.devnull, "w", encoding="utf-8") as file:
            for row in fuzz(work, corpus, scratch, options.jobs, bool(options.only)):
                rows.append(row)
                file.write(json.dumps(row | {"seed": options.seed}) + "\n")
                file.flush()
    print(table(rows))
    return int(any(row["short"] for row in rows))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kinds", nargs="+", metavar="KIND", help="of inputs; all by default")
    parser.add_argument("--count", type=int, help="how many inputs, drawn from all of them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", metavar="ID", help="this input alone")
    parser.add_argument(
        "--jobs",
        type=int,
        default=max(1, min(4, len(os.sched_getaffinity(0)))),
        help="programs at a time",
    )
    parser.add_argument("--output", metavar="FILE", help="JSONL file of all verdicts")
    parser.add_argument("--list", action="store_true", help="count the inputs and stop")
    options = parser.parse_args(arguments)
    if options.kinds and (unknown := set(options.kinds) - {kind.name for kind in all_kinds()}):
        parser.error(
            f"unknown kind {sorted(unknown)[0]!r}; there are {', '.join(kind.name for kind in all_kinds())}"
        )
    return options


def all_kinds() -> list[Kind]:
    from tools.fuzz import (
        kinds_config,
        kinds_data,
        kinds_media,
        kinds_meta,
        kinds_ours,
        kinds_requests,
        kinds_settings,
        kinds_text,
    )

    modules = (
        kinds_models,
        kinds_config,
        kinds_text,
        kinds_ours,
        kinds_media,
        kinds_data,
        kinds_meta,
        kinds_requests,
        kinds_settings,
    )
    return [kind for module in modules for kind in module.KINDS]


def prepare(scratch: pathlib.Path, kinds: list[Kind]) -> pathlib.Path:
    """Returns the folder of valid inputs, filled with what these kinds need."""
    from tools.fuzz import corpus, first_runs, programs, server

    folder = scratch / "corpus"
    folder.mkdir()
    programs.prepare(folder)
    server.preload()
    first_runs.in_child(lambda: corpus.build(folder))
    first_runs.train_and_answer(folder, {name for kind in kinds for name in kind.inputs})
    kinds_models.use_corpus(folder)
    return folder


def chosen(
    kinds: list[Kind], seed: int, count: int | None, only: str | None
) -> list[tuple[Kind, Case]]:
    """Returns the share of `count` of each kind, in the order in which kinds are run."""
    work = [(kind, case) for kind in kinds for case in all_cases(kind, seed)]
    if only:
        return [(kind, case) for kind, case in work if case.id == only]
    if count is None or count >= len(work):
        return work
    drawn = set()
    for kind in kinds:
        own = [number for number, (one, _) in enumerate(work) if one is kind]
        drawn.update(
            random.Random(f"{seed}/{kind.name}/{count}").sample(
                own, max(1, count * len(own) // len(work))
            )
        )
    return [work[number] for number in sorted(drawn)]


def fuzz(
    work: list, corpus: pathlib.Path, scratch: pathlib.Path, jobs: int, verbose: bool = False
) -> Iterator[dict]:
    """Yields a row for each input, with its verdict.

    The undamaged input of each kind comes first and must be accepted.
    """
    from tools.fuzz.judge import judge
    from tools.fuzz.server import run_all

    started, wanted = time.monotonic(), {}
    kinds = {kind.name: kind for kind, _ in work}
    for stage in ([(kind, undamaged(kind)) for kind in kinds.values()], work):
        folder = pathlib.Path(tempfile.mkdtemp(dir=scratch))
        for number, outcome in enumerate(run_all(stage, corpus, folder, jobs), 1):
            case = outcome.case
            if case.name == "undamaged":
                wanted[case.kind] = outcome.result
            verdict = judge(outcome, wanted[case.kind])
            row = {
                "id": case.id,
                "kind": case.kind,
                "input": case.name,
                "expected": case.expect,
                "verdict": verdict.name,
            }
            row |= {
                "message": verdict.message,
                "seconds": round(outcome.seconds, 2),
                "short": not verdict.is_good,
            }
            if verbose or row["short"]:
                print(
                    f"{verdict.name:10} {case.id}  {case.name[:100]!r}: {verdict.message!r}"[:400],
                    flush=True,
                )
            if verbose:
                print(outcome.out + outcome.err)
            if number % 100 == 0:
                print(
                    f"{number} of {len(stage)}, {time.monotonic() - started:.0f} s",
                    file=sys.stderr,
                    flush=True,
                )
            yield row


def table(rows: list[dict]) -> str:
    """Formats the counts of verdicts by kind as a table."""
    from tools.fuzz.judge import BAD, GOOD

    counts = collections.Counter((row["kind"], row["verdict"]) for row in rows)
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    lines = [
        "",
        f"| {'kind':14} | inputs | " + " | ".join((*GOOD, *BAD)) + " |",
        "|---|" + "---|" * (1 + len(GOOD) + len(BAD)),
    ]
    for name in (*kinds, "all"):
        cells = [
            sum(
                number
                for (kind, what), number in counts.items()
                if what == one and name in (kind, "all")
            )
            for one in (*GOOD, *BAD)
        ]
        lines.append(f"| {name:14} | {sum(cells)} | " + " | ".join(map(str, cells)) + " |")
    short = sum(row["short"] for row in rows)
    return "\n".join([*lines, "", f"{len(rows)} inputs, {short} fall short"])


if __name__ == "__main__":
    sys.exit(main())
