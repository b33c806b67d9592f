"""Runs `python PROGRAM ...` commands as processes of their own, without importing jax and the
package anew for each.

A first process imports what the programs import, and forks for each command before any device is
opened. Nothing but time is shared: the command has its own arguments, directory, environment,
output and exit.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import runpy
import signal
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Libraries, and modules of the package, that neither run a program nor open a device when imported.
IMPORTED = (
    "jax",
    "optax",
    "orbax.checkpoint",
    "grain",
    "matplotlib.pyplot",
    "rich.progress",
    "tokenizers",
    "convert.run",
    "internvl3_jax.reward.best_of_n",
    "internvl3_jax.reward.critic",
    "internvl3_jax.data.loader",
    "internvl3_jax.training.evaluation",
    "internvl3_jax.training.run_log",
    "internvl3_jax.training.step",
)


@dataclasses.dataclass
class Done:
    status: int
    seconds: float  # of the processor
    output: str  # both streams


class Runner:
    def __init__(self, **environment: str):
        self.environment = environment
        self.process = None

    def __enter__(self):
        environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "120"} | self.environment
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            process_group=0,
        )
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process.stdout.close()

    def __call__(
        self, arguments: list[str], directory: pathlib.Path, typed: str = "", **environment: str
    ) -> Done:
        """Runs one command.

        arguments: the arguments of `python`: a file, or -m and a module, or -c and text.
        typed: the text of stdin.
        """
        with tempfile.TemporaryDirectory() as folder:
            (pathlib.Path(folder) / "in").write_text(typed)
            order = {
                "arguments": arguments,
                "directory": str(directory),
                "environment": environment,
                "folder": folder,
            }
            print(json.dumps(order), file=self.process.stdin, flush=True)
            answer = self.process.stdout.readline()
            assert answer, "the process that starts the commands is gone"
            status, seconds = json.loads(answer)
            return Done(
                status,
                seconds,
                (pathlib.Path(folder) / "out").read_text(encoding="utf-8", errors="replace"),
            )


def main() -> None:
    for name in IMPORTED:
        __import__(name)
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if not child:
            start(**order)
            return
        _, status, used = os.wait4(child, 0)
        print(
            json.dumps([os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime]),
            flush=True,
        )


def start(arguments: list[str], directory: str, environment: dict[str, str], folder: str) -> None:
    """Becomes the command; returns or raises as it does."""
    for number, name, flags in ((0, "in", os.O_RDONLY), (1, "out", os.O_WRONLY | os.O_CREAT)):
        os.dup2(os.open(os.path.join(folder, name), flags), number)
    os.dup2(1, 2)
    sys.stdin = open(0, closefd=False)
    os.environ.update(environment)
    os.chdir(directory)
    first, *rest = arguments
    if first == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(rest[0], {"__name__": "__main__"})
    elif first == "-m":
        sys.argv, sys.path[0] = rest, directory
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = arguments, str(pathlib.Path(first).resolve().parent)
        runpy.run_path(str(pathlib.Path(first).resolve()), run_name="__main__")


if __name__ == "__main__":
    main()
