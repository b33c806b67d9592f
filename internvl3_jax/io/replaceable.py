"""What --overwrite may replace: directories that this program made and that hold nothing else."""

import os
import pathlib
import re
from collections.abc import Iterable

from internvl3_jax.io import integrity, strict_json
from internvl3_jax.io.integrity import MANIFEST, TRAINING
from internvl3_jax.io.remote_files import is_remote
from internvl3_jax.io.safe_files import OWN, FileError, reason
from internvl3_jax.io.terminal import one_line

# What checkpoints and exports consisted of before there was a list of their files.
_KNOWN = re.compile(
    r"params/.*|.*\.safetensors(\.index\.json)?|[\w.-]*config\.json|tokenizer\.(json|model)|vocab\.json|merges\.txt|[\w-]*tokens[\w-]*\.json"
    rf"|chat_template\.\w+|[\w-]+\.py|LICENSE[\w.-]*|adapter_model\.bin|{re.escape(MANIFEST)}"
)


def check_replaceable(
    final: pathlib.Path, sources: Iterable[str | os.PathLike] = (), program: str = "--overwrite"
) -> None:
    """FileExistsError unless a directory was made here and holds nothing else, and is, holds and
    lies in none of `sources`.
    """

    def refuse(why: str):
        return FileExistsError(
            f"{one_line(str(final))}: {why}; {program} does not replace it. Choose another place, "
            "or move it away"
        )

    if is_remote(final):
        foreign = integrity.unlisted(final)
        if foreign is None:
            raise refuse("was not made by this program")
        if foreign:
            raise refuse(f"holds {one_line(foreign[0])}, not written by this program")
        if any(str(final) == str(source) for source in sources):
            raise refuse("is what is read")
        return
    if final.is_symlink():
        raise refuse("is a symbolic link")
    if not final.is_dir():
        raise refuse("is no directory")
    here = final.resolve()
    for source in sources:
        there = pathlib.Path(source).resolve()
        if here == there or here in there.parents or there in here.parents:
            raise refuse(f"is, holds or lies in {one_line(str(source))}, which is read")
    if (final / TRAINING).exists():
        raise refuse("is a step of a training run")
    try:
        foreign = foreign_files(final)
    except OSError as error:
        raise refuse(f"cannot be read ({reason(error)})") from error
    except FileError as error:
        raise refuse(str(error)) from error
    if foreign is None:
        raise refuse("was not made by this program")
    if foreign:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise refuse(f"holds {one_line(foreign[0])}{more}, not written by this program")


def foreign_files(directory: pathlib.Path) -> list[str] | None:
    """Files of a directory that were not written by this program; None if it is no directory of
    ours.
    """
    names = [name for name, _ in integrity.files_of(directory)]
    if not names and not any(directory.iterdir()):
        return []
    unlisted = integrity.unlisted(directory)
    if unlisted is not None:
        return unlisted
    try:
        strict_json.read_object(directory / MANIFEST).get("format", int)
    except FileError:
        return None
    return [
        name for name in names if not _KNOWN.fullmatch(name) and name not in (OWN, integrity.FILES)
    ]
