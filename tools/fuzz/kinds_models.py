"""Damaged weights of released models, as `python -m convert` reads them."""

import functools
import json
import pathlib
import random
from collections.abc import Iterator

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
from tools.fuzz.safetensors_damage import (
    BIAS,
    UP,
    WEIGHTS,
    damaged_entries,
    damaged_headers,
    edit_header,
    poison,
)

INDEX = "sharded/model.safetensors.index.json"


def cases_of(kind: str, changes, *names: str) -> Iterator[Case]:
    """Yields a case for each change; messages name the file, or the last part of the changed key."""
    for name, expected, spoil in changes:
        key = name.split(" ")[0].split("/")[-1].split(".")[-1]
        yield Case(
            kind,
            name,
            expected,
            spoil,
            (*names, *((key,) if len(key) > 2 and not key.isdigit() else ())),
        )


def safetensors_cases(rng: random.Random) -> Iterator[Case]:
    kind, file = "safetensors", "model.safetensors"
    for tensor in (UP, BIAS):
        for name, spoil in damaged_entries(tensor):
            yield Case(kind, f"{tensor} {name}", "refuse", spoil, (file, tensor))
    for name, spoil in damaged_headers():
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


# The folder of valid inputs, from which some cases are derived; set before the first use.
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
