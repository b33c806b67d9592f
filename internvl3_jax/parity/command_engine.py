"""Any program as an engine, by a protocol of JSON lines. Needs numpy alone.

The program is started once per model. For each case it reads one line from its standard input:

    {"case": name, "checkpoint": path or null, "question": text, "images": [paths],
     "frames": [paths], "delta": "1/4" or null, "max_new_tokens": 8, "inputs": path.npz,
     "output": path.npz}

`inputs` holds all golden arrays that an engine may begin with: token_ids, tiles, tile_counts,
positions. The program writes the arrays that it has, by stage, into `output`, or none, and answers
with one line on its standard output:

    {"output": path.npz or null, "rendered": text, "answer": text}     both texts are optional
    {"error": text}                                                    may have "output", too
"""

import contextlib
import json
import pathlib
import shlex
import subprocess
import tempfile

import numpy as np

from internvl3_jax.parity.compare import STAGES
from internvl3_jax.parity.folder import TEXTS, Case, PackError

_INPUTS = ("token_ids", "tiles", "tile_counts", "positions")


class CommandEngine:
    """Runs a program.

    Args:
      command: as in a shell, without one.
      checkpoint: what its requests name; None: the program knows.
    """

    def __init__(self, command: str, checkpoint: str | None):
        self.command, self.checkpoint = command, checkpoint
        self._folder = tempfile.TemporaryDirectory(prefix="internvl3_parity_")
        try:
            self._process = subprocess.Popen(
                shlex.split(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        except (OSError, ValueError, IndexError) as error:
            self._folder.cleanup()
            raise PackError(f"--engine command: cannot start {command!r}: {error}") from error

    def run(self, root: pathlib.Path, case: Case) -> dict:
        """Returns the stages that the program gives.

        Raises:
          PackError: it ended, or its line or its file does not follow the protocol.
        """
        folder = pathlib.Path(self._folder.name)
        inputs, output = folder / f"{case.name}_inputs.npz", folder / f"{case.name}.npz"
        np.savez(inputs, **{name: case.stages[name] for name in _INPUTS if name in case.stages})
        request = case.request
        self._send(
            case.name,
            {
                "case": case.name,
                "checkpoint": self.checkpoint,
                "question": request.question,
                "images": [str((root / path).absolute()) for path in request.images],
                "frames": [str((root / path).absolute()) for path in request.frames],
                "delta": request.delta,
                "max_new_tokens": request.max_new_tokens,
                "inputs": str(inputs),
                "output": str(output),
            },
        )
        return self._stages(case.name)

    def _send(self, case: str, request: dict) -> None:
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise PackError(self._ended(case)) from error

    def _ended(self, case: str) -> str:
        return f"{self.command!r} ended at case {case!r}; its messages are above"

    def _stages(self, case: str) -> dict:
        line = self._process.stdout.readline()
        if not line:
            raise PackError(self._ended(case))
        try:
            answer = json.loads(line)
            if not isinstance(answer, dict):
                raise ValueError("no object")
        except ValueError as error:
            raise PackError(
                f"{self.command!r} printed {line[:80]!r} at case {case!r} ({error}); its standard "
                "output is for one JSON object per case, its standard error for messages"
            ) from error
        stages = {name: str(answer[name]) for name in (*TEXTS, "error") if answer.get(name)}
        if answer.get("output"):
            with np.load(answer["output"], allow_pickle=False) as file:
                arrays = dict(file)
            if unknown := arrays.keys() - STAGES.keys():
                raise PackError(
                    f"{self.command!r}: {answer['output']} has {', '.join(sorted(unknown))}; "
                    f"stages are {', '.join(STAGES)}"
                )
            stages |= arrays
        return stages

    def close(self) -> None:
        """Ends the program: its input ends, and it has ten seconds."""
        with contextlib.suppress(BrokenPipeError):  # it has ended already
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._folder.cleanup()
