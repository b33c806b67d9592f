"""The output of infer.py --requests: one answer per line, in the order of the requests.

    OUTPUT                 the answers; a killed run resumes after the last complete line
    OUTPUT.lock            held by the writing process; the system releases it when that ends
    OUTPUT.settings.json   what the answers depend on; each line has its hash as "run"

A file that has other lines, answers to other requests, or answers made with other settings is never
changed.
"""

import hashlib
import json
import os
import pathlib
import sys
from collections.abc import Sequence

from internvl3_jax.inference.output_path import check_output_path, path_beside
from internvl3_jax.inference.requests import OPTIONS, image_hashes, paths_of
from internvl3_jax.inference.resumable import ROW_START, Rows, read_own_rows
from internvl3_jax.io import jsonl, remote_files, safe_files, strict_json
from internvl3_jax.io.remote_files import as_path, is_remote
from internvl3_jax.io.safe_files import FileError
from internvl3_jax.io.strict_json import JsonError
from internvl3_jax.io.terminal import excerpt, one_line

KIND = "settings of a file of answers"
NOT_RECORDED = "not recorded"
NOUN = "an answer of infer.py"


class AnswerFile:
    """A context manager that locks the output while it is open.

    Args:
      path: the output; a local path or an address of object storage.
      inputs: files that the program reads; the output must be none of them.
    """

    def __init__(self, path: str | os.PathLike, inputs: Sequence[str | os.PathLike] = ()):
        self.path = as_path(path) if is_remote(path) else pathlib.Path(os.path.expanduser(path))
        check_output_path(self.path, inputs)
        self.sidecar = path_beside(self.path, "settings.json")
        if not is_remote(self.path):
            # Before the lock is written next to the file of somebody else.
            _check_first_bytes(self.path, os.path.lexists(self.sidecar))
        self.answers: list[dict] = []
        self._lock = safe_files.lock_at(
            path_beside(self.path, "lock"),
            one_line(str(self.path)),
            lambda text: print(text, file=sys.stderr),
        )
        self._content = Rows(self.path, [], [], b"")
        self._file, self._run = None, ""

    def __enter__(self) -> "AnswerFile":
        self._lock.acquire()
        return self

    def __exit__(self, *exception) -> None:
        if self._file is not None:
            self._file.__exit__(*exception)
        self._lock.release()

    def check(self, requests: Sequence[dict], settings: dict) -> None:
        """Reads the existing answers into `self.answers`; writes nothing.

        Args:
          requests: of `read_requests`.
          settings: what the answers depend on, as far as it is known before a model is loaded.

        Raises:
          FileError: the file has other lines, or answers other requests, or was made with other
            settings.
        """
        recorded = self._recorded()
        if recorded is not None:
            compare_settings(recorded["settings"], settings, str(self.path))
        self._run = recorded["run"] if recorded else ""
        self._content = read_answers(self.path, requests, self._run or None)
        self.answers = list(self._content.rows)

    def start(self, requests: Sequence[dict], settings: dict) -> None:
        """Opens the file for `add`. Runs `check` with all settings, then cuts off a torn tail."""
        self.check(requests, settings)
        if not self._run:
            self._run = settings_hash(settings)
            if any(row.get("run", self._run) != self._run for row in self.answers):
                raise FileError(
                    f"{one_line(str(self.path))} was answered by another model or with other "
                    "settings; move it away or name another --output"
                )
            content = {"kind": KIND, "run": self._run, "settings": settings}
            text = json.dumps(content, indent=1, ensure_ascii=True) + "\n"
            safe_files.replace(self.sidecar, text)
        self._content.warn_of_tail()
        self._file = jsonl.Appender(self.path, sum(self._content.sizes))
        self._file.__enter__()

    def add(self, rows: Sequence[dict]) -> None:
        """Appends answers; they are on the disk when this returns."""
        rows = [row | {"run": self._run} for row in rows]
        self._file.write([jsonl.dumps(row) for row in rows])
        self.answers += rows

    def correct(self, rows: dict[int, dict]) -> None:
        """Replaces answers by index. A kill leaves the file as it was before or after that."""
        self.answers = [
            rows[index] | {"run": self._run} if index in rows else row
            for index, row in enumerate(self.answers)
        ]
        lines = [jsonl.dumps(row) for row in self.answers]
        self._file.__exit__(None, None, None)
        jsonl.rewrite(self.path, lines)
        self._file = jsonl.Appender(self.path, sum(len(line.encode("utf-8")) + 1 for line in lines))
        self._file.__enter__()

    def _recorded(self) -> dict | None:
        """Returns the content of the sidecar; None if there is none, or if there are no answers.

        Raises:
          FileError: the sidecar was not written by this program.
        """
        remote = is_remote(self.sidecar)
        if not (self.sidecar.exists() if remote else os.path.lexists(self.sidecar)):
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
            and isinstance(values.get("run"), str)
        )
        if not ours:
            raise FileError(
                f"{one_line(str(self.sidecar))}: does not hold the {KIND}; name another --output"
            )
        # The settings of answers that were moved away bind nobody.
        if remote:
            return values if remote_files.exists(self.path) else None
        return values if os.path.exists(self.path) and os.path.getsize(self.path) else None


def read_answers(
    output: str | os.PathLike, requests: Sequence[dict], run: str | None = None
) -> Rows:
    """Reads the answers of an output and checks that they answer the first of `requests`.

    Args:
      run: hash of the settings that the answers must have, where they have one; None if no
        settings are recorded.

    Raises:
      FileError: the file has a line that is not an answer of infer.py, or answers other requests or
        other images, or was made with other settings.
    """
    if not (remote_files.exists(output) if is_remote(output) else os.path.lexists(output)):
        return Rows(output, [], [], b"")
    content = read_own_rows(output, _is_answer, NOUN)
    rows, name, advice = (
        content.rows,
        one_line(str(output)),
        "move it away or name another --output",
    )
    if content.tail and not (content.tail_is_torn() and (rows or run)):
        raise JsonError(
            f"{name} line {len(rows) + 1} is not {NOUN}, nor the beginning of one; name another "
            "--output"
        )
    if len(rows) > len(requests):
        raise JsonError(
            f"{name} holds {len(rows)} answers, and {len(requests)} were asked for; {advice}"
        )
    for number, (row, request) in enumerate(zip(rows, requests, strict=False), 1):
        asked = request["asked"]
        names = ("id", "prompt")
        if "run" in row:
            names += ("image", "video", "document", *OPTIONS)
        if any(row.get(key) != asked.get(key) for key in names):
            raise JsonError(
                f"{name} holds answers to other questions than were asked (line {number} is of id "
                f"{excerpt(row['id'])}); {advice}"
            )
        _check_images(row, request, f"{name} line {number}", advice)
        if run and row.get("run", run) != run:
            raise JsonError(
                f"{name} line {number} was answered by another model or with other settings; "
                f"{advice}"
            )
    return content


def _check_images(row: dict, request: dict, where: str, advice: str) -> None:
    """Raises JsonError if the files of an answered request have changed since."""
    recorded = row.get("image_sha256")
    if recorded is None or "error" in row:
        return
    paths = paths_of(request)
    for image, old, new in zip(paths, recorded, image_hashes(paths), strict=False):
        if new != old:
            raise JsonError(
                f"{where} (id {excerpt(row['id'])}) was answered for another image: "
                f"{excerpt(image)[1:-1]} has changed since; {advice}"
            )


def _is_answer(row: dict) -> bool:
    return "id" in row and isinstance(row.get("prompt"), str) and bool({"text", "error"} & set(row))


def _check_first_bytes(path: pathlib.Path, has_sidecar: bool) -> None:
    """Raises FileError if the file does not begin like an answer, or like a torn one of ours."""
    if not path.exists() or not path.stat().st_size:
        return
    with open(path, "rb") as file:
        start = file.read(len(ROW_START))
    torn = has_sidecar and start.startswith(b"\0")
    if not (start.startswith(ROW_START) or ROW_START.startswith(start) or torn):
        raise FileError(
            f"{one_line(str(path))} line 1 is not {NOUN}, nor the beginning of one; name another "
            "--output"
        )


def settings_hash(settings: dict) -> str:
    """Returns 12 hexadecimal digits."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def compare_settings(recorded: dict, current: dict, output: str) -> None:
    """Raises FileError naming the settings that differ; only those in `current` are compared."""
    # A setting that a later version added is not recorded; its old value is None or False.
    differing = [
        name
        for name, value in current.items()
        if (recorded[name] != json.loads(json.dumps(value)) if name in recorded else value)
    ]
    if differing:
        listed = "; ".join(
            f"{name} is {excerpt(recorded.get(name, NOT_RECORDED))} in the file, "
            f"{excerpt(current[name])} now"
            for name in differing
        )
        raise FileError(
            f"{one_line(output)} holds answers of another model or other settings: {listed}; use "
            "the same, move it away or name another --output"
        )
