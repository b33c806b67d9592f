"""VLMEvalKit and lmms-eval, as they are installed, with the digits model: through the classes of
this package, and through its server (`make test-kits`).

Answers through a kit equal those of `python -m internvl3_jax.evaluate` to the same rows.
"""

import csv
import json
import pathlib

import pytest

from internvl3_jax import Chat, load
from internvl3_jax.evaluate import asking, frames
from internvl3_jax.evaluate.prompts import numbered
from internvl3_jax.evaluate.scorers.boxes import stored_point
from internvl3_jax.evaluate.stored import as_jpeg
from tests.support import kits_world as world
from tests.support.evaluate_runs import evaluate
from tests.support.server_process import ServerProcess

pytestmark = pytest.mark.kits

KIT = ("-m", "tests.support.kits_world")
DELTA = "1/4"  # answers differ from those of the model's own step, 1


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tables")
    world.write_tables(folder)
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lmms") / "tasks"
    world.write_tasks(folder)
    return folder


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Returns id -> answer to the shipped questions, by the command: with DELTA, and with 1."""
    output = tmp_path_factory.mktemp("digits")
    assert evaluate(world.MODEL, output, ["requests"], "--delta", DELTA, "1") == 0
    names = {DELTA: "requests.delta_1_4", "1": "requests.delta_1"}
    found = {delta: answers(output, name) for delta, name in names.items()}
    assert found[DELTA] != found["1"]
    return found


def answers(output, name: str) -> dict[str, str]:
    lines = (output / "answers" / f"{name}.jsonl").read_text().splitlines()
    return {str(row["id"]): row["text"] for row in map(json.loads, lines)}


def predictions(folder, name: str) -> dict[str, str]:
    """Returns index -> prediction of a table that VLMEvalKit wrote."""
    (path,) = folder.glob(f"*/*_{name}.tsv")
    with open(path, newline="") as file:
        return {row["index"]: row["prediction"] for row in csv.DictReader(file, delimiter="\t")}


def samples(folder, task: str) -> list[str]:
    """Returns the answers that lmms-eval wrote, in the order of the documents."""
    (path,) = folder.rglob(f"*_samples_{task}.jsonl")
    rows = sorted(map(json.loads, path.read_text().splitlines()), key=lambda row: row["doc_id"])
    return [row["filtered_resps"] for row in rows]


# --- VLMEvalKit -----------------------------------------------------------------------------------


def test_vlmevalkit_asks_as_for_the_card(tables, digits, tmp_path):
    """Tables of the card, among them several images, an image that is enlarged, and boxes; and a
    table that the card does not have.
    """
    limits = ["--max_new_tokens", "6", "--delta", DELTA]
    names = ["mmstar", "blink", "mmmu", "screenspot"]
    assert evaluate(tables, tmp_path / "ours", names, *limits, "--card", "1B") == 0
    adapter = ["--checkpoint", str(world.MODEL), "--delta", DELTA, "--compilation_cache"]
    kit = ["--mode", "infer", "--work-dir", str(tmp_path / "kit"), "--data"]
    model = [*KIT, *adapter, world.cache(), "--reasoning", "off"]
    world.run(*model, "--max_new_tokens", "6", "--", *kit, *world.CARD_TABLES, LMUData=str(tables))
    found = {name: predictions(tmp_path / "kit", name) for name in world.CARD_TABLES}
    assert sum(map(len, found.values())) == 4 + 3 + 2 + 2
    for table, task in zip(world.CARD_TABLES, names, strict=True):
        ours = answers(tmp_path / "ours", f"{task}.delta_1_4")
        if task == "screenspot":
            ours = {index: stored_point(ours[f"{table}:{index}"]) for index in found[table]}
        assert found[table] == ours, table
    longest = ["--max_new_tokens", "96"]
    world.run(*model, *longest, "--", *kit, world.DIGITS, LMUData=str(tables))
    assert predictions(tmp_path / "kit", world.DIGITS) == digits[DELTA]


# --- lmms-eval ------------------------------------------------------------------------------------


def test_lmms_eval_asks_as_chat_does(tasks, digits, tmp_path):
    model = f"checkpoint={world.MODEL},compilation_cache={world.cache()},num_frames=3"
    command = ["-m", "lmms_eval", "--model", "internvl3_jax", "--include_path", str(tasks)]
    command += ["--log_samples", "--batch_size", "4", "--output_path"]
    world.run(
        *command, str(tmp_path / "steps"), "--tasks", "tiny_digits",
        "--model_args", f"{model},delta={DELTA}",
    )  # fmt: skip
    assert samples(tmp_path / "steps", "tiny_digits") == [*digits[DELTA].values()]
    printed = world.run(
        *command, str(tmp_path / "own"), "--tasks", "tiny_digits,tiny_media",
        "--model_args", model,
    )  # fmt: skip
    assert samples(tmp_path / "own", "tiny_digits") == [*digits["1"].values()]
    right = [row["expected"] for row in world.questions()]
    share = sum(map(str.__eq__, right, digits["1"].values())) / 16
    assert share >= 0.7 and f"|{share}|" in printed.replace(" ", "")
    # A video, and a system message.
    chat = Chat(load(world.MODEL))
    images, _, _ = frames.read_video(str(tasks / "clip.mp4"), "mvbench", 3)
    text = numbered("Frame", 3, always=True, hyphen="") + "Read the number."
    options = {"max_new_tokens": 96, "max_tiles": 1}
    (shown,) = asking.answer(chat, [asking.Question(text, images, "")], options, 1)
    first = world.questions()[0]
    answer = chat(first["prompt"], first["image"], system="You read numbers.", max_new_tokens=96)
    assert samples(tmp_path / "own", "tiny_media") == [shown["text"], answer]


def sent_as_jpeg() -> dict[str, str]:
    """Returns the answers to the shipped questions with their images as VLMEvalKit sends them."""
    rows = world.questions()
    asked = [
        asking.Question(
            numbered("Image", len(row["image"])) + row["prompt"],
            [as_jpeg(pathlib.Path(name).read_bytes(), name) for name in row["image"]],
            "",
        )
        for row in rows
    ]
    chat = Chat(load(world.MODEL))
    found = asking.answer(chat, asked, {"max_new_tokens": 96, "max_total_tiles": 64}, 4)
    return {str(row["id"]): one["text"] for row, one in zip(rows, found, strict=True)}


# --- through the server ---------------------------------------------------------------------------


def test_both_kits_ask_the_server(tasks, tables, digits, tmp_path):
    server = ServerProcess(["--max_total_tiles=64"])
    try:
        server.wait_until_ready()
        url, name = f"{server.url}/v1", world.MODEL.name
        world.run(
            "-m", "lmms_eval", "--model", "openai", "--include_path", str(tasks),
            "--tasks", "tiny_digits", "--log_samples", "--output_path", str(tmp_path / "lmms"),
            "--model_args", f"model_version={name},base_url={url},api_key=none,timeout=600",
        )  # fmt: skip
        assert samples(tmp_path / "lmms", "tiny_digits") == [*digits["1"].values()]
        world.run(
            *KIT, "--kit", "--api-mode", "--base-url", url, "--model", name, "--key", "none",
            "--data", world.DIGITS, "--api-nproc", "8", "--temperature", "0",
            "--max-tokens", "96", "--mode", "infer", "--work-dir", str(tmp_path / "kit"),
            LMUData=str(tables), VLMEVAL_MIN_IMAGE_EDGE="1",
        )  # fmt: skip
        assert predictions(tmp_path / "kit", world.DIGITS) == sent_as_jpeg()
    finally:
        server.close()
