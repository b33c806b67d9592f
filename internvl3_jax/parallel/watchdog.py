"""The other processes of a run, as seen from this one: names, signs of life, news of errors. See
distributed.py.

They talk through the key-value store of jax's coordination service, which runs in process 0, never
through the devices. Keys:

    host/P     the name of process P's host
    alive/P    [beats, step] of process P, every BEAT seconds
    news/KEY   {"status", "text"} for everyone to print; a status other than 0 ends all processes
    with it. KEY is P where P says it left/P     process P has read of an end and is gone check/N/P
    what process P has at the N-th assert_same_on_all_hosts verdict/N  [who was late, what differs],
    by process 0
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

# When another process is gone or stuck: the status with which jax itself ends the rest. Schedulers
# take what is above 127 for worth a restart.
EXIT_PEER_LOST = 128 + signal.SIGABRT
HEARTBEAT_S = 2.0  # seconds between signs of life
DEAD_AFTER_S = 30.0  # seconds without one after which a process is named
STALL_WARN_S = 300.0  # seconds a process may be behind the others before it is named
ROOT = "internvl3_jax"
# Of the store, which has no public name.
NEEDED = (
    "key_value_set",
    "key_value_dir_get",
    "key_value_delete",
    "blocking_key_value_get",
    "wait_at_barrier",
)


class PeerLostError(RuntimeError):
    """Another process did not come."""


class Watchdog:
    """hosts: names, by process. give_up: seconds a process may be behind the others before all end
    with status EXIT_PEER_LOST.
    """

    def __init__(self, store, process: int, hosts: list[str], give_up: float):
        self.store, self.process, self.hosts, self.give_up = store, process, hosts, give_up
        self.step, self.checks = 0, 0
        self.ending = threading.Event()
        self.thread = threading.Thread(
            target=self._watch, daemon=True, name="watch the other processes"
        )

    def name(self, process: int) -> str:
        return f"process {process} (host {self.hosts[process]})"

    def put(self, key: str, value: str) -> None:
        self.store.key_value_set(f"{ROOT}/{key}", value, allow_overwrite=True)

    def read(self, folder: str) -> dict[str, str]:
        """Key below the folder -> value."""
        start = f"{ROOT}/{folder}/"
        return {
            key.removeprefix(start): value for key, value in self.store.key_value_dir_get(start)
        }

    def stop_watching(self) -> None:
        """Before Python ends: a thread that is inside jax at that moment would crash it."""
        self.ending.set()
        self.thread.join(5 * HEARTBEAT_S)

    # --- ending ---

    def end_all(self, error: BaseException, status: int) -> None:
        """Prints the error as Python would, tells the other processes, and ends this one."""
        if isinstance(error, SystemExit | PeerLostError):
            text = str(error).removeprefix("error: ")
            _say(f"error: {text}")
        else:
            text = "".join(traceback.format_exception_only(error)).strip()
            traceback.print_exception(error)
            sys.stderr.flush()
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            if isinstance(error, jax.errors.JaxRuntimeError) and (gone := self._not_answering()):
                # What the network said was that the other end is gone.
                text, status = (
                    f"{gone} no longer answers: it died or cannot be reached",
                    EXIT_PEER_LOST,
                )
                _say(f"error: {text}; the last checkpoint is kept")
            self.put(f"news/{self.process}", json.dumps({"status": status, "text": text}))
        self._leave(status)

    def _not_answering(self) -> str:
        before = self.read("alive")
        time.sleep(5 * HEARTBEAT_S)
        after = self.read("alive")
        silent = [
            number
            for number in range(len(self.hosts))
            if after.get(str(number)) == before.get(str(number))
        ]
        return " and ".join(self.name(number) for number in silent if number != self.process)

    def _leave(self, status: int) -> None:
        """Ends the process without jax's own farewell, which waits for all processes and then
        blames those that are late.
        """
        self.ending.set()
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self.put(f"left/{self.process}", "")
            until = time.monotonic() + 5 * HEARTBEAT_S
            # What the others have yet to read is in process 0.
            while (
                self.process == 0
                and len(self.read("left")) < len(self.hosts)
                and time.monotonic() < until
            ):
                time.sleep(0.1)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    # --- watching ---

    def _watch(self) -> None:
        """The thread: gives signs of life and reads the news; in process 0 it also looks for those
        who give none.
        """
        beats, told, now = 0, set(), time.monotonic()
        seen = {number: [0, now, 0, now] for number in range(len(self.hosts))}
        while not self.ending.wait(HEARTBEAT_S):
            beats += 1
            try:
                self.put(f"alive/{self.process}", json.dumps([beats, self.step]))
                if self.process == 0:
                    self._look(seen)
                self._read_news(told)
            except jax.errors.JaxRuntimeError:
                return  # process 0 is gone; jax ends this process within a moment

    def _read_news(self, told: set[str]) -> None:
        news = {
            key: json.loads(value) for key, value in self.read("news").items() if key not in told
        }
        if self.ending.is_set():
            return
        for key, row in news.items():
            told.add(key)
            sender = f"{self.name(int(key))} ended: " if key.isdecimal() else ""
            _say(f"{'error' if row['status'] else 'warning'}: {sender}{row['text']}")
        statuses = [row["status"] for row in news.values() if row["status"]]
        if statuses:
            _say(
                f"this process ends with it, with status {statuses[0]}; the last checkpoint is kept"
            )
            self._leave(statuses[0])

    def _look(self, seen: dict[int, list]) -> None:
        """Names who is silent and who holds up the others. `seen`: process -> [beats, when they
        last grew, step, since when].
        """
        now = time.monotonic()
        for key, value in self.read("alive").items():
            beats, step = json.loads(value)
            row = seen[int(key)]
            if beats != row[0]:
                row[:2] = beats, now
            if step != row[2]:
                row[2:] = step, now
        furthest = max(step for _, _, step, _ in seen.values())
        began = min(since for _, _, step, since in seen.values() if step == furthest)
        for number, (beats, heard, step, _) in seen.items():
            silence, wait = now - heard, now - began if step < furthest else 0
            if silence > DEAD_AFTER_S:
                self._warn(
                    f"silent-{number}-{beats}",
                    f"{self.name(number)} gives no sign of life; its last was at step {step:,}",
                )
            elif wait > STALL_WARN_S:
                text = f"{self.name(number)} is at step {step:,}; others have waited at step {furthest:,} for {wait:.0f} s"
                self._warn(f"behind-{number}-{step}", text)
                if wait > self.give_up:
                    self._warn(f"stuck-{number}", text, EXIT_PEER_LOST)

    def _warn(self, key: str, text: str, status: int = 0) -> None:
        if key not in self.read("news"):
            self.put(f"news/{key}", json.dumps({"status": status, "text": text}))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
