"""Messages of the first process to all others, which may wait for them for hours."""

import base64

import jax

from internvl3_jax.parallel.multihost import current_watchdog
from internvl3_jax.parallel.watchdog import ROOT

_KEPT_ANNOUNCEMENTS = 64  # the slowest process is never as many behind


class Announcements:
    """Messages of process 0 that every other process receives in their order.

    They go through the key-value store: a process may wait for the next one for hours, which it
    could not in a computation.
    """

    def __init__(self):
        self._number = 0

    def send(self, message: bytes) -> None:
        """Sends a message, in process 0."""
        watchdog = current_watchdog()
        if watchdog is not None:
            watchdog.put(f"announced/{self._number}", base64.b64encode(message).decode())
            if self._number >= _KEPT_ANNOUNCEMENTS:
                old = self._number - _KEPT_ANNOUNCEMENTS
                watchdog.store.key_value_delete(f"{ROOT}/announced/{old}")
            self._number += 1

    def receive(self) -> bytes:
        """Waits for the next message, in another process; the watchdog ends the wait if process 0
        is gone.
        """
        watchdog = current_watchdog()
        while True:
            try:
                text = watchdog.store.blocking_key_value_get(
                    f"{ROOT}/announced/{self._number}", 60_000
                )
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise
                continue
            self._number += 1
            return base64.b64decode(text)
