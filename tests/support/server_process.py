"""Servers in processes of their own."""

import contextlib
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence

from tests.support import compilation_cache

ROOT = pathlib.Path(__file__).resolve().parents[2]
MODEL = ROOT / "examples" / "tiny_digits"
_QUICK = ["--rows=4", "--max_length=512", "--no_warm_up", "--verify=none", "--drain_seconds=60"]
_RUN = "import runpy; runpy.run_module('internvl3_jax.serve', run_name='__main__', alter_sys=True)"


class ServerProcess:
    """`python -m internvl3_jax.serve` with the digits model, on a free port.

    Args:
      flags: further ones.
      before: Python code that runs in the process first.
      folder: in which it runs.

    Attributes:
      url: of the server.
    """

    def __init__(self, flags: Sequence[str] = (), before: str = "", folder: pathlib.Path = ROOT):
        self._log = tempfile.NamedTemporaryFile("w+", suffix=".log")
        cache = f"--compilation_cache={compilation_cache.FOLDER}"
        command = [f"--checkpoint={MODEL}", "--port=0", cache, *_QUICK, *flags]
        code = f"{before}\nimport sys; sys.argv = ['serve', *{command!r}]\n{_RUN}"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdout=self._log,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:]])},
        )
        self.url = ""

    @property
    def log(self) -> str:
        return pathlib.Path(self._log.name).read_text()

    def wait_until_ready(self, seconds: float = 300.0) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log
            if found := re.search(r" on (http://\S+)", self.log):
                self.url = found[1]
                with contextlib.suppress(OSError):
                    with urllib.request.urlopen(f"{self.url}/health", timeout=60) as answer:
                        assert answer.status == 200
                        return
            time.sleep(0.1)
        raise AssertionError(f"the server does not start:\n{self.log}")

    def end(self, number: int = signal.SIGTERM, seconds: float = 120.0) -> int:
        """Sends a signal; returns the exit status."""
        self.process.send_signal(number)
        return self.process.wait(seconds)

    def resident_bytes(self) -> int:
        with open(f"/proc/{self.process.pid}/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._log.close()


@contextlib.contextmanager
def server_process(*arguments, **options) -> Iterator[ServerProcess]:
    server = ServerProcess(*arguments, **options)
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.close()
