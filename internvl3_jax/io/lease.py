"""One process at a time at an address of object storage, which has no locks."""

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable

from internvl3_jax.io import remote_files
from internvl3_jax.io.file_errors import FileError, InUse
from internvl3_jax.io.terminal import one_line

LEASE = 45.0  # seconds


class Lease:
    """Held by one process at a time, which renews it; a context manager like safe_files.Lock.

    The holder rewrites an object several times within LEASE seconds (45, or INTERNVL3_JAX_LEASE in
    the environment, the same for all). A process that finds the object watches it that long, and
    takes it over if it does not change. So a killed holder blocks others no longer than that, and
    no clocks are compared.

    Args:
      path: address of the lease's object.
      what: what errors say is in use.
      note: called with a text before waiting.

    Raises:
      InUse: from `acquire` and `with`: the holder is alive.
    """

    def __init__(self, path, what: str, note: Callable[[str], None] = lambda text: None):
        self.path, self.what, self.note = path, what, note
        self.patience = float(os.environ.get("INTERNVL3_JAX_LEASE", LEASE))
        self.token, self.stopped, self.thread = secrets.token_hex(8), threading.Event(), None

    def acquire(self) -> None:
        if (content := self._read()) is not None:
            self.note(
                f"{self.what} was in use{holder(content)}; waiting up to {self.patience:.0f} s "
                "for a sign of life"
            )
            self._watch(content)
        self._write(0)
        # If two processes start at once, the last writer wins.
        time.sleep(min(1.0, self.patience / 10))
        if self.token not in (self._read() or b"").decode(errors="replace"):
            raise InUse(
                f"{self.what} is in use by another process that started at the same time; use "
                "another place"
            )
        self.stopped.clear()
        self.thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self.thread.start()

    def release(self) -> None:
        if self.thread is not None:
            self.stopped.set()
            self.thread.join()
            self.thread = None
            with contextlib.suppress(OSError):
                remote_files.remove(self.path.parent, [self.path.name])

    def __enter__(self) -> "Lease":
        self.acquire()
        return self

    def __exit__(self, *exception) -> None:
        self.release()

    def _watch(self, content: bytes | None) -> None:
        until = time.monotonic() + self.patience
        while content is not None and time.monotonic() < until:
            time.sleep(min(1.0, self.patience / 10))
            now = self._read()
            if now is not None and now != content:
                raise InUse(
                    f"{self.what} is in use by another process{holder(now)}; wait for it or end "
                    "it, or use another place"
                )
            content = now

    def _beat(self) -> None:
        count = 0
        while not self.stopped.wait(self.patience / 5):
            count += 1
            with contextlib.suppress(OSError):  # the next write may succeed
                self._write(count)

    def _read(self) -> bytes | None:
        try:
            return remote_files.read_bytes(self.path, max_bytes=4096)
        except FileError:
            return None

    def _write(self, count: int) -> None:
        values = {
            "host": socket.gethostname(),
            "process": os.getpid(),
            "token": self.token,
            "beat": count,
        }
        remote_files.write_bytes(self.path, json.dumps(values).encode())


def holder(content: bytes) -> str:
    """Returns " (process 12 on host)" from a lock's content, "" if it cannot be read."""
    try:
        values = json.loads(content)
        return f" (process {int(values['process'])} on {one_line(str(values['host']))})"
    except (ValueError, TypeError, KeyError):
        return ""
