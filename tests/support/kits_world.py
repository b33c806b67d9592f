"""Small data sets in the forms of VLMEvalKit and lmms-eval, of the digits model's images; and runs
of the kits in processes of their own.
"""

import base64
import hashlib
import io
import json
import os
import pathlib
import subprocess
import sys

from PIL import Image

from tests.support import compilation_cache
from tests.support.evaluate_rows import write_lines, write_table
from tests.support.official_data import write_video

ROOT = pathlib.Path(__file__).resolve().parents[2]
MODEL = ROOT / "examples" / "tiny_digits"
OPTIONS = {"A": "39969", "B": "456", "C": "18602", "D": "6"}
DIGITS = "TinyDigits_openended"  # VLMEvalKit takes "openended" as a set of texts
CARD_TABLES = ("MMStar", "BLINK", "MMMU_DEV_VAL", "ScreenSpot_Mobile")
_TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder}/{name}.jsonl
test_split: test
output_type: generate_until
doc_to_messages: !function functions.messages
doc_to_text: prompt
doc_to_target: expected
generation_kwargs:
  max_new_tokens: 96
  do_sample: false
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
_FUNCTIONS = '''
from PIL import Image


def messages(document):
    """Returns images or a video, and the text after them."""
    names = document["image"] or []
    parts = [{"type": "image", "url": Image.open(name).convert("RGB")} for name in names]
    if document["video"]:
        parts.append({"type": "video", "url": document["video"]})
    parts.append({"type": "text", "text": document["prompt"]})
    found = [{"role": "user", "content": parts}]
    if document["system"]:
        text = {"type": "text", "text": document["system"]}
        found.insert(0, {"role": "system", "content": [text]})
    return found
'''


def questions() -> list[dict]:
    """Returns the 16 shipped questions, each text without the places of its images."""
    rows = [json.loads(line) for line in (MODEL / "questions.jsonl").read_text().splitlines()]
    for row in rows:
        row["prompt"] = row["prompt"].rpartition("<image>\n")[2]
        row["image"] = [str(MODEL / name) for name in row["image"]]
    return rows


def _in_base64(path: str, size: tuple[int, int] | None = None) -> str:
    data = io.BytesIO()
    with Image.open(path) as image:
        (image if size is None else image.resize(size)).convert("RGB").save(data, "PNG")
    return base64.b64encode(data.getvalue()).decode()


def write_tables(folder: pathlib.Path) -> None:
    """Writes CARD_TABLES, with what else their tasks need, and DIGITS."""
    asked = questions()
    images = [_in_base64(row["image"][0]) for row in asked]
    rows = [
        {"index": number, "image": images[number], "question": "Read the number."}
        | OPTIONS
        | {"answer": "ABCD"[number], "category": "x", "l2-category": "y"}
        for number in range(4)
    ]
    write_table(folder / "MMStar.tsv", rows)
    several = [row | {"image": str([images[2], images[3]])} for row in rows[:2]]
    write_table(folder / "BLINK.tsv", [*several, rows[2]])
    write_table(
        folder / "MMMU_DEV_VAL.tsv",
        [
            row | {"index": f"validation_{row['index']}", "split": "validation"}
            for row in (rows[0], several[1])
        ],
    )
    for part in ("Mobile", "Desktop", "Web"):
        write_table(
            folder / f"ScreenSpot_{part}.tsv",
            [
                {"index": number, "image": images[8 + number], "question": "2"}
                | {"bbox": "[4, 8, 12, 10]", "data_type": "text", "data_source": "x"}
                for number in range(2)
            ],
        )
    digits = [
        {"index": row["id"], "question": row["prompt"], "answer": row["expected"]}
        | {"image": str([*map(_in_base64, row["image"])])}
        for row in asked
    ]
    write_table(folder / f"{DIGITS}.tsv", digits)


def write_tasks(folder: pathlib.Path) -> None:
    """Writes tasks of lmms-eval: tiny_digits, with the shipped questions, and tiny_media, with a
    video, and with a system message.
    """
    folder.mkdir()
    video = str(write_video(folder / "clip.mp4", 12))
    asked = [row | {"video": None, "system": None} for row in questions()]
    media = [
        asked[0] | {"image": None, "video": video, "prompt": "Read the number."},
        asked[0] | {"system": "You read numbers."},
    ]
    fields = ("id", "prompt", "image", "video", "system", "expected")
    for name, rows in (("tiny_digits", asked), ("tiny_media", media)):
        write_lines(
            folder / f"{name}.jsonl", [{field: row[field] for field in fields} for row in rows]
        )
        (folder / f"{name}.yaml").write_text(_TASK.format(name=name, folder=folder).lstrip())
    (folder / "functions.py").write_text(_FUNCTIONS.lstrip())


def run(*command: str, **environment: str) -> str:
    """Runs `python COMMAND` and returns what it printed; fails with that if it failed. The kits
    have the status 0 also then.
    """
    offline = {"HF_DATASETS_OFFLINE": "1", "PYTHONPATH": str(ROOT), "PRED_FORMAT": "tsv"}
    done = subprocess.run(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=os.environ | offline | environment,
    )
    errors = ("Error during evaluation", "combination failed")
    failed = done.returncode or any(error in done.stdout for error in errors)
    assert not failed, done.stdout[-5000:]
    return done.stdout


def cache() -> str:
    return str(compilation_cache.FOLDER)


def accept_tables(folder: pathlib.Path) -> None:
    """Lets VLMEvalKit take the tables of a folder, which are not the published ones."""
    import vlmeval.dataset

    for path in folder.glob("*.tsv"):
        digest = hashlib.md5(path.read_bytes()).hexdigest()
        for kind in vlmeval.dataset.DATASET_CLASSES:
            known = getattr(kind, "DATASET_MD5", None) or {}
            if path.stem in known:
                known[path.stem] = digest


def main() -> None:
    """Runs the adapter's command, or with --kit the kit's own one, on tables that are accepted."""
    import runpy

    accept_tables(pathlib.Path(os.environ["LMUData"]))
    if sys.argv[1] == "--kit":
        del sys.argv[1]
        runpy.run_module("vlmeval.run", run_name="__main__")
    else:
        from internvl3_jax.evaluate.kits import vlmevalkit

        sys.exit(vlmevalkit.main(sys.argv[1:]))


if __name__ == "__main__":
    main()
