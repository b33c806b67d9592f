"""Damaged requests, answers, questions and tables."""

import json
import pathlib
import random
from collections.abc import Iterator

from tools.fuzz import programs
from tools.fuzz.case import Case, Kind
from tools.fuzz.mutate import byte_changes, edit_bytes, flip_changes, place_changes

REQUESTS, ANSWERS, QUESTIONS = (
    "ask/requests.jsonl",
    "ask/answers.jsonl",
    "questions/questions.jsonl",
)
REFERENCE = "pairs/reference.jsonl"


def nothing(folder: pathlib.Path) -> None:
    """Damages nothing: the case differs by its arguments."""


def line_text(file: str, number: int, text: str):
    """Returns damage that replaces a line by text."""

    def spoil(folder: pathlib.Path) -> None:
        lines = (folder / file).read_text(encoding="utf-8").split("\n")
        lines[number] = text
        (folder / file).write_text("\n".join(lines), encoding="utf-8", errors="surrogateescape")

    return spoil


def _field(file: str, number: int, key: str, text: str):
    """Returns damage that sets a value of a line, which may not have had it, to JSON text."""

    def spoil(folder: pathlib.Path) -> None:
        lines = (folder / file).read_text(encoding="utf-8").split("\n")
        lines[number] = json.dumps(json.loads(lines[number]) | {key: "@@"}).replace('"@@"', text)
        (folder / file).write_text("\n".join(lines), encoding="utf-8")

    return spoil


def _line_changes(file: str) -> Iterator[tuple]:
    """Yields damage to a complete JSONL file."""
    yield f"{file} byte order mark", "same", edit_bytes(file, lambda data: b"\xef\xbb\xbf" + data)
    yield f"{file} CRLF", "same", edit_bytes(file, lambda data: data.replace(b"\n", b"\r\n"))
    yield f"{file} no last line break", "same", edit_bytes(file, lambda data: data[:-1])
    yield (
        f"{file} blank lines",
        "either",
        edit_bytes(file, lambda data: data.replace(b"\n", b"\n\n")),
    )
    yield f"{file} UTF-16", "same", edit_bytes(file, lambda data: data.decode().encode("utf-16"))
    yield (
        f"{file} Latin-1",
        "refuse",
        edit_bytes(file, lambda data: data.replace(b"Read", b"R\xe9ad").replace(b"hi", b"h\xef")),
    )
    yield f"{file} one line", "refuse", edit_bytes(file, lambda data: data.replace(b"\n", b" "))
    yield (
        f"{file} a list",
        "refuse",
        edit_bytes(file, lambda data: b"[" + b",".join(data.split(b"\n")[:-1]) + b"]\n"),
    )
    yield f"{file} binary", "refuse", edit_bytes(file, lambda data: bytes(range(256)) * 10)
    yield f"{file} zeros", "refuse", edit_bytes(file, lambda data: bytes(5000))
    yield from place_changes(file)


WRONG_LINES = (
    "null",
    "[]",
    "5",
    '"x"',
    "{",
    "{}",
    "NaN",
    "[" * 100_000,
    '{"a":' * 5000,
    "\x00",
    "\udcff",
    '{"prompt": "a", "prompt": "b"}',
)


def request_cases(rng: random.Random) -> Iterator[Case]:
    kind, names = "requests", ("requests.jsonl", "line 1", "line 2")
    yield from (Case(kind, *change, names) for change in _line_changes(REQUESTS))
    yield from (Case(kind, *change, names) for change in flip_changes(REQUESTS, rng, 6, "either"))
    for text in WRONG_LINES:
        yield Case(kind, f"line is {text[:20]!r}", "refuse", line_text(REQUESTS, 1, text), names)
    wrong = {
        "prompt": ("null", "5", "[]", "{}", "true", "NaN", f'"{"long " * 3000}"', '"<image>"'),
        "image": (
            "5",
            "{}",
            "true",
            "[5]",
            "[null]",
            '"gone.png"',
            '"/dev/zero"',
            '"requests.jsonl"',
            '"wide.png\\u0000"',
            '["wide.png", "gone.png"]',
            '"\\ud800.png"',
            f'"{"x" * 5000}"',
        ),
        "images": ('["wide.png", "gone.png"]', '"gone.png"', "5"),
        "imgae": ('"wide.png"',),
        "promt": ('"x"',),
        "videos": ('["x.mp4"]',),
        "temperature": ("-1", '"hot"', "[]", "true", "1e999", "NaN"),
        "max_new_tokens": ("0", "-1", "1.5", '"many"', "true", "1e30", "99999999999"),
        "top_p": ("0", "2", '"all"'),
        "top_k": ("-1", "1.5", '"all"'),
        "seed": ("-1", "4294967296", "1.5"),
        "stop": ("5", '[""]', "[5]", '""'),
        "delta": ('"1/3"', "0", '"x"', "[]", "{}", "true"),
        "max_tiles": ("0", "1e9", '"all"'),
        "max_total_tiles": ("-1", '"all"'),
        "system": ("5", "[]"),
        "thinking": ("5", '"yes"'),
        "max_tokens": ("5",),
    }
    for key, texts in wrong.items():
        for text in texts:
            expected = "either" if "<image>" in text else "refuse"  # a tag that is text
            yield Case(
                kind,
                f"{key} = {text[:30]}",
                expected,
                _field(REQUESTS, 1, key, text),
                (*names, key),
            )
    for text in ("[]", "{}", "null", "1.5", "true", '"\\u001b[2J"', '"a"'):
        yield Case(kind, f"id = {text}", "either", _field(REQUESTS, 1, "id", text), (*names, "id"))
    for number, change in enumerate(byte_changes("ask/wide.png", rng, "refuse", 0)):
        if number < 3 or "pipe" in change[0] or "missing" in change[0]:
            # The last byte of a PNG belongs to a checksum after all pixels.
            name, expected, edit = change
            yield Case(
                kind, name, "either" if "last byte" in name else expected, edit, ("wide.png",)
            )


def answer_cases(rng: random.Random) -> Iterator[Case]:
    """Yields damage to the file of a stopped run, which the next run resumes."""
    kind, names = "answers", ("answers.jsonl",)
    for name, expected, spoil in _line_changes(ANSWERS):
        # An empty or missing file is correctly treated as new.
        yield Case(
            kind,
            name,
            "same" if "missing" in name or "link to nothing" in name else expected,
            spoil,
            names,
        )
    yield from (Case(kind, *change, names) for change in flip_changes(ANSWERS, rng, 6, "either"))
    for text in WRONG_LINES:
        yield Case(kind, f"line is {text[:20]!r}", "refuse", line_text(ANSWERS, 0, text), names)
    for key, text in {"id": '"z"', "prompt": '"other"', "text": "5", "token_ids": '"x"'}.items():
        yield Case(
            kind,
            f"{key} = {text}",
            "refuse" if key in ("id", "prompt") else "either",
            _field(ANSWERS, 0, key, text),
            names,
        )
    for title, change in {
        "cut in a character": lambda data: data + '{"id": "生'.encode()[:-1],
        "cut in a line": lambda data: data[:-20],
        "cut at a line's end": lambda data: data[:-1],
    }.items():
        yield Case(kind, title, "same", edit_bytes(ANSWERS, change), names)
    for title, change in {
        "more than asked": lambda data: data + data.splitlines(True)[0] * 3,
        "turned round": lambda data: b"".join(data.splitlines(True)[::-1]),
        "a line twice": lambda data: data.splitlines(True)[0] * 2,
        "somebody's notes": lambda data: b"my notes\nof today",
        "somebody's list": lambda data: b'{"scores": [1, 2, 3]}',
    }.items():
        yield Case(kind, title, "refuse", edit_bytes(ANSWERS, change), names)
    for flag in (
        "--system=Be brief.",
        "--max_tiles=1",
        "--temperature=1.5",
        "--max_new_tokens=4",
        "--stop=x",
        "--seed=5",
        "--delta=1/4",
    ):
        # Answered again or refused; answers of two settings in one file are wrong.
        expected = "either" if "seed" in flag else "refuse"
        yield Case(kind, f"resumed with {flag}", expected, nothing, names, (flag,))
    yield Case(
        kind,
        "output is the requests",
        "refuse",
        nothing,
        ("requests.jsonl", "output"),
        (f"--output={REQUESTS}",),
    )
    yield Case(
        kind, "output is an image", "refuse", nothing, ("wide.png",), ("--output=ask/wide.png",)
    )


def question_cases(rng: random.Random) -> Iterator[Case]:
    """Yields damage to the questions of make_pairs."""
    kind, names = "questions", ("questions.jsonl", "line 1")
    yield from (Case(kind, *change, names) for change in _line_changes(QUESTIONS))
    for text in WRONG_LINES:
        yield Case(kind, f"line is {text[:20]!r}", "refuse", line_text(QUESTIONS, 0, text), names)
    wrong = {
        "question": ("null", "5", "[]", "{}", '"<image>"'),
        "answer": ("[]", "{}", "true"),
        "image": ("5", "{}", "[5]", '"gone.png"', '"/dev/zero"', '"small.png\\u0000"'),
        "id": ("2", "NaN"),
        "anwser": ('"x"',),
        "images": ('["small.png"]',),
    }
    for key, texts in wrong.items():
        for text in texts:
            expected = "either" if "<image>" in text else "refuse"
            yield Case(
                kind, f"{key} = {text}", expected, _field(QUESTIONS, 0, key, text), (*names, key)
            )


def reference_cases(rng: random.Random) -> Iterator[Case]:
    kind, names = "reference", ("reference.jsonl",)
    for name, expected, spoil in _line_changes(REFERENCE):
        yield Case(kind, name, "either" if "Latin" in name else expected, spoil, names)
    for text in WRONG_LINES:
        yield Case(
            kind, f"first line is {text[:20]!r}", "refuse", line_text(REFERENCE, 0, text), names
        )
        yield Case(
            kind, f"second line is {text[:20]!r}", "refuse", line_text(REFERENCE, 1, text), names
        )
    for key, texts in {
        "key": ('"x"', "5", "null", '"' + "f" * 40 + '"', '"-1"'),
        "chosen": ('"x"', "null", "NaN", "1e999", "[]"),
        "rejected": ("[1]", "true"),
    }.items():
        for text in texts:
            yield Case(kind, f"{key} = {text}", "refuse", _field(REFERENCE, 1, key, text), names)
    for key in ("hash", "reference"):
        for text in ('"x"', "5", "null", "[]"):
            expected = "either" if (key, text) == ("reference", '"x"') else "refuse"
            yield Case(kind, f"{key} = {text}", expected, _field(REFERENCE, 0, key, text), names)
    yield Case(
        kind,
        "a pair twice",
        "either",
        edit_bytes(REFERENCE, lambda data: data + data.splitlines(True)[1]),
        names,
    )
    yield Case(
        kind,
        "a pair missing",
        "refuse",
        edit_bytes(REFERENCE, lambda data: b"".join(data.splitlines(True)[:2])),
        names,
    )


KINDS = [
    Kind("requests", ("ask", "conv"), programs.infer, request_cases, programs.answered),
    Kind(
        "answers",
        ("ask", "conv"),
        programs.resume,
        answer_cases,
        programs.answered,
        (ANSWERS, REQUESTS, "ask/wide.png"),
    ),
    Kind("questions", ("questions", "conv"), programs.make_pairs, question_cases),
    Kind(
        "reference",
        ("pairs", "conv", "tiny.py", "pairs.py"),
        programs.train_on_pairs,
        reference_cases,
        untouched=("run/config.json",),
        seconds=180,
    ),
]
