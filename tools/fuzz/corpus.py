"""Makes valid inputs of every kind from a tiny random model, in a process of its own because it
computes.
"""

import json
import pathlib
import shutil
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
CACHE = "cache"  # of compiled programs, shared by all inputs
TRAIN = """\
import dataclasses

from internvl3_jax.config import CheckpointConfig
from tests.support.tiny_checkpoint import train_config


def get_config():
    config = train_config()
    optimizer = dataclasses.replace(config.optimizer, name="adamw", warmup_steps=1)
    return dataclasses.replace(config, optimizer=optimizer, steps=4, checkpoint=CheckpointConfig(every=2))
"""
PAIRS = """\
import dataclasses

from tiny import get_config as tiny


def get_config():
    config = tiny()
    data = dataclasses.replace(config.data, source="pairs/meta.json", pairs=True, ref_logps_file="pairs/reference.jsonl")
    loss = dataclasses.replace(config.loss, kind="mpo")
    return dataclasses.replace(config, data=data, loss=loss, init_from="conv", steps=2)
"""


def build(corpus: pathlib.Path) -> None:
    """Fills an empty folder with valid inputs."""
    _models(corpus)
    _adapter(corpus)
    _data(corpus / "data")
    _requests(corpus / "ask")
    _questions(corpus / "questions")
    _images(corpus / "images")
    (corpus / "tiny.py").write_text(TRAIN)
    (corpus / "pairs.py").write_text(PAIRS)
    _pairs(corpus / "pairs")
    (corpus / CACHE).mkdir()


def _models(corpus: pathlib.Path) -> None:
    from convert.__main__ import main as convert
    from internvl3_jax.data.text.tokenizer import Tokenizer
    from tests.support import tiny_checkpoint

    for name, flags in {"released": (), "sharded": ("--shard_size", "60000")}.items():
        _checked(
            convert(
                [str(tiny_checkpoint.directory()), str(corpus / name), "--to", "internvl", *flags]
            )
        )
        (corpus / name / "internvl3_jax.json").unlink()
    _checked(convert([str(corpus / "released"), str(corpus / "conv")]))
    # The same model with the tokenizer in one file, as in newer releases.
    shutil.copytree(corpus / "released", corpus / "single")
    tokenizer = Tokenizer.from_directory(corpus / "released")
    (corpus / "single/tokenizer.json").write_text(tokenizer._backend._tokenizer.to_str())
    for name in ("vocab.json", "merges.txt", "added_tokens.json"):
        (corpus / "single" / name).unlink()


def _checked(status: int) -> None:
    if status:
        raise RuntimeError("a good input could not be made")


def _adapter(corpus: pathlib.Path) -> None:
    import numpy as np

    from convert.open import open_model
    from internvl3_jax.checkpoints.hf.peft_writer import write_peft
    from internvl3_jax.config import LoraConfig

    model, rng = open_model(corpus / "conv").config, np.random.default_rng(0)
    size = model.language
    shapes = {
        "a": (size.num_layers, size.hidden_size, 4),
        "b": (size.num_layers, 4, size.num_heads * size.head_dim),
    }
    factors = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    own = {"lora": {"language": {"layers": {"q": factors}}}}
    (corpus / "peft").mkdir()
    write_peft(corpus / "peft", own, LoraConfig(rank=4, alpha=8.0), model, "internvl", "conv")


def _data(folder: pathlib.Path) -> None:
    from tests.support.official_data import (
        encoded,
        make_image,
        turns,
        write_meta,
        write_tar,
        write_video,
    )

    folder.mkdir()
    for number in range(3):
        make_image(20 + 8 * number, 20, number).save(folder / f"{number}.png")
    text = [{"id": n, "conversations": turns(f"Say {n}.", f"It is {n}.")} for n in range(6)]
    seen = [
        {"id": n, "image": f"{n % 3}.png", "conversations": turns("What is it?", f"Noise {n}.")}
        for n in range(6)
    ]
    packed = {}
    for number in range(3):
        row = {"image": f"{number}.png", "conversations": turns("What?", "Noise.")}
        packed |= {
            f"{number}.json": json.dumps(row).encode(),
            f"{number}.png": encoded(make_image(20, 20, number)),
        }
    write_tar(folder / "packed.tar", packed)
    entries = {
        "text": {"rows": text, "repeat_time": 2, "weight": 1.0},
        "seen": {"rows": seen, "data_augment": True, "weight": 2.0},
    }
    entries["packed"] = {
        "annotation": "packed.tar",
        "max_dynamic_patch": 2,
        "length": 3,
        "weight": 1.0,
    }
    try:
        write_video(folder / "clip.mp4", 12)
    except ImportError:
        print("no video: the package av is not installed", file=sys.stderr)
    else:
        rows = [
            {"video": "clip.mp4", "conversations": turns("<video>\nWhat happens?", "It brightens.")}
        ]
        entries["video"] = {"rows": rows, "weight": 1.0}
    write_meta(folder, **entries)
    meta = json.loads((folder / "meta.json").read_text())
    for entry in meta.values():
        entry["root"] = "../data"  # relative, so that copies are whole
    (folder / "meta.json").write_text(json.dumps(meta, indent=1))
    (folder / "drop.tsv").write_text("# source\trow\treason\nseen\t1\tbecause\n")


def _requests(folder: pathlib.Path) -> None:
    from tests.support import tiny_checkpoint

    folder.mkdir()
    tiny_checkpoint.make_image(40, 16, 1).save(folder / "wide.png")
    tiny_checkpoint.make_image(16, 16, 2).save(folder / "small.png")
    rows = [
        {"prompt": "Read.", "image": "wide.png", "id": "a"},
        {"prompt": "How many?"},
        {"prompt": "hi", "image": ["small.png"]},
    ]
    (folder / "requests.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _questions(folder: pathlib.Path) -> None:
    """Writes questions without answers: a random model's could not match any."""
    from tests.support import tiny_checkpoint

    folder.mkdir()
    tiny_checkpoint.make_image(16, 16, 2).save(folder / "small.png")
    rows = [
        {"question": text, "image": "small.png", "id": number}
        for number, text in enumerate(("Read.", "Say hi."), 1)
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _images(folder: pathlib.Path) -> None:
    """Writes an image of each format that Pillow can write here."""
    from tests.support.official_data import make_image

    folder.mkdir()
    image = make_image(48, 32, 5)
    for suffix in ("png", "jpg", "webp", "gif", "bmp", "tif", "ppm", "tga", "ico", "jp2"):
        try:
            image.save(folder / f"good.{suffix}")
        except (OSError, KeyError, ValueError):
            print(f"no image of kind {suffix}: Pillow was built without it", file=sys.stderr)
    image.convert("P").save(folder / "palette.png")
    image.convert("CMYK").save(folder / "cmyk.jpg")
    image.convert("1").save(folder / "bit.png")
    image.convert("RGBA").save(folder / "alpha.png")
    image.save(folder / "progressive.jpg", progressive=True)


def _pairs(folder: pathlib.Path) -> None:
    folder.mkdir()
    from tests.support.official_data import write_meta

    rows = [
        {"id": n, "question": f"Say {n}.", "chosen": f"It is {n}.", "rejected": "No."}
        for n in range(6)
    ]
    write_meta(folder, pairs={"rows": rows})
    meta = json.loads((folder / "meta.json").read_text())
    meta["pairs"]["root"] = "../pairs"
    (folder / "meta.json").write_text(json.dumps(meta))
