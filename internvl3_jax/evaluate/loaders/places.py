"""Finds the files of a benchmark."""

import pathlib
from collections.abc import Sequence

from internvl3_jax.io.safe_files import FileError
from internvl3_jax.io.terminal import one_line


def find_files(data: pathlib.Path, names: Sequence[str]) -> list[pathlib.Path]:
    """Returns the files of these names below a directory; a name may have a * in it.

    A table may also be in a folder of its own name, with its videos, or be VLMEvalKit's form with
    the images in files, NAME_local.tsv.

    Raises:
      FileError: one is missing.
    """
    found = []
    for name in names:
        paths = _existing(data, name)
        if not paths:
            raise FileError(
                f"{one_line(str(data / name))}: no such file; --data is the folder that holds it "
                "(docs/evaluation.md lists the files of each task; nothing is downloaded)"
            )
        found += paths
    return found


def has_files(data: pathlib.Path, names: Sequence[str]) -> bool:
    """Returns whether all files of a task are there."""
    return all(_existing(data, name) for name in names)


def _existing(data: pathlib.Path, name: str) -> list[pathlib.Path]:
    if "*" in name:
        return sorted(path for path in data.glob(name) if path.is_file())
    places = [data / name]
    if name.endswith(".tsv"):
        stem = pathlib.Path(name).stem
        places += [data / stem / name, (data / name).with_name(f"{stem}_local.tsv")]
    return [path for path in places if path.is_file()][:1]


def image_path(data: pathlib.Path, written: str, where: str, folder: str = "") -> str:
    """Returns the path of an image as a file names it.

    Args:
      data: the folder that InternVL's programs call data/.
      written: relative to `folder` of it, or with data/ in front.

    Raises:
      FileError: there is no such image.
    """
    path = data / written.removeprefix("./").removeprefix("data/")
    if not written.removeprefix("./").startswith("data/"):
        path = data / folder / written
    if not path.is_file():
        raise FileError(f"{where}: image: there is no {one_line(str(path))}")
    return str(path)
