"""Reads the JSONL file of infer.py --requests.

    {"prompt": TEXT, "image": PATH or [PATHS], "id": ANY, "expected": ANY, "extra": ANY, ...}
    {"prompt": TEXT, "video": PATH, {"path": PATH, "clip": [3, 9.5], ...}, or a list of these}
    {"prompt": TEXT, "document": PATH, {"path": PATH, "pages": "2-5", ...}, or a list of these}

Only the prompt is required. Relative paths start at the directory of the file. The keys in `OPTIONS`
are for this request alone. Those in `KEPT` are not interpreted; the answer repeats them, and
"extra" has room for anything else.
"""

import hashlib
import os
import pathlib
from collections.abc import Sequence

from internvl3_jax.data.media.given import Document, Video
from internvl3_jax.data.text.media_tags import TAGS
from internvl3_jax.inference.prompts import tag_remark
from internvl3_jax.io import jsonl, remote_files, safe_files, strict_json
from internvl3_jax.io.remote_files import as_path, is_remote
from internvl3_jax.io.safe_files import FileError
from internvl3_jax.io.strict_json import JsonError
from internvl3_jax.io.terminal import excerpt, one_line

# Options of one request, in place of the command's: fields of `Options`.
OPTIONS = ("max_new_tokens", "temperature", "top_p", "top_k", "seed", "stop", "delta", "max_tiles")
OPTIONS += ("max_total_tiles", "system", "thinking", "flash")
KEPT = ("expected", "answer", "label", "task", "category", "source", "extra")
# Keys of other programs, and what they are called here.
ALIASES = {
    "images": "image",
    "picture": "image",
    "image_path": "image",
    "img": "image",
    "question": "prompt",
    "query": "prompt",
    "text": "prompt",
    "instruction": "prompt",
    "question_id": "id",
    "messages": "one prompt",
    "conversations": "one prompt",
    "history": "one prompt",
    "system": "--system",
    "temperature": "--temperature",
    "max_tokens": "--max_new_tokens",
    "max_completion_tokens": "--max_new_tokens",
    "max_new_tokens": "--max_new_tokens",
    "stop": "--stop",
    "videos": "video",
    "documents": "document",
    "pdf": "document",
    "clip": 'a key of the video, as {"path": ..., "clip": [start, end]},',
    "pages": 'a key of the document, as {"path": ..., "pages": "2-5"},',
}
# Further keys of a video and a document.
MEDIA = {
    "video": (Video, ("clip", "num_frames", "fps", "tiles", "label")),
    "document": (Document, ("pages", "dpi")),
}
MAX_IMAGE_BYTES = 4 << 30


def read_requests(
    path: str | os.PathLike,
    video_settings: dict | None = None,
    document_settings: dict | None = None,
) -> list[dict]:
    """Reads the requests of a file. Whether their images can be opened is not checked.

    Args:
      video_settings, document_settings: of videos and documents that do not say otherwise.

    Returns:
      A dict per request with
        prompt: the text;
        image: list of paths, relative ones completed with the directory of the file;
        video, document: lists of `Video` and `Document`;
        options: those of the request alone, not checked;
        id: by default the line number;
        where: "FILE line N", for messages;
        asked: what the answer repeats of the line: id, prompt, image and the keys in `KEPT`.

    Raises:
      FileError: a line is not a request; the message names file and line.
    """
    path = as_path(path) if is_remote(path) else pathlib.Path(os.path.expanduser(path))
    settings = {"video": video_settings or {}, "document": document_settings or {}}
    requests = []
    for row in jsonl.read_objects(path):
        refuse_unknown(row, ("prompt", "image", "video", "document", "id", *OPTIONS, *KEPT))
        prompt = row.get("prompt", str)
        images = row.get("image", (str, list), [])
        images = [images] if isinstance(images, str) else images
        if not all(isinstance(image, str) and image for image in images):
            raise JsonError(
                f"{row.where}: image is {excerpt(row.values['image'])}; expected a path or a list "
                "of paths"
            )
        refuse_data(row, images)
        request_id = row.values.get("id", int(row.where.rpartition(" ")[2]))
        names = ("image", *MEDIA, *OPTIONS, *KEPT)
        kept = {name: row.values[name] for name in names if row.values.get(name) is not None}
        requests.append(
            {
                "prompt": prompt,
                "image": [_complete(image, path.parent) for image in images],
                **{kind: _read_media(row, kind, path.parent, settings[kind]) for kind in settings},
                "options": {name: kept[name] for name in OPTIONS if name in kept},
                "id": request_id,
                "where": row.where,
                "asked": {"id": request_id, "prompt": prompt} | kept,
            }
        )
    if not requests:
        raise JsonError(f"{one_line(str(path))}: has no requests")
    return requests


def _complete(name: str, folder: pathlib.Path) -> str:
    return name if is_remote(name) else str(folder / os.path.expanduser(name))


def _read_media(
    row: strict_json.Object, kind: str, folder: pathlib.Path, settings: dict
) -> list[Video] | list[Document]:
    """Reads the videos or documents of a request."""
    given = row.get(kind, (str, dict, list), [])
    made, keys = MEDIA[kind]
    items = []
    for item in given if isinstance(given, list) else [given]:
        item = {"path": item} if isinstance(item, str) else item
        if not isinstance(item, dict) or not isinstance(item.get("path"), str) or not item["path"]:
            raise JsonError(
                f"{row.where}: {kind} is {excerpt(given)}; expected a path, an object with path, "
                "or a list of these"
            )
        for name in item:
            if name not in ("path", *keys):
                near = strict_json.suggestion(name, keys) or f"; there are {', '.join(keys)}"
                raise JsonError(f"{row.where}: unknown key {excerpt(name)} of {kind}{near}")
        refuse_data(row, [item["path"]], kind)
        values = settings | {name: value for name, value in item.items() if name != "path"}
        try:
            items.append(made(_complete(item["path"], folder), **values))
        except ValueError as error:
            raise JsonError(f"{row.where}: {kind}: {error}") from error
    return items


def refuse_unknown(row: strict_json.Object, known: Sequence[str]) -> None:
    """Raises JsonError for a key that is not in `known`, so that no image or question under
    another name is silently ignored.
    """
    for name in row.values:
        if name not in known:
            meant = ALIASES.get(name, "prompt" if name == "prompt" else None)
            if meant is not None and meant.removeprefix("--") in known:
                meant = meant.removeprefix("--")
            # What is a prompt in a request is a question in a file of questions.
            if meant == "prompt" and meant not in known:
                meant = "question"
            near = f"; did you mean {meant!r}?" if meant else strict_json.suggestion(name, known)
            raise JsonError(
                f"{row.where}: unknown key {excerpt(name)}"
                f"{near or '; put what the answer should repeat into extra'}"
            )


def refuse_data(row: strict_json.Object, images: Sequence[str], kind: str = "image") -> None:
    """Raises JsonError for an image that is written into the line in place of its path."""
    if written := [image for image in images if image.startswith("data:")]:
        raise JsonError(
            f"{row.where}: {kind} is {excerpt(written[0])}, which holds the data itself; save it "
            "as a file and give its path"
        )


def check_requests(requests: Sequence[dict], on_error: str) -> None:
    """Checks that the image files of requests exist, and that their tags fit.

    Raises:
      ValueError: with on_error "stop", naming the first line with a missing file or fewer tags than
        images; with "note" only if every request with images has a missing file, since then the
        paths are wrong.
    """
    missing = []
    for request in requests:
        for kind, tag in TAGS.items():
            tags, count = request["prompt"].count(tag), len(request[kind])
            if on_error == "stop" and 0 < tags < count:
                raise ValueError(
                    f"{name_of(request)}: {count} {kind}s, but {tags} {tag} tags; write one "
                    "for each, or none"
                )
        if absent := [path for path in paths_of(request) if not _exists(path)]:
            missing.append(f"{name_of(request)}: {one_line(absent[0])} does not exist")
    with_images = sum(bool(paths_of(request)) for request in requests)
    if missing and (on_error == "stop" or len(missing) == with_images):
        more = f", and so for {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"{missing[0]}{more}; relative paths start at the folder of the requests")


def name_of(request: dict) -> str:
    """Returns what messages call a request: "FILE line N (id X)"."""
    return f"{request['where']} (id {excerpt(request['id'])})"


def tag_remarks(requests: Sequence[dict]) -> str:
    """Returns a remark about tags that the model gets as text (`prompts.tag_remark`), naming the
    first request; "" if there are none.
    """
    remarks = [
        f"{name_of(request)}: {remark}"
        for request in requests
        if (remark := tag_remark(request["prompt"], *(len(request[kind]) for kind in TAGS)))
    ]
    more = f", and so for {len(remarks) - 1} more" if len(remarks) > 1 else ""
    return f"{remarks[0]}{more}" if remarks else ""


def paths_of(request: dict) -> list[str]:
    """Returns the paths of all images, videos and documents of a request."""
    media = [item.source for kind in MEDIA for item in request[kind]]
    return [*request["image"], *media]


def image_hashes(images: Sequence[str]) -> list[str | None]:
    """Returns 16 hexadecimal digits of the SHA-256 of each file; None if it cannot be read."""
    return [_image_hash(image) for image in images]


def _image_hash(image: str) -> str | None:
    try:
        data = safe_files.read_bytes(image, max_bytes=MAX_IMAGE_BYTES)
    except (FileError, OSError):
        return None
    return hashlib.sha256(data).hexdigest()[:16]


def _exists(image: str) -> bool:
    return remote_files.exists(image) if is_remote(image) else os.path.exists(image)
