"""Damages a safetensors file: its header, the entries of tensors, their values."""

import functools
import json
import pathlib
import struct
from collections.abc import Callable, Iterator

WEIGHTS = "released/model.safetensors"
UP, OTHER, BIAS = (
    f"language_model.model.layers.{name}.weight"
    for name in ("1.mlp.up_proj", "0.mlp.up_proj", "0.input_layernorm")
)


def split(data: bytes) -> tuple[dict, bytes]:
    """Splits a file into (header, body)."""
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def join(header, body: bytes, size: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if size is None else size) + raw + body


def edit_header(
    change: Callable[[dict], object], file: str = WEIGHTS
) -> Callable[[pathlib.Path], None]:
    def spoil(folder: pathlib.Path) -> None:
        header, body = split((folder / file).read_bytes())
        new = change(header)
        (folder / file).write_bytes(join(header if new is None else new, body))

    return spoil


def set_entry(tensor: str, **fields):
    return edit_header(lambda header: header[tensor].update(fields))


def damaged_entries(tensor: str) -> Iterator[tuple[str, Callable]]:
    """Yields (name, damage) of a tensor's entry in the header."""
    for name, value in {
        "null": None,
        "text": "F32",
        "list": [],
        "number": 4,
        "no dtype": {"shape": [1], "data_offsets": [0, 4]},
        "no shape": {"dtype": "F32", "data_offsets": [0, 4]},
        "no offsets": {"dtype": "F32", "shape": [1]},
    }.items():
        yield (
            f"entry {name}",
            edit_header(lambda header, value=value: header.update({tensor: value})),
        )
    for value in (
        None,
        5,
        [],
        ["F32"],
        {},
        "",
        "F31",
        "f32",
        "I32",
        "F64",
        "BF16",
        "F8_E4M3",
        "float32",
    ):
        yield f"dtype {json.dumps(value)}", set_entry(tensor, dtype=value)
    for value in (
        None,
        "48x32",
        5,
        {},
        [48.0, 32.0],
        ["48", "32"],
        [-48, -32],
        [48],
        [32, 49],
        [1536],
        [48, 32, 1],
        [2**63, 1],
        [True, 1],
    ):
        yield f"shape {json.dumps(value)}", set_entry(tensor, shape=value)
    offsets = (
        None,
        "0",
        5,
        {},
        [],
        [0],
        [0, 4, 8],
        [0.0, 6144.0],
        ["0", "6144"],
        [-16, 6128],
        [6144, 0],
        [0, 2**63],
        [2**62, 2**62 + 6144],
        [True, 5],
    )
    for value in offsets:
        yield f"data_offsets {json.dumps(value)}", set_entry(tensor, data_offsets=value)
    yield "missing", edit_header(lambda header: header.pop(tensor) and None)
    yield (
        "misspelled",
        edit_header(
            lambda header: header.update({tensor.replace("weight", "wieght"): header.pop(tensor)})
        ),
    )


def damaged_headers() -> Iterator[tuple[str, Callable]]:
    file = functools.partial(_edit_weights)
    for name, size in {
        "0": 0,
        "1": 1,
        "-1": 2**64 - 1,
        "2^62": 2**62,
        "beyond the file": 10**7,
        "one short": -1,
        "one long": -2,
    }.items():
        yield (
            f"header length {name}",
            file(lambda header, body, size=size: _resized(header, body, size)),
        )
    yield (
        "overlap",
        edit_header(lambda header: header[UP].update(data_offsets=header[OTHER]["data_offsets"])),
    )
    yield "header a list", edit_header(lambda header: [header])
    yield "header null", edit_header(lambda header: b"null")
    yield "header empty object", edit_header(lambda header: b"{}")
    yield "header deep", edit_header(lambda header: b'{"a":' * 50_000 + b"1" + b"}" * 50_000)
    yield (
        "a name twice",
        edit_header(
            lambda header: (
                json.dumps(header).encode()[:-1]
                + f', "{UP}": {json.dumps(header[OTHER])}}}'.encode()
            )
        ),
    )
    yield "bytes behind the last", file(lambda header, body: join(header, body + bytes(4096)))
    yield "bytes before the first", file(_shifted)
    yield "a gap", file(_gap)
    yield "one more tensor", file(_one_more)
    yield "metadata a list", edit_header(lambda header: header.update(__metadata__=[1]))
    yield (
        "name with control characters",
        edit_header(lambda header: header.update({"\x1b[2J\x1b]52;c;eA==\x07": header.pop(UP)})),
    )
    yield (
        "endless name",
        edit_header(lambda header: header.update({"x" * 2_000_000: header.pop(UP)})),
    )


def _edit_weights(change: Callable[[dict, bytes], bytes]):
    def spoil(folder: pathlib.Path) -> None:
        (folder / WEIGHTS).write_bytes(change(*split((folder / WEIGHTS).read_bytes())))

    return spoil


def _resized(header: dict, body: bytes, size: int) -> bytes:
    length = len(json.dumps(header))
    return join(header, body, {-1: length - 1, -2: length + 1}.get(size, size))


def _moved(header: dict, by: int, start: int = 0) -> dict:
    moved = {}
    for name, entry in header.items():
        if name != "__metadata__" and entry["data_offsets"][0] >= start:
            entry = entry | {"data_offsets": [offset + by for offset in entry["data_offsets"]]}
        moved[name] = entry
    return moved


def _shifted(header: dict, body: bytes) -> bytes:
    return join(_moved(header, 4), bytes(4) + body)


def _gap(header: dict, body: bytes) -> bytes:
    start = header[UP]["data_offsets"][0]
    return join(_moved(header, 8, start), body[:start] + bytes(8) + body[start:])


def _one_more(header: dict, body: bytes) -> bytes:
    more = {"dtype": "F32", "shape": [1], "data_offsets": [len(body), len(body) + 4]}
    return join(
        header | {"language_model.model.layers.2.mlp.up_proj.weight": more}, body + bytes(4)
    )


def poison(value: float, tensor: str, where: str, file: str = WEIGHTS):
    """Returns damage that writes a NaN or infinity into a tensor."""

    def spoil(folder: pathlib.Path) -> None:
        header, body = split((folder / file).read_bytes())
        start, stop = header[tensor]["data_offsets"]
        count = {"first": 1, "all": (stop - start) // 4}.get(where, 1)
        begin = stop - 4 if where == "last" else start
        raw = struct.pack("<f", value) * count
        (folder / file).write_bytes(join(header, body[:begin] + raw + body[begin + len(raw) :]))

    return spoil
