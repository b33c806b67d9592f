"""The file that answers go to, one a line in the order asked: never one of somebody else, never of
two models, resumed after a kill.

OUTPUT.lock     held while a process writes; the system releases it when the process ends
OUTPUT.settings.json     what the answers depend on; each line has its hash as "run"
"""

import hashlib
import json
import os
import pathlib
import sys
from collections.abc import Sequence

from internvl3_jax.inference.requests import read_answers
from internvl3_jax.io import jsonl, remote_files, safe_files, strict_json
from internvl3_jax.io.remote_files import as_path, is_remote
from internvl3_jax.io.safe_files import FileError
from internvl3_jax.io.terminal import excerpt, one_line

KIND = "settings of a file of answers"
UNSAID = "not recorded"
START = b'{"id": '  # of every line


class AnswerFile:
    """A context manager. Between `check` and its end no other process can use the same output.

    Args:
      path: of --output.
      inputs: files that are read, which it must not be.
    """

    def __init__(self, path: str | os.PathLike, inputs: Sequence[str | os.PathLike] = ()):
        self.path = as_path(path) if is_remote(path) else pathlib.Path(os.path.expanduser(path))
        check_place(self.path, inputs, "--output")
        if not is_remote(self.path):
            check_ours(self.path)
        self.sidecar = beside(self.path, "settings.json")
        self.answers: list[dict] = []
        self._lock = safe_files.lock_at(
            beside(self.path, "lock"),
            one_line(str(self.path)),
            lambda text: print(text, file=sys.stderr),
        )
        self._size, self._file, self._run = 0, None, ""

    def __enter__(self) -> "AnswerFile":
        self._lock.acquire()
        return self

    def __exit__(self, *exception) -> None:
        if self._file is not None:
            self._file.__exit__(*exception)
        self._lock.release()

    def check(self, requests: Sequence[dict], settings: dict) -> None:
        """FileError unless what is there is ours, of the same requests, and made with these
        settings, as far as they are known yet.

        Nothing is written. `self.answers` are the answers that are there.
        """
        known = self._recorded()
        if known is not None:
            compare(known["settings"], settings, str(self.path))
        self.answers, self._size = read_answers(self.path, requests, known and known["run"])
        self._run = known["run"] if known else ""

    def start(self, requests: Sequence[dict], settings: dict) -> None:
        """`check` with all settings; then the file is open for `add`, without a last line that was
        cut off.
        """
        self.check(requests, settings)
        if not self._run:
            self._run = settings_hash(settings)
            if any(row.get("run", self._run) != self._run for row in self.answers):
                raise FileError(
                    f"{one_line(str(self.path))} was answered by another model or with other settings; move it away or name another "
                    f"--output"
                )
            content = {"kind": KIND, "run": self._run, "settings": settings}
            safe_files.replace(
                self.sidecar, json.dumps(content, indent=1, ensure_ascii=True) + "\n"
            )
        self._file = jsonl.Appender(self.path, self._size)
        self._file.__enter__()

    def add(self, rows: Sequence[dict]) -> None:
        """Appends answers; they are on the disk when this returns."""
        rows = [row | {"run": self._run} for row in rows]
        self._file.write([jsonl.dumps(row) for row in rows])
        self.answers += rows

    def correct(self, rows: dict[int, dict]) -> None:
        """Puts other rows in the place of answers, by their index; a kill leaves the file before or
        after that.
        """
        self.answers = [
            rows[number] | {"run": self._run} if number in rows else row
            for number, row in enumerate(self.answers)
        ]
        lines = [jsonl.dumps(row) for row in self.answers]
        self._file.__exit__(None, None, None)
        jsonl.rewrite(self.path, lines)
        self._file = jsonl.Appender(self.path, sum(len(line.encode("utf-8")) + 1 for line in lines))
        self._file.__enter__()

    def _recorded(self) -> dict | None:
        """What the sidecar says; None if there is none, or no answers. FileError if it is not ours."""
        if not (
            self.sidecar.exists() if is_remote(self.sidecar) else os.path.lexists(self.sidecar)
        ):
            return None
        try:
            values = strict_json.read(self.sidecar, max_bytes=1 << 20)
        except strict_json.JsonError as error:
            raise FileError(
                f"{error}; it says how the answers in {one_line(self.path.name)} were made, so move "
                f"both away, or name another --output"
            ) from error
        ours = (
            isinstance(values, dict)
            and values.get("kind") == KIND
            and isinstance(values.get("settings"), dict)
        )
        if not ours or not isinstance(values.get("run"), str):
            raise FileError(f"{one_line(str(self.sidecar))}: is no {KIND}; name another --output")
        # Of answers that were moved away nothing need be kept.
        if is_remote(self.path):
            return values if remote_files.exists(self.path) else None
        return values if os.path.exists(self.path) and os.path.getsize(self.path) else None


def check_place(path: pathlib.Path, inputs: Sequence[str | os.PathLike], flag: str) -> None:
    """FileError unless a file can be at `path`: its folder is there and can be written to, and it
    is none of the files that are read.
    """
    name = one_line(str(path))
    if is_remote(path):
        if any(str(source) == str(path) for source in inputs):
            raise FileError(f"{flag} {name}: is read as well; name another file")
        return
    if "\0" in str(path):
        raise FileError(f"{flag} {name}: a name cannot have a null character in it")
    folder = path.parent
    if not folder.is_dir():
        raise FileError(
            f"{flag} {name}: there is no folder {one_line(str(folder))}; make it, or name another place"
        )
    if path.is_dir():
        raise FileError(f"{flag} {name}: is a folder; name a file in it")
    if path.is_symlink() and not path.exists():
        raise FileError(f"{flag} {name}: is a link to nothing; remove it, or name another place")
    if path.exists() and not path.is_file():
        raise FileError(
            f"{flag} {name}: is not a regular file (a pipe, socket or device); name a regular file"
        )
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise FileError(f"{flag} {name}: cannot be written (no permission); name another place")
    for source in inputs:
        if os.path.exists(source) and path.exists() and os.path.samefile(source, path):
            raise FileError(
                f"{flag} {name}: is {one_line(os.fspath(source))}, which is read; name another file"
            )


def check_ours(path: pathlib.Path) -> None:
    """Raises FileError if a file of somebody else is there, before anything is written beside it."""
    if not path.exists() or not path.stat().st_size:
        return
    with open(path, "rb") as file:
        start = file.read(len(START))
    if not (start.startswith(START) or START.startswith(start)):
        raise FileError(
            f"{one_line(str(path))} line 1 is no answer of infer.py, nor the beginning of one; name another --output"
        )


def beside(path: pathlib.Path, ending: str) -> pathlib.Path:
    """A file of ours beside an output: beside what a link names, so that every name of one output
    has the same lock.
    """
    real = path if is_remote(path) else pathlib.Path(os.path.realpath(path))
    return real.with_name(f"{real.name}.{ending}")


def settings_hash(settings: dict) -> str:
    """12 hexadecimal digits."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def compare(there: dict, here: dict, output: str) -> None:
    """FileError naming the settings that differ; only those in `here` are looked at."""
    # A setting that a later version added is not recorded; it was as None and False say.
    differing = [
        name
        for name in here
        if (there[name] != _plain(here[name]) if name in there else here[name])
    ]
    if differing:
        listed = "; ".join(
            f"{name} {excerpt(there.get(name, UNSAID))} there, {excerpt(here[name])} here"
            for name in differing
        )
        raise FileError(
            f"{one_line(output)} holds answers of another model or other settings: {listed}; use the same, move it away or name another "
            f"--output"
        )


def _plain(value):
    """As JSON gives it back."""
    return json.loads(json.dumps(value))
