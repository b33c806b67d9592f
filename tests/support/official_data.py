"""Writes small training data in InternVL's format: rows, images, videos, meta files."""

import functools
import io
import json
import pathlib
import tarfile
from collections.abc import Sequence

import numpy as np
from PIL import Image

from examples.tiny_digits.recipe import tokenizer as tiny_tokenizer
from internvl3_jax.config import DataConfig, ProcessorConfig
from internvl3_jax.data.batch import Sample, cut_images, finish_sample
from internvl3_jax.data.media.video import middle_frames
from internvl3_jax.data.sources.meta import read_meta
from internvl3_jax.data.sources.row_source import RowSource
from internvl3_jax.data.text.chat_template import encode_chat
from internvl3_jax.data.text.tokenizer import Tokenizer

PROCESSOR = ProcessorConfig(
    image_size=16, tokens_per_tile=4, max_tiles=4, tiles="shared", system_message=None
)


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_files(tiny_tokenizer.build())


def turns(*texts: str, system: str | None = None) -> list[dict]:
    """Returns the turns of a conversation, human and gpt alternating."""
    said = [
        {"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(texts)
    ]
    return said if system is None else [{"from": "system", "value": system}, *said]


def write_rows(path: pathlib.Path, rows: list) -> pathlib.Path:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    )
    return path


def write_meta(folder: pathlib.Path, **entries: dict) -> str:
    """Writes meta.json; an entry's "rows" are written to NAME.jsonl, and its root is the folder
    unless given.
    """
    meta = {}
    for name, entry in entries.items():
        rows = entry.pop("rows", None)
        if rows is not None:
            entry["annotation"] = write_rows(folder / f"{name}.jsonl", rows).name
        meta[name] = {"root": str(folder), **entry}
    path = folder / "meta.json"
    path.write_text(json.dumps(meta))
    return str(path)


def data_config(source: str, **changes) -> DataConfig:
    return DataConfig(
        **{
            "source": source,
            "tokens_per_row": 256,
            "tiles_per_row": 16,
            "min_frames": 2,
            "max_frames": 4,
        }
        | changes
    )


def make_image(width: int = 20, height: int = 20, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def frame(number: int, width: int = 64, height: int = 48) -> Image.Image:
    """Returns a frame whose gray value encodes its number."""
    return Image.new("RGB", (width, height), (4 * number % 256,) * 3)


def write_video(
    path: pathlib.Path, frames: int, rate: int = 10, keys_every: int = 12
) -> pathlib.Path:
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream(
            "libx264", rate=rate, options={"crf": "1", "g": str(keys_every), "bf": "2"}
        )
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(frames):
            container.mux(stream.encode(av.VideoFrame.from_image(frame(number))))
        container.mux(stream.encode())
    return path


def write_tar(path: pathlib.Path, files: dict[str, bytes]) -> pathlib.Path:
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def make_sample(
    messages,
    images,
    tokenizer,
    processor: ProcessorConfig,
    deltas: Sequence[int],
    where: str = "",
    *,
    max_tiles: int | None = None,
    loss_reduction: str = "square",
) -> Sample:
    """Makes a training sample of messages and PIL images.

    Args:
      deltas: V2PE units, one per image.
      max_tiles: None takes processor.max_tiles.
      loss_reduction: See `average_weights`.
    """
    tiles = cut_images(images, processor, max_tiles)
    encoded = encode_chat(
        messages,
        [len(image_tiles) for image_tiles in tiles],
        tokenizer,
        processor,
        add_generation_prompt=False,
        where=where,
    )
    return finish_sample(encoded, tiles, deltas, processor, loss_reduction)


def read(source, row=0):
    return source.conversation(
        row, lambda clip: lambda footage: middle_frames(footage, 2, clip), PROCESSOR
    )


def one_source(folder, rows, **entry):
    return RowSource(read_meta(write_meta(folder, a={"rows": rows} | entry))[0])


def numbers(images):
    """Which frames these are, by their gray value."""
    return [round(np.asarray(image).mean() / 4) for image in images]
