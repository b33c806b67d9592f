"""Damaged weights of released models: what `python -m convert` reads."""

import functools
import json
import pathlib
import random
import struct
from collections.abc import Callable, Iterator

from tools.fuzz import programs
from tools.fuzz.case import Case, Kind
from tools.fuzz.mutate import (
    byte_changes,
    edit_json,
    json_changes,
    place_changes,
    replaced,
    set_json,
)

WEIGHTS = "released/model.safetensors"
INDEX = "sharded/model.safetensors.index.json"
UP, OTHER, BIAS = (
    f"language_model.model.layers.{name}.weight"
    for name in ("1.mlp.up_proj", "0.mlp.up_proj", "0.input_layernorm")
)


def cases_of(kind: str, changes, *names: str) -> Iterator[Case]:
    """Cases of changes; a message names the file, or the last part of the changed key."""
    for name, expected, spoil in changes:
        key = name.split(" ")[0].split("/")[-1].split(".")[-1]
        yield Case(
            kind,
            name,
            expected,
            spoil,
            (*names, *((key,) if len(key) > 2 and not key.isdigit() else ())),
        )


# --- safetensors ---------------------------------------------------------------------------------


def split(data: bytes) -> tuple[dict, bytes]:
    """(header, body)"""
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


def _entries(tensor: str) -> Iterator[tuple[str, Callable]]:
    """What is done to a tensor's entry in the header."""
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
        "misspelt",
        edit_header(
            lambda header: header.update({tensor.replace("weight", "wieght"): header.pop(tensor)})
        ),
    )


def _whole_headers() -> Iterator[tuple[str, Callable]]:
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
    """Puts a number that is not finite into a tensor."""

    def spoil(folder: pathlib.Path) -> None:
        header, body = split((folder / file).read_bytes())
        start, stop = header[tensor]["data_offsets"]
        count = {"first": 1, "all": (stop - start) // 4}.get(where, 1)
        begin = stop - 4 if where == "last" else start
        raw = struct.pack("<f", value) * count
        (folder / file).write_bytes(join(header, body[:begin] + raw + body[begin + len(raw) :]))

    return spoil


def safetensors_cases(rng: random.Random) -> Iterator[Case]:
    kind, file = "safetensors", "model.safetensors"
    for tensor in (UP, BIAS):
        for name, spoil in _entries(tensor):
            yield Case(kind, f"{tensor} {name}", "refuse", spoil, (file, tensor))
    for name, spoil in _whole_headers():
        yield Case(kind, name, "refuse", spoil, (file, UP, "layers.2", "xxx"))
    yield Case(
        kind,
        "metadata null",
        "either",
        edit_header(lambda header: header.update(__metadata__=None)),
        (file,),
    )
    for value in (float("nan"), float("inf"), float("-inf")):
        for tensor in (UP, BIAS, "vision_model.embeddings.class_embedding", "mlp1.0.bias"):
            for where in ("first", "last", "all"):
                yield Case(
                    kind,
                    f"{value} in {tensor} {where}",
                    "refuse",
                    poison(value, tensor, where),
                    (tensor,),
                )
    yield from (
        Case(kind, *change, (file, ".safetensors", UP))
        for change in byte_changes(WEIGHTS, rng, "refuse", 12, "either")
    )


def index_cases(rng: random.Random) -> Iterator[Case]:
    kind, names = "index", ("model.safetensors.index.json", "weight_map", UP)
    yield from (Case(kind, *change, names) for change in json_changes(INDEX, rng))
    for text in ("null", "[]", '"x"', "5", "{}", "NaN", "true"):
        yield Case(
            kind, f"weight_map = {text}", "refuse", set_json(INDEX, ("weight_map",), text), names
        )
    outside = (
        "../released/model.safetensors",
        "/etc/passwd",
        "a/../../released/model.safetensors",
        "..",
        ".",
        "/",
        "",
    )
    for value in (
        None,
        5,
        [],
        {},
        True,
        1.5,
        "nowhere.safetensors",
        "config.json",
        "x\0y",
        "x" * 5000,
        "\x1b[2J",
        "\ud800",
        *outside,
    ):
        spoil = edit_json(INDEX, lambda index, value=value: index["weight_map"].update({UP: value}))
        yield Case(kind, f"file of a tensor = {json.dumps(value)[:40]}", "refuse", spoil, names)
    yield Case(
        kind,
        "a tensor missing",
        "refuse",
        edit_json(INDEX, lambda index: index["weight_map"].pop(UP) and None),
        names,
    )
    yield Case(
        kind,
        "a tensor more",
        "refuse",
        edit_json(
            INDEX,
            lambda index: index["weight_map"].update(
                {"x.weight": "model-00001-of-00005.safetensors"}
            ),
        ),
        ("x.weight",),
    )
    yield Case(
        kind,
        "no metadata",
        "same",
        edit_json(INDEX, lambda index: index.pop("metadata") and None),
        names,
    )
    for text in ("null", '"x"', "-1", "1e999", "[]"):
        expected = "refuse" if text == "1e999" else "either"
        yield Case(
            kind,
            f"metadata = {text}",
            expected,
            set_json(INDEX, ("metadata",), text),
            ("metadata", *names),
        )
    for number in (1, 5):
        shard = f"sharded/model-0000{number}-of-00005.safetensors"
        yield from (
            Case(kind, *change, (pathlib.Path(shard).name,)) for change in place_changes(shard)
        )
        other = "sharded/model-00003-of-00005.safetensors"
        swap = replaced(
            shard,
            lambda path, other=other: path.write_bytes((path.parents[1] / other).read_bytes()),
        )
        yield Case(
            kind,
            f"{shard} is another one",
            "refuse",
            swap,
            (pathlib.Path(shard).name, "model-00003"),
        )


# The folder of good inputs, which some cases are derived from; set before the first use.
_corpus: list[pathlib.Path] = []


def use_corpus(folder: pathlib.Path) -> None:
    _corpus[:] = [folder]


def corpus() -> pathlib.Path:
    return _corpus[0]


CONVERT = {"program": programs.convert, "result": programs.converted, "untouched": ("out",)}
KINDS = [
    Kind("safetensors", ("released",), cases=safetensors_cases, **CONVERT),
    Kind(
        "index",
        ("sharded", "released"),
        cases=index_cases,
        **CONVERT | {"program": functools.partial(programs.convert, source="sharded")},
    ),
]
