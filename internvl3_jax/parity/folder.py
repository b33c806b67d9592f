"""The folder of a pack: what is where, and hashes of all of it. Needs numpy alone.

manifest.json              version, models, and a sha256 of every file
images/*.png               the test images
MODEL/internvl, MODEL/hf   a tiny checkpoint in both released layouts
MODEL/CASE.json            a request, and its texts
MODEL/CASE.npz             its arrays, by stage (compare.py)
MODEL/CASE.FAULT.npz       arrays of the stages at which a known fault shows (causes.py)
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Mapping

import numpy as np

FORMAT = 1
MANIFEST = "manifest.json"
TEXTS = ("rendered", "answer")  # stages that are texts, in the JSON file


class PackError(ValueError):
    """A pack that cannot be used. The message names the file and the remedy."""


@dataclasses.dataclass
class Request:
    """A request of a user.

    Attributes:
      question: the text, without any tag.
      images: paths below the pack, shown before the question.
      frames: paths of a video's frames, one tile each, shown before the question.
      delta: V2PE step of visual tokens, such as "1/4"; None: the checkpoint's.
      max_new_tokens: limit of the greedy answer.
    """

    question: str
    images: list[str] = dataclasses.field(default_factory=list)
    frames: list[str] = dataclasses.field(default_factory=list)
    delta: str | None = None
    max_new_tokens: int = 8


@dataclasses.dataclass
class Case:
    """A request with its goldens.

    Attributes:
      stages: stage -> array, or text.
      top: the most likely first tokens, [id, text, log-probability].
      faults: fault -> stages that it changes.
    """

    name: str
    request: Request
    stages: dict[str, np.ndarray | str]
    top: list[list]
    faults: dict[str, dict[str, np.ndarray | str]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class PackedModel:
    """A model of a pack.

    Attributes:
      checkpoints: layout -> folder below the pack; empty if only goldens were written.
      source: what the goldens were made of, as it was given.
      dtype: of the computation of the goldens.
      stop_ids: ids that end an answer.
      image_token_id: of <IMG_CONTEXT>.
      normalization: "mean" and "std" of pixels in [0, 1].
    """

    name: str
    checkpoints: dict[str, str]
    source: str
    dtype: str
    stop_ids: list[int]
    image_token_id: int
    normalization: dict[str, list[float]]
    cases: list[str] = dataclasses.field(default_factory=list)


def write_case(folder: pathlib.Path, case: Case) -> None:
    """Writes the files of a case."""
    stages = [("", case.stages), *((f".{name}", values) for name, values in case.faults.items())]
    for suffix, values in stages:
        arrays = {key: value for key, value in values.items() if not isinstance(value, str)}
        np.savez(folder / f"{case.name}{suffix}.npz", **arrays)
    texts = {
        suffix.removeprefix("."): {
            key: value for key, value in values.items() if isinstance(value, str)
        }
        for suffix, values in stages
    }
    content = {
        "request": dataclasses.asdict(case.request),
        "texts": texts.pop(""),
        "top": case.top,
        "faults": texts,
    }
    write_json(folder / f"{case.name}.json", content)


def read_case(folder: pathlib.Path, name: str) -> Case:
    content = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    return Case(
        name,
        Request(**content["request"]),
        _arrays(folder / f"{name}.npz") | content["texts"],
        content["top"],
        {
            fault: _arrays(folder / f"{name}.{fault}.npz") | texts
            for fault, texts in content["faults"].items()
        },
    )


def _arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def write_json(path: pathlib.Path, content: Mapping) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_manifest(root: pathlib.Path, version: str, models: list[PackedModel]) -> None:
    """Writes manifest.json, the last file of a pack."""
    paths = sorted(path for path in root.rglob("*") if path.is_file())
    content = {
        "format": FORMAT,
        "version": version,
        "models": [dataclasses.asdict(model) for model in models],
        "files": {path.relative_to(root).as_posix(): sha256(path) for path in paths},
    }
    write_json(root / MANIFEST, content)


def read_manifest(root: pathlib.Path) -> list[PackedModel]:
    """Returns the models of a pack whose files all have their hashes.

    Raises:
      PackError: there is no manifest, it is of another format, or a file is missing or changed.
    """
    path = root / MANIFEST
    if not path.is_file():
        raise PackError(f"{path} is missing; write a pack with: internvl3-parity pack --output DIR")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise PackError(f"{path} is not JSON ({error}); write the pack again") from error
    if content.get("format") != FORMAT:
        raise PackError(
            f"{path}: format is {content.get('format')!r}, and this version reads {FORMAT}; "
            "write the pack again with it"
        )
    for name, digest in content["files"].items():
        file = root / name
        if not file.is_file():
            raise PackError(f"{file} is missing; write the pack again")
        if sha256(file) != digest:
            raise PackError(f"{file} is not what the pack was written with; write the pack again")
    return [PackedModel(**model) for model in content["models"]]


def sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
