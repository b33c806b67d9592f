"""Damaged checkpoints and training runs of our own."""

import json
import pathlib
import random
from collections.abc import Iterator

from tools.fuzz import programs
from tools.fuzz.case import Case, Kind
from tools.fuzz.kinds_models import cases_of, corpus
from tools.fuzz.mutate import byte_changes, json_changes, put, replaced, set_json, value_changes

MANIFEST = "conv/internvl3_jax.json"


def checkpoint_cases(rng: random.Random) -> Iterator[Case]:
    """Yields damage to a checkpoint in our format, which `load` opens."""
    kind = "checkpoint"
    document = json.loads((corpus() / MANIFEST).read_text())
    fields = {
        f"model.{part}.{name}"
        for part in ("vision", "language")
        for name in document["model"][part]
    }
    fields |= {f"processor.{name}" for name in document["processor"]} | {
        "model",
        "processor",
        "fingerprint",
        "format",
    }
    fields |= {"model.image_token_id", "model.downsample", "model.ps_version"}
    strict = {name: _allowed(name) for name in fields}
    changes = [
        change for change in value_changes(MANIFEST, document, strict) if ".0 " not in change[0]
    ]
    rng.shuffle(changes)
    yield from cases_of(kind, changes[:150], "internvl3_jax.json")
    yield from cases_of(kind, json_changes(MANIFEST, rng, 6), "internvl3_jax.json", "no checkpoint")
    for path in (
        ("hashes",),
        ("fingerprint", "image_ids"),
        ("fingerprint", "tokenizer_probe"),
        ("base",),
    ):
        for text in ('"x"', "[]", "5", "{}", "[null]", "NaN"):
            expected = "refuse" if text == "NaN" or path[0] == "fingerprint" else "either"
            yield Case(
                kind,
                f"{path[-1]} = {text}",
                expected,
                _set(path, text),
                (path[-1], "internvl3_jax.json"),
            )
    for name in ("tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json"):
        yield from (
            Case(kind, *change, (name, "fingerprint"))
            for change in byte_changes(f"conv/{name}", rng, "same", 1)
        )
    arrays = sorted(
        path.relative_to(corpus()).as_posix()
        for path in (corpus() / "conv/params").rglob("*")
        if path.is_file()
    )
    for number, name in enumerate(arrays):
        # Orbax names files at random, so inputs are named by their position instead.
        for change, expected, spoil in rng.sample(list(byte_changes(name, rng, "same", 3)), 7):
            what = f"array file {number} of {len(arrays)}{change.removeprefix(name)}"
            yield Case(kind, what, expected, spoil, (pathlib.Path(name).name, "conv", "params"))
    yield Case(
        kind,
        "params missing",
        "refuse",
        replaced("conv/params", lambda path: None),
        ("conv", "params"),
    )
    yield Case(
        kind,
        "params a file",
        "refuse",
        replaced("conv/params", lambda path: path.write_bytes(b"x")),
        ("conv", "params"),
    )
    yield Case(
        kind,
        "state missing",
        "refuse",
        replaced("conv/params/state", lambda path: None),
        ("conv", "params"),
    )


def _allowed(name: str) -> set[str]:
    """Returns the kinds of wrong value that are valid for this field."""
    return {"negative"} if name.endswith(("drop_path", "rope_factor")) else set()


def _set(path: tuple, text: str):
    def spoil(folder: pathlib.Path) -> None:
        target = folder / MANIFEST
        document = json.loads(target.read_text())
        parent = document
        for key in path[:-1]:
            parent = parent[key]
        parent.setdefault(path[-1], None)
        target.write_text(put(document, path, text))

    return spoil


# --- runs ----------------------------------------------------------------------------------------


def run_cases(rng: random.Random) -> Iterator[Case]:
    """Yields damage to a finished run, which the same command finds complete or resumes from an
    older step.
    """
    kind, newest = "run", "run/checkpoints/4"
    yield from cases_of(kind, json_changes("run/config.json", rng, 2, optional=True), "config.json")
    for name in (
        "steps",
        "model",
        "optimizer.learning_rate",
        "data.rows",
        "init_from",
        "model.vision.hidden_size",
    ):
        for text in ('"x"', "[]", "{}", "NaN", "-1"):
            yield Case(
                kind,
                f"config {name} = {text}",
                "refuse",
                set_json("run/config.json", tuple(name.split(".")), text),
                (name.split(".")[-1], "config.json"),
            )
    files = sorted(
        path.relative_to(corpus() / newest).as_posix()
        for path in (corpus() / newest).rglob("*")
        if path.is_file()
    )
    for number, name in enumerate(files):
        changes = list(byte_changes(f"{newest}/{name}", rng, "same", 2))
        shown = name if "/" not in name else f"array file {number} of {len(files)}"
        for change, expected, spoil in rng.sample(changes, 3):
            what = f"newest step, {shown}{change.removeprefix(f'{newest}/{name}')}"
            yield Case(kind, what, expected, spoil, (pathlib.Path(name).name, "checkpoints"))
    for text in ("{}", "null", "[]", '{"step": "x"}', '{"step": 4}', '{"step": -1, "past": 5}'):
        yield Case(
            kind,
            f"training.json = {text}",
            "same",
            set_json(f"{newest}/training.json", (), text),
            ("training.json", "checkpoints"),
        )
    for text in (
        "{}",
        "null",
        "[]",
        '{"x": 5}',
        '{"../../../etc/passwd": 5}',
        '{"training.json": "5"}',
        "NaN",
    ):
        yield Case(
            kind,
            f"files.json = {text}",
            "same",
            set_json(f"{newest}/files.json", (), text),
            ("files.json", "checkpoints"),
        )
    yield Case(kind, "every step damaged", "refuse", _every_step, ("checkpoints",))
    yield Case(
        kind,
        "checkpoints a file",
        "refuse",
        replaced("run/checkpoints", lambda path: path.write_bytes(b"x")),
        ("checkpoints",),
    )
    yield Case(
        kind, "run a file", "refuse", replaced("run", lambda path: path.write_bytes(b"x")), ("run",)
    )
    for name in ("8", "08", "-1", "5.partial", "x", "٣"):
        yield Case(kind, f"a foreign directory {name}", "same", _foreign(name), ("checkpoints",))
    for number, change in enumerate(byte_changes("run/log.jsonl", rng, "tell", 2)):
        if number % 2 == 0:
            yield Case(kind, *change, ("log.jsonl",))
    yield Case(kind, "log of other rows", "tell", edit_log, ("log.jsonl",))


def _every_step(folder: pathlib.Path) -> None:
    for step in (folder / "run/checkpoints").iterdir():
        (step / "training.json").write_text("{")


def _foreign(name: str):
    def spoil(folder: pathlib.Path) -> None:
        (folder / "run/checkpoints" / name).mkdir()
        (folder / "run/checkpoints" / name / "mine.txt").write_text("not yours")

    return spoil


def edit_log(folder: pathlib.Path) -> None:
    with (folder / "run/log.jsonl").open("a") as file:
        file.write('{"step": "x"}\n[]\n{"step": 9, "loss": 1.0')


KINDS = [
    Kind("checkpoint", ("conv",), programs.load, checkpoint_cases, programs.loaded, ("conv",)),
    Kind("run", ("run", "tiny.py"), programs.train, run_cases, programs.trained, seconds=180),
]
