"""Builds the folder in which the documented commands run: every file that they name exists there
under that name, in miniature.
"""

import json
import pathlib
import shutil
from collections.abc import Callable

from tests.support.documents import ROOT

MODEL = ROOT / "examples" / "tiny_digits"
# Without the package: linked, `internvl3_jax` would be on the path twice.
LINKED = ("train.py", "infer.py", "configs", "examples")
READ = [("01_read.png", "39969"), ("02_read.png", "456"), ("04_read.png", "6")]
READ_QUESTION = "Read the number."


def model(path: pathlib.Path) -> None:
    """Writes the digits model in the released format: safetensors, config.json, tokenizer."""
    path.mkdir(parents=True)
    for file in MODEL.iterdir():
        if file.is_file() and file.suffix != ".jsonl":
            shutil.copy(file, path)


def qwen3_model(path: pathlib.Path) -> None:
    """Writes a random model of InternVL3.5's kind."""
    from tests.support.qwen3_checkpoint import write

    write(path)


def flash_model(path: pathlib.Path) -> None:
    """Writes a random model of InternVL3.5-Flash's kind."""
    from tests.support.qwen3_checkpoint import write

    write(path, flash=True)


def transformers_model(path: pathlib.Path) -> None:
    """Writes the digits model in the layout of transformers."""
    from convert.open import open_model
    from convert.run import convert

    convert(open_model(MODEL), path, to="hf")


def parity_engine(path: pathlib.Path) -> None:
    """Writes the program of `check --engine command`."""
    shutil.copy(ROOT / "tests" / "support" / "parity_engine.py", path)


def run(path: pathlib.Path) -> None:
    """Writes a training run that has only the weights of its newest step."""
    from convert.open import open_model
    from convert.run import convert

    convert(open_model(MODEL), path / "checkpoints" / "2")


def language_model(path: pathlib.Path) -> None:
    from tests.support.components import write_llm

    path.parent.mkdir(parents=True, exist_ok=True)
    write_llm(path)


def vision_model(path: pathlib.Path) -> None:
    from tests.support.components import write_tower

    path.parent.mkdir(parents=True, exist_ok=True)
    write_tower(path, "bare")


def image_file(number: int = 0) -> Callable[[pathlib.Path], None]:
    def make(path: pathlib.Path) -> None:
        from PIL import Image

        path.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(MODEL / "pictures" / READ[number][0]) as image:
            image.convert("RGB").save(path)

    return make


def video(path: pathlib.Path) -> None:
    from tests.support.official_data import write_video

    write_video(path, 100)


def pdf(path: pathlib.Path) -> None:
    """Writes a PDF of six A4 pages with a number each."""
    from PIL import Image

    from tests.support.pdfs import image_pdf, write

    with Image.open(MODEL / "pictures" / READ[0][0]) as image:
        page = Image.new("RGB", (595, 842), "white")
        page.paste(image, (100, 100))
    write(path, image_pdf([page] * 6))


def lines(*rows: dict) -> Callable[[pathlib.Path], None]:
    def make(path: pathlib.Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        for number, (name, _) in enumerate(READ):
            if not (path.parent / name).exists():
                image_file(number)(path.parent / name)

    return make


def meta(annotation: str) -> Callable[[pathlib.Path], None]:
    """Writes a meta JSON of rows whose images are in the folder of their annotation file."""

    def make(path: pathlib.Path) -> None:
        folder = path.parent.resolve()
        source = {
            "root": str(folder),
            "annotation": str(folder / annotation),
            "data_augment": False,
            "repeat_time": 1,
        }
        path.write_text(json.dumps({"digits": source}))
        if annotation == "rows.jsonl":
            lines(*ROWS)(folder / annotation)

    return make


ROWS = [
    {
        "id": number,
        "image": name,
        "conversations": [
            {"from": "human", "value": f"<image>\n{READ_QUESTION}"},
            {"from": "gpt", "value": answer},
        ],
    }
    for number, (name, answer) in enumerate(READ)
]
REQUESTS = [
    {"id": number, "image": name, "prompt": READ_QUESTION} for number, (name, _) in enumerate(READ)
]
# The digits model gives no "Answer: ..." line. Without known answers, pairs are made by Dropout
# NTP.
QUESTIONS = [
    {"id": number, "image": name, "question": READ_QUESTION}
    for number, (name, _) in enumerate(READ)
]
ANSWERED = [row | {"answer": answer} for row, (_, answer) in zip(QUESTIONS, READ, strict=True)]


def card_data(path: pathlib.Path) -> None:
    """Writes made-up files of some benchmarks of the model card."""
    from internvl3_jax.evaluate.task_table import find_tasks
    from tests.support import evaluate_world

    evaluate_world.build(path, find_tasks(["mmstar", "pope", "mathvista", "mlvu"]))


# What makes the file of each name in the pages. Files that a page's own commands make are in MADE.
FILES: dict[str, Callable[[pathlib.Path], None]] = {
    "DIR": model,
    "CHECKPOINT": model,
    "HF_DIR": transformers_model,
    "my_engine.py": parity_engine,
    "SRC": model,
    "CRITIC_DIR": model,
    "QWEN_DIR": language_model,
    "VIT_DIR": vision_model,
    "Qwen/Qwen2.5-1.5B": language_model,
    "OpenGVLab/InternViT-300M-448px-V2_5": vision_model,
    "OpenGVLab/InternVL3-1B": model,
    "OpenGVLab/InternVL3-2B": model,
    "OpenGVLab/InternVL3-8B": model,
    "OpenGVLab/InternVL3_5-8B": qwen3_model,
    "OpenGVLab/InternVL3_5-8B-Flash": flash_model,
    "OpenGVLab/VisualPRM-8B-v1_1": model,
    "checkpoints/internvl3-2b": model,
    "checkpoints/internvl3-8b": model,
    "checkpoints/internvl3-78b": model,
    "checkpoints/visualprm-8b": model,
    "checkpoints/new-2b": model,
    "runs/sft-2b": run,
    "card_data": card_data,
    "cat.jpg": image_file(),
    "a.png": image_file(0),
    "b.png": image_file(1),
    "cubes.png": image_file(),
    "chart.png": image_file(),
    "receipt.jpg": image_file(),
    "invoice.png": image_file(),
    "clip.mp4": video,
    "paper.pdf": pdf,
    "prompt.txt": lambda path: path.write_text(f"<image>\n{READ_QUESTION}\n"),
    "rows.jsonl": lines(*ROWS),
    "meta.json": meta("rows.jsonl"),
    "sft.json": meta("rows.jsonl"),
    "pairs.json": meta("pairs.jsonl"),
    "labels.json": meta("labels.jsonl"),
    "requests.jsonl": lines(*REQUESTS),
    "questions.jsonl": lines(*QUESTIONS),
}
# Files that differ on one page: process labels need known answers.
OF_PAGE = {("docs/best_of_n.md", "questions.jsonl"): lines(*ANSWERED)}
MADE = {
    "docs/training.md": {"checkpoints/internvl3-2b", "checkpoints/new-2b", "runs/sft-2b"},
    "docs/families.md": {"checkpoints/internvl3_5-8b", "checkpoints/internvl3_5-8b-flash"},
    "docs/best_of_n.md": {"checkpoints/visualprm-8b"},
}


def build(folder: pathlib.Path, page: str, text: str) -> pathlib.Path:
    """Makes a folder with links to the clone, and the files of FILES that the page's commands name
    but do not make.
    """
    folder.mkdir(parents=True)
    for name in LINKED:
        (folder / name).symlink_to(ROOT / name)
    for name, make in FILES.items():
        if name in text and name not in MADE.get(page, ()):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            OF_PAGE.get((page, name), make)(folder / name)
    return folder


def batch() -> dict:
    """Returns docs/architecture.md's `batch`: a row of eight tokens without images."""
    import numpy as np

    tokens = np.arange(8, dtype=np.int32)[None]
    no_tiles = np.zeros((1, 0, 32, 32, 3), np.uint8)
    return {
        "tokens": tokens,
        "positions": tokens * 256,
        "segments": np.ones_like(tokens),
        "tiles": no_tiles,
    }
