"""Several processes as one run: they find each other, detect differences, and end together.

    initialize()                  before anything else that uses jax; nothing for a single process
    with abort_together():        around the rest: an error in one process ends all of them
        report_step(step)         before each step, so that a process that falls behind is named
        assert_same_on_all_hosts(step, values)
                                  sometimes: an error that names the process that differs
        with preemption_signal() as stops:
            stops(step)           the signal after which to stop, the same in all processes

None of this computes on the devices, so it works while they wait for a process that never arrives.
"""

import atexit
import collections
import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time

import jax
from jax.experimental import multihost_utils

from internvl3_jax.parallel.cluster import Environment, find_environment
from internvl3_jax.parallel.watchdog import (
    EXIT_PEER_LOST,
    ROOT,
    STORE_METHODS,
    PeerLostError,
    Watchdog,
)

# Exit status that schedulers take as stopped from outside, and restart.
TERMINATED = 128 + signal.SIGTERM
INTERRUPTED = 128 + signal.SIGINT  # by Ctrl-C

_watchdog: Watchdog | None = None  # None: a single process


# --- start ---------------------------------------------------------------------------------------


def initialize(
    coordinator: str = "",
    processes: int = -1,
    process: int = -1,
    start_seconds: float = 300,
    heartbeat_seconds: int = 60,
    give_up_seconds: float = 1800,
) -> None:
    """Joins the processes of the run and prints one line about it.

    Without the first three arguments, Open MPI, SLURM, Cloud TPU (one or several slices) and
    Kubernetes Jobs are detected; anything else is a single process. `processes=1` alone is a single
    process in any environment.

    Args:
      coordinator: HOST:PORT of process 0.
      processes: Number of processes.
      process: Index of this one.
      start_seconds: How long to wait for the others. The process then exits with EXIT_PEER_LOST.
      heartbeat_seconds: How long a dead process may stay unnoticed. jax then ends all others by
          SIGABRT, which is status EXIT_PEER_LOST.
      give_up_seconds: How long a process may be behind the others before all exit with
          EXIT_PEER_LOST.

    Raises:
      ValueError: The arguments are incomplete, or contradict each other or the environment.
    """
    environment = find_environment(coordinator, processes, process, os.environ)
    if environment is None:
        return
    timer = threading.Timer(start_seconds, _exit_incomplete, [environment, start_seconds])
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            **environment.arguments,
            # Later than the timer, whose message is readable.
            initialization_timeout=int(start_seconds) + 60,
            heartbeat_timeout_seconds=heartbeat_seconds,
            # Processes that finish early wait for the others; heartbeats detect the dead.
            shutdown_timeout_seconds=3600,
        )
    finally:
        timer.cancel()
    _exchange_hosts(environment, start_seconds, give_up_seconds)


def _exit_incomplete(environment: Environment, seconds: float) -> None:
    """Ends this process because others did not connect."""
    name = "" if environment.process is None else f"process {environment.process} on "
    count = "" if environment.processes is None else f"{environment.processes} "
    # Only known from arguments; jax finds the others.
    address = environment.arguments.get("coordinator_address")
    expected = f"; process 0 is expected at {address}" if address else ""
    print(
        f"error: {name}{socket.gethostname()}: the {count}processes found by {environment.source} "
        f"did not all connect within {seconds:.0f} s{expected}. Look for hosts whose log lacks "
        "this line",
        file=sys.stderr,
        flush=True,
    )
    os._exit(EXIT_PEER_LOST)


def _exchange_hosts(environment: Environment, seconds: float, give_up: float) -> None:
    """Prints this process's line, exchanges host names and starts the watchdog."""
    global _watchdog
    process, processes = jax.process_index(), jax.process_count()
    address, store = _coordination()
    slices = len({getattr(device, "slice_index", 0) for device in jax.devices()})
    source = f"{environment.source}{f' ({slices} slices)' if slices > 1 else ''}"
    print(
        f"process {process} of {processes} on {socket.gethostname()}, found by {source}, "
        f"coordinator {address}",
        flush=True,
    )
    if processes == 1:
        return
    if not all(hasattr(store, name) for name in STORE_METHODS):
        print(
            f"jax {jax.__version__} hides its key-value store: hosts are not compared", flush=True
        )
        return

    # Every process writes its host name, then all of them read all names.
    watchdog = Watchdog(store, process, [], give_up)
    watchdog.put(f"host/{process}", socket.gethostname())
    store.wait_at_barrier(f"{ROOT}/met", int(seconds * 1000))
    hosts = watchdog.read("host")
    watchdog.hosts = [hosts[str(number)] for number in range(processes)]
    if process == 0:
        names = ", ".join(f"{number} {host}" for number, host in enumerate(watchdog.hosts))
        print(f"hosts: {names}", flush=True)
    _watchdog = watchdog
    watchdog.thread.start()
    # Registered after jax's own handler, so it runs before it.
    atexit.register(watchdog.stop)


def _coordination():
    """Returns (address, key-value store) of jax's coordination service, which has no public API."""
    try:
        from jax._src.distributed import global_state
    except ImportError:
        return "unknown", None
    address = getattr(global_state, "coordinator_address", "unknown")
    return address, getattr(global_state, "client", None)


# --- end -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def abort_together():
    """Ends all processes when an error leaves the block in one of them, with its status.

    It goes around everything after `initialize`. Without it the other processes would wait in a
    computation that needs this one, for as long as their scheduler lets them. Exiting with status 0
    or TERMINATED is not an error: then all processes exit, and wait for each other.
    """
    try:
        yield
    except BaseException as error:
        status = _status(error)
        if _watchdog is None or status in (0, TERMINATED):
            raise
        _watchdog.end_all(error, status)


def _status(error: BaseException) -> int:
    """Returns the status with which Python would exit."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if isinstance(error, PeerLostError):
        return EXIT_PEER_LOST
    return 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1


@contextlib.contextmanager
def preemption_signal():
    """Yields stops(step), which returns the signal after which to stop, or 0.

    The signal is SIGTERM or SIGINT (Ctrl-C). It no longer ends the process at once; a second Ctrl-C
    does. Of several processes, the one that gets the signal tells the others, and `stops` returns
    it in all of them at the same step, within about a second. Each must call it at every step.
    """
    distributed, received = jax.process_count() > 1, []

    def interrupt(number, frame):
        # os.write and os._exit are safe in a signal handler.
        if signal.SIGINT in received:
            os.write(2, b"\nstopped at once; the last complete step is kept\n")
            os._exit(INTERRUPTED)
        os.write(
            2, b"\nstopping when this step is done and saved; press Ctrl-C again to stop at once\n"
        )
        received.append(number)
        if distributed:
            os.kill(os.getpid(), signal.SIGTERM)

    handlers = {signal.SIGINT: interrupt}
    if not distributed:
        # With several processes jax handles SIGTERM since `initialize`; a Python handler would
        # replace jax's.
        handlers[signal.SIGTERM] = lambda number, frame: received.append(number)
    # Only the main thread may set handlers. Elsewhere (notebooks, tests) signals stay as they are.
    if threading.current_thread() is not threading.main_thread():
        handlers = {}
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}

    def stops(step: int) -> int:
        if distributed:
            reached = multihost_utils.reached_preemption_sync_point(step)
            return signal.SIGTERM if reached else 0
        return received[0] if received else 0

    try:
        yield stops
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


# --- comparison ----------------------------------------------------------------------------------


def current_watchdog() -> Watchdog | None:
    """Returns the watchdog of this run; None in a single process."""
    return _watchdog


def report_step(step: int) -> None:
    """Records that this process is about to run a step on the devices."""
    if _watchdog is not None:
        _watchdog.step = step


def assert_same_on_all_hosts(step: int, values: dict[str, str | int], seconds: float = 300) -> None:
    """Compares `values` and the step between processes; every process must call it equally often.

    jax's multihost_utils.assert_equal compares on the devices. This goes through the key-value
    store, which still works where the devices wait for each other.

    Args:
      step: The step about to run, so that a difference is found before the devices wait.
      values: Name -> value that must be the same everywhere, such as shapes and hashes.
      seconds: How long to wait for the slowest process.

    Raises:
      ValueError: Values differ. The same in every process, naming the processes and values.
      PeerLostError: Processes did not report in time; names them.
    """
    watchdog = _watchdog
    if watchdog is None:
        return
    report_step(step)
    check, watchdog.checks = watchdog.checks, watchdog.checks + 1
    watchdog.put(f"check/{check}/{watchdog.process}", json.dumps({"step": step} | values))

    # Process 0 compares and publishes the verdict; the others wait for it.
    if watchdog.process == 0:
        late, differences = _compare(watchdog, step, check, seconds)
        watchdog.put(f"verdict/{check}", json.dumps([late, differences]))
        # All processes have reached this check, so none reads the previous one any more.
        for old in (f"check/{check - 1}/", f"verdict/{check - 1}"):
            watchdog.store.key_value_delete(f"{ROOT}/{old}")
    else:
        # A little longer, so that process 0 can say who is missing.
        timeout = seconds + 30
        try:
            verdict = watchdog.store.blocking_key_value_get(
                f"{ROOT}/verdict/{check}", int(timeout * 1000)
            )
        except jax.errors.JaxRuntimeError as error:
            raise PeerLostError(
                f"{watchdog.name(0)} did not report within {timeout:.0f} s at step {step:,}"
            ) from error
        late, differences = json.loads(verdict)
    if late:
        raise PeerLostError(late)
    if differences:
        raise ValueError(differences)


def _compare(watchdog: Watchdog, step: int, check: int, seconds: float) -> tuple[str, str]:
    """Waits for all reports; returns (who did not report, what differs), empty if all is well."""
    processes = range(len(watchdog.hosts))
    deadline, pause = time.monotonic() + seconds, 0.001
    while len(reports := watchdog.read(f"check/{check}")) < len(processes):
        if time.monotonic() > deadline:
            late = [watchdog.name(number) for number in processes if str(number) not in reports]
            names = " and ".join(late)
            return f"{names} did not report within {seconds:.0f} s at step {step:,}", ""
        time.sleep(pause)
        pause = min(2 * pause, 0.5)
    return "", _differences(watchdog, [json.loads(reports[str(number)]) for number in processes])


def _differences(watchdog: Watchdog, reports: list[dict]) -> str:
    """Describes the values that differ from what most processes have, and where."""
    differences = []
    for name in dict.fromkeys(name for report in reports for name in report):
        column = [report.get(name) for report in reports]
        usual, count = collections.Counter(column).most_common(1)[0]
        odd = [number for number, value in enumerate(column) if value != usual]
        if odd:
            listed = ", ".join(
                f"{column[number]!r} in {watchdog.name(number)}" for number in odd[:8]
            )
            more = f" and others in {len(odd) - 8} more" if len(odd) > 8 else ""
            rest = f"the other {count}" if count > 1 else watchdog.name(column.index(usual))
            differences.append(f"{name} is {listed}{more}, and {usual!r} in {rest}")
    return f"the processes differ: {'; '.join(differences)}" if differences else ""
