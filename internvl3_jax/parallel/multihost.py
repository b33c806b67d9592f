"""Many processes as one run: how they find each other, notice that they differ, and end together.

    initialize()                    before anything else that uses jax; does nothing for a single process
    with together(): ...            around all the rest: an error here ends the other processes, with a line that says where it was
    at(step)                        just before a step is given to the devices: who holds up the others can then be named
    assert_same_on_all_hosts(step, what)     now and then: an error that names the process that differs, instead of a hang
    with termination() as stops:    stops(step) says whether SIGTERM or Ctrl-C has come to any process, the same to all at the same step

None of this computes on the devices, so it works while they wait for a process that never comes.
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
from internvl3_jax.parallel.watchdog import EXIT_PEER_LOST, NEEDED, ROOT, PeerLostError, Watchdog

# the status that schedulers take for "stopped from outside": start it again
TERMINATED = 128 + signal.SIGTERM
INTERRUPTED = 128 + signal.SIGINT  # by Ctrl-C

_peers: Watchdog | None = None  # None: a single process


# --- finding each other --------------------------------------------------------------------------


def initialize(
    coordinator: str = "",
    processes: int = -1,
    process: int = -1,
    start_seconds: float = 300,
    heartbeat_seconds: int = 60,
    give_up_seconds: float = 1800,
) -> None:
    """Joins the processes of the run, by the three arguments or by what the environment says, and
    prints one line about it.

    coordinator: HOST:PORT of process 0. Without any of the three, Open MPI, SLURM, Cloud TPU (one
        or several slices) and Kubernetes
        Jobs are recognised, and anything else is a single process; `processes=1` alone is one
        whatever the environment says.
    start_seconds: how long to wait for the others; the process then ends with status
        EXIT_PEER_LOST.
    heartbeat_seconds: how long a dead process may stay unnoticed; jax then ends all others by
        SIGABRT, which is status EXIT_PEER_LOST.
    give_up_seconds: how long a process may be behind the others before all end with status
        EXIT_PEER_LOST.

    ValueError for arguments that are incomplete or contradict each other or the environment.
    """
    found = find_environment(coordinator, processes, process, os.environ)
    if found is None:
        return
    late = threading.Timer(start_seconds, _not_all_came, [found, start_seconds])
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(
            **found.arguments,
            initialization_timeout=int(start_seconds) + 60,  # after ours, whose message is readable
            heartbeat_timeout_seconds=heartbeat_seconds,
            # who is ready first waits; the dead are found by their heartbeat
            shutdown_timeout_seconds=3600,
        )
    finally:
        late.cancel()
    _meet(found, start_seconds, give_up_seconds)


def _not_all_came(found: Environment, seconds: float) -> None:
    number = "" if found.process is None else f"process {found.process} on "
    count = "" if found.processes is None else f"{found.processes} "
    # only of the arguments; jax finds the others
    address = found.arguments.get("coordinator_address")
    place = f"; process 0 is expected at {address}" if address else ""
    print(
        f"error: {number}{socket.gethostname()}: the {count}processes found by {found.how} did not all come within {seconds:.0f} s"
        f"{place}. Look for hosts whose log lacks this line",
        file=sys.stderr,
        flush=True,
    )
    os._exit(EXIT_PEER_LOST)


def _meet(found: Environment, seconds: float, give_up: float) -> None:
    """Says who is here, exchanges host names and begins to watch."""
    global _peers
    process, processes = jax.process_index(), jax.process_count()
    address, store = _coordination()
    slices = len({getattr(device, "slice_index", 0) for device in jax.devices()})
    how = f"{found.how}{f' ({slices} slices)' if slices > 1 else ''}"
    print(
        f"process {process} of {processes} on {socket.gethostname()}, found by {how}, coordinator {address}",
        flush=True,
    )
    if processes == 1:
        return
    if not all(hasattr(store, name) for name in NEEDED):
        print(
            f"jax {jax.__version__} hides its key-value store: hosts are not compared", flush=True
        )
        return
    peers = Watchdog(store, process, [], give_up)
    peers.put(f"host/{process}", socket.gethostname())
    store.wait_at_barrier(f"{ROOT}/met", int(seconds * 1000))
    hosts = peers.read("host")
    peers.hosts = [hosts[str(number)] for number in range(processes)]
    if process == 0:
        print(
            "hosts: " + ", ".join(f"{number} {host}" for number, host in enumerate(peers.hosts)),
            flush=True,
        )
    _peers = peers
    peers.thread.start()
    atexit.register(peers.stop_watching)  # later than jax registered its own, so it runs earlier


def _coordination():
    """(address, key-value store) of jax's coordination service; no public name leads to them."""
    try:
        from jax._src.distributed import global_state
    except ImportError:
        return "unknown", None
    return getattr(global_state, "coordinator_address", "unknown"), getattr(
        global_state, "client", None
    )


# --- ending together -----------------------------------------------------------------------------


@contextlib.contextmanager
def abort_together():
    """Around all that the process does after `initialize`. An error in it is told to the other
    processes, which end with its status.

    Without this they would wait, in a computation that needs this process, for as long as their
    scheduler lets them. Leaving with status 0, TERMINATED or, where it is alone, INTERRUPTED is no
    error: then all processes leave, and wait for each other.
    """
    try:
        yield
    except BaseException as error:
        status = _status(error)
        if _peers is None or status in (0, TERMINATED):
            raise
        _peers.end_all(error, status)


def _status(error: BaseException) -> int:
    """The status with which Python would end."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if isinstance(error, PeerLostError):
        return EXIT_PEER_LOST
    return 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1


@contextlib.contextmanager
def preemption_signal():
    """Yields a function from a step to the signal, SIGTERM or SIGINT (Ctrl-C), after which to stop,
    or 0. Neither ends the process any more at once, but for a second Ctrl-C, which does.

    One process of several tells the others, and all get the same answer at the same step, within
    about a second. For that each must ask at every step.
    """
    several, came = jax.process_count() > 1, []

    def interrupt(number, frame):
        if signal.SIGINT in came:
            os.write(2, b"\nstopped at once; the last complete step is kept\n")
            os._exit(INTERRUPTED)
        os.write(
            2, b"\nstopping when this step is done and saved; press Ctrl-C again to stop at once\n"
        )
        came.append(number)
        if several:
            os.kill(os.getpid(), signal.SIGTERM)

    handlers = {signal.SIGINT: interrupt}
    if not several:
        # Of several jax has caught SIGTERM since `initialize`; a handler of Python's would take it
        # away from there.
        handlers[signal.SIGTERM] = lambda number, frame: came.append(number)
    # Only the main thread may set handlers; in a notebook's or test's thread the signals stay as
    # they are.
    mine = handlers if threading.current_thread() is threading.main_thread() else {}
    before = {number: signal.signal(number, handler) for number, handler in mine.items()}
    try:
        if several:
            yield (
                lambda step: (
                    signal.SIGTERM if multihost_utils.reached_preemption_sync_point(step) else 0
                )
            )
        else:
            yield lambda step: came[0] if came else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- comparing -----------------------------------------------------------------------------------


def report_step(step: int) -> None:
    """Notes that this process is about to give the step to the devices."""
    if _peers is not None:
        _peers.step = step


def assert_same_on_all_hosts(step: int, what: dict[str, str | int], seconds: float = 300) -> None:
    """Compares `what` (and the step) between the processes. Every process must call it equally
    often; it waits for all of them.

    step: the one about to run, so that a difference is found before the devices wait for each
        other.
    what: name -> value that must be the same everywhere, such as a batch's shapes and a hash of the
        configuration.
    seconds: how long to wait for the slowest.

    ValueError, the same in every process, naming the processes that differ and in what;
    PeerLostError naming those that did not come.
    """
    peers = _peers
    if peers is None:
        return
    report_step(step)
    check, peers.checks = peers.checks, peers.checks + 1
    peers.put(f"check/{check}/{peers.process}", json.dumps({"step": step} | what))
    if peers.process == 0:
        late, differing = _judge(peers, step, check, seconds)
        peers.put(f"verdict/{check}", json.dumps([late, differing]))
        # All have come to this check, so none reads the one before any more.
        for old in (f"check/{check - 1}/", f"verdict/{check - 1}"):
            peers.store.key_value_delete(f"{ROOT}/{old}")
    else:
        try:
            # A little longer, so that process 0 can say who is missing.
            verdict = peers.store.blocking_key_value_get(
                f"{ROOT}/verdict/{check}", int((seconds + 30) * 1000)
            )
        except jax.errors.JaxRuntimeError as error:
            raise PeerLostError(
                f"{peers.name(0)} did not report within {seconds + 30:.0f} s at step {step:,}"
            ) from error
        late, differing = json.loads(verdict)
    if late:
        raise PeerLostError(late)
    if differing:
        raise ValueError(differing)


def _judge(peers: Watchdog, step: int, check: int, seconds: float) -> tuple[str, str]:
    """Waits for the reports of all: (who did not come, what differs), empty if all is well."""
    until, pause = time.monotonic() + seconds, 0.001
    while len(reports := peers.read(f"check/{check}")) < len(peers.hosts):
        if time.monotonic() > until:
            late = " and ".join(
                peers.name(number)
                for number in range(len(peers.hosts))
                if str(number) not in reports
            )
            return f"{late} did not report within {seconds:.0f} s at step {step:,}", ""
        time.sleep(pause)
        pause = min(2 * pause, 0.5)
    return "", _differences(
        peers, [json.loads(reports[str(number)]) for number in range(len(peers.hosts))]
    )


def _differences(peers: Watchdog, values: list[dict]) -> str:
    """What differs from what most have, and where."""
    found = []
    for name in dict.fromkeys(name for row in values for name in row):
        column = [row.get(name) for row in values]
        usual, count = collections.Counter(column).most_common(1)[0]
        odd = [number for number, value in enumerate(column) if value != usual]
        if odd:
            some = ", ".join(f"{column[number]!r} in {peers.name(number)}" for number in odd[:8])
            more = f" and others in {len(odd) - 8} more" if len(odd) > 8 else ""
            most = f"the other {count}" if count > 1 else peers.name(column.index(usual))
            found.append(f"{name} is {some}{more}, and {usual!r} in {most}")
    return f"the processes differ: {'; '.join(found)}" if found else ""
