"""Starts several processes on this machine that compute together as the hosts of a run do, with
CPU devices and gloo between them.
"""

import dataclasses
import os
import pathlib
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable

ROOT = pathlib.Path(__file__).resolve().parents[2]


@dataclasses.dataclass
class Ended:
    status: int  # negative: of the signal
    out: str  # stdout and stderr together


class Processes:
    """Starts `python *line` for each of `lines`, with `devices` CPU devices and what
    `environ(number)` adds to the environment.

    As a context manager it kills what is left at the end.
    """

    def __init__(
        self,
        lines: list[list[str]],
        devices: int = 2,
        environ: Callable[[int], dict] = lambda number: {},
    ):
        fixed = {
            "JAX_NUM_CPU_DEVICES": str(devices),
            "PYTHONPATH": str(ROOT),
            # Of several processes only process 0 writes the cache. The next time it would be ready
            # long before the others, and gloo waits only 30 s for them.
            "JAX_ENABLE_COMPILATION_CACHE": "true" if len(lines) == 1 else "false",
        }
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "bufsize": 1}
        self.running = [
            subprocess.Popen(
                [sys.executable, *line], env=os.environ | fixed | environ(number), **pipes
            )
            for number, line in enumerate(lines)
        ]
        self.lines = [[] for _ in lines]
        # A process whose output is not read blocks when its pipe is full.
        readers = zip(self.lines, self.running, strict=True)
        self.threads = [
            threading.Thread(target=lines.extend, args=[process.stdout])
            for lines, process in readers
        ]
        for thread in self.threads:
            thread.start()

    def wait_for(self, process: int, is_it: Callable[[str], bool]) -> None:
        """Waits until the process writes a line for which `is_it` is true.

        AssertionError if it ends before.
        """
        read = 0
        while self.threads[process].is_alive() or read < len(self.lines[process]):
            if read == len(self.lines[process]):
                time.sleep(0.02)
            elif is_it(self.lines[process][read]):
                return
            else:
                read += 1
        raise AssertionError(f"process {process} ended before that line:\n{self._out(process)}")

    def end(self, seconds: float) -> list[Ended]:
        """Waits for all processes. AssertionError with their output if one runs longer."""
        until = time.monotonic() + seconds
        while late := [
            number for number, process in enumerate(self.running) if process.poll() is None
        ]:
            if time.monotonic() > until:
                outs = "\n----\n".join(map(self._out, range(len(self.running))))
                raise AssertionError(f"processes {late} still run after {seconds} s:\n{outs}")
            time.sleep(0.02)
        for thread in self.threads:
            thread.join()
        return [
            Ended(process.returncode, self._out(number))
            for number, process in enumerate(self.running)
        ]

    def _out(self, process: int) -> str:
        return "".join(self.lines[process])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process, thread in zip(self.running, self.threads, strict=True):
            process.kill()  # does nothing to one that has ended
            process.wait()
            thread.join()
            process.stdout.close()


def free_address() -> str:
    """Returns a HOST:PORT that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def finish(processes: Processes, seconds: float = 400) -> list[Ended]:
    """Waits for all processes, which must end with status 0."""
    with processes:
        ended = processes.end(seconds)
    assert [process.status for process in ended] == [0] * len(ended), "\n----\n".join(
        process.out for process in ended
    )
    return ended
