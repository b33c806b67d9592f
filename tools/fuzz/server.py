"""Runs a program on a damaged input in a process of its own, with limits of time and memory, and
keeps what it said.

The parent has imported the libraries and started no thread and no accelerator, so a forked child
begins where a program begins but for the seconds of its imports.
"""

import contextlib
import dataclasses
import gc
import os
import pathlib
import resource
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterable, Iterator

from tools.fuzz.case import Case, Kind, digest_of

ROOM = 6 << 30  # bytes of address space that a program may take beyond its imports
RESULT = ".result"
MOST_RESIDENT = 1800 << 20  # bytes in memory


@dataclasses.dataclass
class Outcome:
    """Outcome of a program.

    status: exit status, or minus the signal that ended it; None if it ran out of time.
    """

    case: Case
    status: int | None
    out: str
    err: str
    seconds: float
    resident: int
    changed: list[str]  # of Kind.untouched
    result: str


@dataclasses.dataclass
class _Running:
    kind: Kind
    case: Case
    folder: pathlib.Path
    started: float
    before: dict[str, str]


def preload() -> None:
    """Imports what the programs import, and checks that only one thread is running."""
    import matplotlib

    matplotlib.use("Agg")
    import grain  # noqa: F401
    import matplotlib.pyplot
    import rich.progress
    import rich.table  # noqa: F401

    import internvl3_jax.data.doctor.command
    import internvl3_jax.reward.best_of_n
    import internvl3_jax.reward.make_pairs
    import internvl3_jax.training.evaluation
    import internvl3_jax.training.metrics
    import internvl3_jax.training.state  # noqa: F401

    with contextlib.suppress(ImportError):
        import av  # noqa: F401
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1:
        raise RuntimeError(
            f"the imports left {threads} threads; children of this process could hang"
        )
    # A child that collects garbage would copy every page of what was imported.
    gc.freeze()


def run_all(
    work: Iterable[tuple[Kind, Case]], corpus: pathlib.Path, scratch: pathlib.Path, jobs: int
) -> Iterator[Outcome]:
    """Yields the outcome of every input, in the order in which the programs end."""
    waiting, running = iter(work), {}
    for number, (kind, case) in enumerate(waiting):
        while len(running) >= jobs:
            yield from _collect(running)
        folder = scratch / str(number)
        process, job = _start(kind, case, corpus, folder)
        running[process] = job
    while running:
        yield from _collect(running)


def _start(
    kind: Kind, case: Case, corpus: pathlib.Path, folder: pathlib.Path
) -> tuple[int, _Running]:
    folder.mkdir()
    for name in kind.inputs:
        source = corpus / name
        if source.is_dir():
            shutil.copytree(source, folder / name, symlinks=True)
        else:
            shutil.copy(source, folder / name)
    case.spoil(folder)
    before = {name: _state(folder / name) for name in kind.untouched}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # jax warns of every fork; it has started no thread yet
        process = os.fork()
    if not process:
        _child(kind, case, folder)
    return process, _Running(kind, case, folder, time.monotonic(), before)


def _state(path: pathlib.Path) -> str:
    return digest_of(path) if path.exists() else "absent"


def _child(kind: Kind, case: Case, folder: pathlib.Path):
    """Turns this process into the program; never returns."""
    status = 70
    try:
        os.setsid()
        os.chdir(folder)
        for number, name in ((1, ".out"), (2, ".err")):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        taken = (
            int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        )
        resource.setrlimit(resource.RLIMIT_AS, (taken + ROOM, taken + ROOM))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        status = _status_of(kind, case)
        sys.stdout.flush()
        sys.stderr.flush()
        if status == 0:
            pathlib.Path(RESULT).write_text(_result_of(kind, folder))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _status_of(kind: Kind, case: Case) -> int:
    try:
        return int(kind.program(case.arguments) or 0)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return 1 if isinstance(end.code, str) else int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1


def _result_of(kind: Kind, folder: pathlib.Path) -> str:
    try:
        return kind.result(folder)
    except Exception as error:  # what the program left cannot be read: part of the verdict
        return f"no result: {error!r}"


def _collect(running: dict) -> Iterator[Outcome]:
    """Waits a moment; returns the programs that have ended, or must end now."""
    time.sleep(0.005)
    for process, job in list(running.items()):
        ended, status, usage = os.wait4(process, os.WNOHANG)
        late = time.monotonic() - job.started > job.kind.seconds
        if not ended and not late:
            continue
        if not ended:
            os.killpg(process, signal.SIGKILL)
            _, status, usage = os.wait4(process, 0)
        else:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process, signal.SIGKILL)  # what it left behind
        del running[process]
        yield _outcome(
            job, None if not ended else os.waitstatus_to_exitcode(status), usage.ru_maxrss << 10
        )
        shutil.rmtree(job.folder, ignore_errors=True)


def _outcome(job: _Running, status: int | None, resident: int) -> Outcome:
    out, err = (_text(job.folder / name) for name in (".out", ".err"))
    changed = (
        [name for name, state in job.before.items() if _state(job.folder / name) != state]
        if status
        else []
    )
    result = _text(job.folder / RESULT) if status == 0 else ""
    return Outcome(
        job.case, status, out, err, time.monotonic() - job.started, resident, changed, result
    )


def _text(path: pathlib.Path) -> str:
    return path.read_bytes()[:2_000_000].decode(errors="replace") if path.exists() else ""
