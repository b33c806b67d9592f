"""Watchdog over the other processes of a run: heartbeats, steps, and messages about errors.

Processes communicate through the key-value store of jax's coordination service, which runs in
process 0, never through the devices. See multihost.py. Keys:

    host/P      the name of process P's host
    alive/P     [beats, step] of process P, every HEARTBEAT_S seconds
    news/KEY    {"status", "text"} that every process prints; a status other than 0 ends all
                processes with it. KEY is P where process P reports its own error
    check/N/P   the values of process P in the N-th assert_same_on_all_hosts
    verdict/N   [who was late, what differs], by process 0
"""

import contextlib
import json
import os
import signal
import sys
import threading
import time
import traceback

import jax

# Exit status when another process is gone or stuck, the one with which jax itself ends the rest.
# Schedulers restart a job whose status is above 127.
EXIT_PEER_LOST = 128 + signal.SIGABRT
HEARTBEAT_S = 2.0  # seconds between heartbeats
DEAD_AFTER_S = 30.0  # seconds without heartbeat after which a process is named
STALL_WARN_S = 300.0  # seconds behind the others after which a process is named
LEAVE_WAIT_S = 15.0  # seconds to wait at the end for processes that have not left yet
ROOT = "internvl3_jax"
# Methods of the store, which has no public API.
STORE_METHODS = (
    "key_value_set",
    "key_value_dir_get",
    "key_value_delete",
    "blocking_key_value_get",
    "wait_at_barrier",
)


class PeerLostError(RuntimeError):
    """Another process did not report in time."""


class Watchdog:
    """Sends this process's heartbeats and watches those of the others, in a thread.

    Attributes:
      store: Client of jax's coordination service.
      process: Index of this process.
      hosts: Host name of each process.
      give_up: Seconds a process may be behind the others before all exit with EXIT_PEER_LOST.
      step: The step that this process is about to run.
      checks: Calls of assert_same_on_all_hosts so far.
    """

    def __init__(self, store, process: int, hosts: list[str], give_up: float):
        self.store, self.process, self.hosts, self.give_up = store, process, hosts, give_up
        self.step, self.checks = 0, 0
        self.stopped, self.leaving = threading.Event(), threading.Lock()
        self.thread = threading.Thread(
            target=self._watch, daemon=True, name="watch the other processes"
        )

    def name(self, process: int) -> str:
        """Returns how messages name a process."""
        return f"process {process} (host {self.hosts[process]})"

    def put(self, key: str, value: str) -> None:
        """Sets a key of the store, in place of its old value."""
        self.store.key_value_set(f"{ROOT}/{key}", value, allow_overwrite=True)

    def read(self, folder: str) -> dict[str, str]:
        """Returns the keys below a folder of the store, and their values."""
        prefix = f"{ROOT}/{folder}/"
        return {
            key.removeprefix(prefix): value for key, value in self.store.key_value_dir_get(prefix)
        }

    def stop(self) -> None:
        """Stops the thread; one that is inside of jax when Python exits would crash it."""
        self.stopped.set()
        self.thread.join(5 * HEARTBEAT_S)

    # --- the end of the run ---

    def end_all(self, error: BaseException, status: int) -> None:
        """Prints the error as Python would, tells the other processes, and exits this one."""
        if isinstance(error, SystemExit | PeerLostError):
            text = str(error).removeprefix("error: ")
            _print(f"error: {text}")
        else:
            text = "".join(traceback.format_exception_only(error)).strip()
            traceback.print_exception(error)
            sys.stderr.flush()
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            # A network error here usually means that another process is gone. Name that one.
            if isinstance(error, jax.errors.JaxRuntimeError) and (silent := self._find_silent()):
                text = f"{silent} no longer answers: it died or cannot be reached"
                status = EXIT_PEER_LOST
                _print(f"error: {text}; the last checkpoint is kept")
            self.put(f"news/{self.process}", json.dumps({"status": status, "text": text}))
        self._exit(status)

    def _find_silent(self) -> str:
        """Returns the names of the other processes that send no heartbeats now, or ""."""
        before = self.read("alive")
        time.sleep(5 * HEARTBEAT_S)
        after = self.read("alive")
        silent = [
            number
            for number in range(len(self.hosts))
            if after.get(str(number)) == before.get(str(number))
        ]
        return " and ".join(self.name(number) for number in silent if number != self.process)

    def _exit(self, status: int) -> None:
        """Exits this process when all others exit too, or after a few heartbeats.

        jax's shutdown is a barrier. Behind it, no process needs the store any more; before it, the
        end of process 0, which holds the store, would abort the others. It would wait for an hour
        for a process that is dead or stuck, so it gets its own thread.
        """
        if not self.leaving.acquire(blocking=False):
            # Another thread of this process exits already, with the status that counts.
            threading.Event().wait()
        self.stopped.set()
        sys.stdout.flush()
        sys.stderr.flush()
        barrier = threading.Thread(target=_shut_down, daemon=True, name="leave the other processes")
        barrier.start()
        barrier.join(LEAVE_WAIT_S)
        os._exit(status)

    # --- the thread ---

    def _watch(self) -> None:
        """Sends heartbeats and reads messages; in process 0 also looks for late processes."""
        beats, printed, now = 0, set(), time.monotonic()
        history = {number: [0, now, 0, now] for number in range(len(self.hosts))}
        while not self.stopped.wait(HEARTBEAT_S):
            beats += 1
            try:
                self.put(f"alive/{self.process}", json.dumps([beats, self.step]))
                if self.process == 0:
                    self._check_progress(history)
                self._print_messages(printed)
            except jax.errors.JaxRuntimeError:
                return  # process 0 is gone; jax ends this process within a moment

    def _print_messages(self, printed: set[str]) -> None:
        """Prints messages that are not in `printed`, and exits if one of them ends the run."""
        messages = {
            key: json.loads(value) for key, value in self.read("news").items() if key not in printed
        }
        if self.stopped.is_set():
            return
        for key, message in messages.items():
            printed.add(key)
            sender = f"{self.name(int(key))} ended: " if key.isdecimal() else ""
            _print(f"{'error' if message['status'] else 'warning'}: {sender}{message['text']}")
        statuses = [message["status"] for message in messages.values() if message["status"]]
        if statuses:
            _print(
                f"this process ends with it, with status {statuses[0]}; the last checkpoint is kept"
            )
            self._exit(statuses[0])

    def _check_progress(self, history: dict[int, list]) -> None:
        """Names processes that send no heartbeats or hold up the others.

        history: Process -> [beats, when they last increased, step, when it last changed]; updated.
        """
        # 1) Update the history.
        now = time.monotonic()
        for key, value in self.read("alive").items():
            beats, step = json.loads(value)
            entry = history[int(key)]
            if beats != entry[0]:
                entry[:2] = beats, now
            if step != entry[2]:
                entry[2:] = step, now

        # 2) How long the furthest process has waited.
        furthest = max(step for _, _, step, _ in history.values())
        reached = min(since for _, _, step, since in history.values() if step == furthest)

        # 3) Warn about each late process, and give up on one that is stuck.
        for number, (beats, last_beat, step, _) in history.items():
            silence, wait = now - last_beat, now - reached if step < furthest else 0
            if silence > DEAD_AFTER_S:
                self._warn(
                    f"silent-{number}-{beats}",
                    f"{self.name(number)} sends no heartbeat; its last one was at step {step:,}",
                )
            elif wait > STALL_WARN_S:
                text = (
                    f"{self.name(number)} is at step {step:,}; others have waited at step "
                    f"{furthest:,} for {wait:.0f} s"
                )
                self._warn(f"behind-{number}-{step}", text)
                if wait > self.give_up:
                    self._warn(f"stuck-{number}", text, EXIT_PEER_LOST)

    def _warn(self, key: str, text: str, status: int = 0) -> None:
        if key not in self.read("news"):
            self.put(f"news/{key}", json.dumps({"status": status, "text": text}))


def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _shut_down() -> None:
    """Leaves jax's coordination service, as soon as all processes do."""
    with contextlib.suppress(RuntimeError):  # a process is gone, or the service
        jax.distributed.shutdown()
