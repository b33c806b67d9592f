"""Damages files: JSON values and texts, bytes, and the file itself."""

import json
import os
import pathlib
import random
import shutil
from collections.abc import Callable, Iterator

Spoil = Callable[[pathlib.Path], None]
Change = tuple[str, str, Spoil]  # name, expectation, what is done

DEEP = 100_000
_MARK = "@@ value @@"


# --- JSON values ---------------------------------------------------------------------------------


def value_at(document, path: tuple):
    for key in path:
        document = document[key]
    return document


def paths_of(document, prefix: tuple = ()) -> Iterator[tuple]:
    """Yields the path of every value below an object; of each list only the first element's."""
    entries = document.items() if isinstance(document, dict) else list(enumerate(document))[:1]
    for key, value in entries:
        yield (*prefix, key)
        if isinstance(value, dict | list):
            yield from paths_of(value, (*prefix, key))


def shown(path: tuple) -> str:
    return ".".join(map(str, path))


def set_json(file: str, path: tuple, text: str) -> Spoil:
    """Returns damage that sets a value to JSON text, valid or not; the path () is the document."""

    def spoil(folder: pathlib.Path) -> None:
        target = folder / file
        document = json.loads(target.read_text(encoding="utf-8"))
        target.write_text(put(document, path, text), encoding="utf-8")

    return spoil


def put(document, path: tuple, text: str) -> str:
    if not path:
        return text
    document = json.loads(json.dumps(document))
    value_at(document, path[:-1])[path[-1]] = _MARK
    return json.dumps(document, ensure_ascii=False).replace(json.dumps(_MARK), text)


def edit_json(file: str, change: Callable) -> Spoil:
    """Returns damage that calls `change` with the document and writes it again."""

    def spoil(folder: pathlib.Path) -> None:
        target = folder / file
        document = json.loads(target.read_text(encoding="utf-8"))
        change(document)
        target.write_text(json.dumps(document), encoding="utf-8")

    return spoil


_NOT_A_NUMBER = {
    "text": '"x"',
    "list": "[]",
    "object": "{}",
    "NaN": "NaN",
    "infinity": "Infinity",
    "1e999": "1e999",
}


def wrong_values(value) -> dict[str, str]:
    """Returns invalid JSON values for the place of `value`, by what is wrong with them."""
    own = json.dumps(value)
    if isinstance(value, bool):
        return {"text": '"no"', "list": "[]", "object": "{}", "number": "2", "NaN": "NaN"}
    if isinstance(value, int | float):
        wrong = _NOT_A_NUMBER | {
            "own text": f'"{own}"',
            "own list": f"[{own}]",
            "true": "true",
            "negative": f"-{own}",
        }
        if isinstance(value, int):
            wrong |= {"half": f"{value}.5", "huge": "1" + "0" * 30, "long": "1" * 5000}
        return wrong
    if isinstance(value, str):
        return {
            "number": "5",
            "list": "[]",
            "own list": f"[{own}]",
            "object": "{}",
            "true": "true",
            "NaN": "NaN",
        }
    if isinstance(value, list):
        return {
            "text": '"x"',
            "number": "5",
            "object": "{}",
            "true": "true",
            "of null": "[null]",
            "of objects": "[{}]",
        }
    if isinstance(value, dict):
        return {"text": '"x"', "number": "5", "list": "[]", "true": "true", "NaN": "NaN"}
    return {"object of a key": '{"x": 1}', "list of null": "[null]", "NaN": "NaN"}


def value_changes(
    file: str, document: dict, strict: dict[str, set[str]], loose: set[str] = frozenset()
) -> Iterator[Change]:
    """Changes of every value of a document.

    Args:
      strict: dotted path of a value that decides something -> names of `wrong_values` that may be
          accepted there.
      loose: names of wrong values that are tried of all others, where "either" is expected.
    """
    for path in paths_of(document):
        name = shown(path)
        if name in strict:
            for what, text in wrong_values(value_at(document, path)).items():
                expected = "either" if what in strict[name] else "refuse"
                yield f"{name} = {what}", expected, set_json(file, path, text)
            yield f"{name} = null", "either", set_json(file, path, "null")
            yield f"{name} missing", "either", edit_json(file, _remove(path))
            if isinstance(path[-1], str):
                # Removing a setting that is off, and off by default, changes nothing.
                off = value_at(document, path) in (False, None, [], {}, "none")
                yield (
                    f"{name} misspelled",
                    "either" if off else "refuse",
                    edit_json(file, _rename(path)),
                )
        else:
            for what, text in wrong_values(value_at(document, path)).items():
                if what in loose:
                    # Invalid JSON is refused wherever it is.
                    expected = (
                        "refuse" if what in ("NaN", "1e999", "infinity", "long") else "either"
                    )
                    yield f"{name} = {what}", expected, set_json(file, path, text)


def _remove(path: tuple):
    def change(document):
        del value_at(document, path[:-1])[path[-1]]

    return change


def _rename(path: tuple):
    def change(document):
        parent = value_at(document, path[:-1])
        parent[path[-1][:-1] + "_" + path[-1][-1]] = parent.pop(path[-1])

    return change


# --- texts ---------------------------------------------------------------------------------------


def edit_bytes(file: str, change: Callable[[bytes], bytes]) -> Spoil:
    def spoil(folder: pathlib.Path) -> None:
        target = folder / file
        target.write_bytes(change(target.read_bytes()))

    return spoil


def json_changes(
    file: str, rng: random.Random, flips: int = 6, optional: bool = False
) -> Iterator[Change]:
    """Yields damage to a complete JSON file; an optional one may be missing."""
    for name, content in {
        "empty": b"",
        "blank": b"  \n",
        "null": b"null",
        "list": b"[]",
        "number": b"3",
        "text": b'"x"',
        "binary": bytes(range(256)),
        "zeros": bytes(1000),
        "deep lists": b"[" * DEEP + b"]" * DEEP,
        "deep objects": b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    }.items():
        yield f"{file} {name}", "refuse", edit_bytes(file, lambda data, content=content: content)
    for share in (0.1, 0.5, 0.9):
        yield (
            f"{file} cut at {share}",
            "refuse",
            edit_bytes(file, lambda data, share=share: data[: int(len(data.rstrip()) * share)]),
        )
    yield f"{file} last byte missing", "refuse", edit_bytes(file, lambda data: data.rstrip()[:-1])
    yield f"{file} UTF-16", "refuse", edit_bytes(file, lambda data: data.decode().encode("utf-16"))
    yield (
        f"{file} not UTF-8",
        "refuse",
        edit_bytes(file, lambda data: data[:-2] + b', "x": "\xff"' + data[-2:]),
    )
    yield f"{file} byte order mark", "same", edit_bytes(file, lambda data: b"\xef\xbb\xbf" + data)
    yield f"{file} CRLF", "same", edit_bytes(file, lambda data: data.replace(b"\n", b"\r\n"))
    yield f"{file} more behind it", "refuse", edit_bytes(file, lambda data: data.rstrip() + b"}")
    yield f"{file} twice", "refuse", edit_bytes(file, lambda data: data + data)
    yield (
        f"{file} of single quotes",
        "refuse",
        edit_bytes(file, lambda data: data.replace(b'"', b"'")),
    )
    yield f"{file} first key twice", "refuse", edit_bytes(file, _first_key_twice)
    yield from flip_changes(file, rng, flips, "either")
    for name, expected, spoil in place_changes(file):
        yield name, "either" if optional and not name.endswith("64 GB") else expected, spoil


def _first_key_twice(data: bytes) -> bytes:
    document = json.loads(data)
    key, value = next(iter(document.items()))
    return data.rstrip()[:-1].rstrip() + f", {json.dumps(key)}: {json.dumps(value)}}}".encode()


# --- bytes ---------------------------------------------------------------------------------------


def flip_changes(file: str, rng: random.Random, count: int, expected: str) -> Iterator[Change]:
    """Yields single bit flips, at random positions of the file."""
    for _ in range(count):
        place, bit = rng.random(), rng.randrange(8)
        yield f"{file} bit {bit} at {place:.6f}", expected, edit_bytes(file, _flip(place, bit))


def _flip(place: float, bit: int):
    def change(data: bytes) -> bytes:
        changed = bytearray(data)
        changed[int(place * len(data))] ^= 1 << bit
        return bytes(changed)

    return change


def byte_changes(
    file: str, rng: random.Random, expected: str, flips: int = 4, flipped: str | None = None
) -> Iterator[Change]:
    """Yields damage to a binary file."""
    yield f"{file} empty", expected, edit_bytes(file, lambda data: b"")
    for share in (0.02, 0.3, 0.7, 0.99):
        yield (
            f"{file} cut at {share}",
            expected,
            edit_bytes(file, lambda data, share=share: data[: int(len(data) * share)]),
        )
    yield f"{file} last byte missing", expected, edit_bytes(file, lambda data: data[:-1])
    yield f"{file} longer by one", expected, edit_bytes(file, lambda data: data + b"x")
    yield f"{file} longer by 64 kB", expected, edit_bytes(file, lambda data: data + bytes(1 << 16))
    yield f"{file} of zeros", expected, edit_bytes(file, lambda data: bytes(len(data)))
    yield (
        f"{file} second half of zeros",
        flipped or expected,
        edit_bytes(file, lambda data: data[: len(data) // 2] + bytes(len(data) - len(data) // 2)),
    )
    yield (
        f"{file} of noise",
        expected,
        edit_bytes(file, lambda data: random.Random(len(data)).randbytes(len(data))),
    )
    yield (
        f"{file} of text",
        expected,
        edit_bytes(
            file, lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
        ),
    )
    yield from flip_changes(file, rng, flips, flipped or expected)
    yield from place_changes(file, expected)


# --- what stands in a file's place ---------------------------------------------------------------


def replaced(file: str, make: Callable[[pathlib.Path], object]) -> Spoil:
    def spoil(folder: pathlib.Path) -> None:
        target = folder / file
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        else:
            target.unlink(missing_ok=True)
        make(target)

    return spoil


def place_changes(file: str, expected: str = "refuse") -> Iterator[Change]:
    """Yields replacements of a file: another kind of entry, or none."""
    yield f"{file} missing", expected, replaced(file, lambda path: None)
    yield f"{file} a pipe", expected, replaced(file, os.mkfifo)
    yield f"{file} a directory", expected, replaced(file, pathlib.Path.mkdir)
    yield (
        f"{file} a link to nothing",
        expected,
        replaced(file, lambda path: path.symlink_to("nowhere")),
    )
    yield (
        f"{file} a link to itself",
        expected,
        replaced(file, lambda path: path.symlink_to(path.name)),
    )
    yield f"{file} a device", expected, replaced(file, lambda path: path.symlink_to("/dev/zero"))
    yield f"{file} of 64 GB", expected, replaced(file, _sparse)


def _sparse(path: pathlib.Path) -> None:
    with path.open("wb") as file:
        file.truncate(64 << 30)
