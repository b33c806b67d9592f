"""examples/native_pretraining: what make_data.py writes is what the pipeline reads, and run.py's
questions and tables work. No network.
"""

import dataclasses
import functools
import json
import pathlib
import sys
import types

import numpy as np
import pytest
from PIL import Image

from configs.miniature import get_config
from internvl3_jax.checkpoints.checkpoint import save_checkpoint
from internvl3_jax.data.example import ExampleBuilder
from internvl3_jax.data.loader import BatchLoader
from internvl3_jax.data.media.images import open_image
from internvl3_jax.data.media.tiles import count_tiles
from internvl3_jax.data.sources.catalog import open_sources
from internvl3_jax.data.text.tokenizer import Tokenizer
from internvl3_jax.evaluate.command import load
from internvl3_jax.evaluate.task_table import TASKS
from internvl3_jax.inference import loading
from tests.support.tiny_checkpoint import CONFIG, PROCESSOR, random_params

FOLDER = pathlib.Path(__file__).resolve().parents[1] / "examples" / "native_pretraining"
QUESTIONS = 4


@pytest.fixture(scope="module")
def example():
    """The example's modules, which are programs beside each other and no package."""
    names = ("packages", "scenes", "writer", "questions", "make_tokenizer")
    names += ("make_data", "report", "run")
    sys.path.insert(0, str(FOLDER))
    try:
        yield types.SimpleNamespace(**{name: __import__(name) for name in names})
    finally:
        sys.path.remove(str(FOLDER))
        for name in names:
            sys.modules.pop(name, None)


@functools.cache
def drawing(vendor: str, thing: str) -> Image.Image:
    """Blots of one color, another for each thing and vendor."""
    pixels = np.random.default_rng([*vendor.encode(), *thing.encode()]).integers(
        0, 256, (8, 8, 3), dtype=np.uint8
    )
    return Image.fromarray(pixels).resize((64, 64)).convert("RGBA")


def chapters() -> list[str]:
    """Words that tell their chapter, and enough ordinary ones for a vocabulary."""
    rng = np.random.default_rng(0)
    letters = "etaoinshrdlucmfwypvbgk"
    words = ["".join(rng.choice(list(letters), int(rng.integers(2, 7)))) for _ in range(800)]
    return [" ".join([f"chapter{chapter}", *rng.choice(words, 120)]) for chapter in range(40)]


@pytest.fixture(scope="module")
def data(example, tmp_path_factory):
    """The folder that make_data.py wrote, small and with generated drawings and text."""
    folder = tmp_path_factory.mktemp("miniature") / "data"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(example.packages, "read_book", lambda folder: chapters())
        drawn = {
            vendor: {thing: drawing(vendor, thing) for thing in example.packages.THINGS}
            for vendor in ("google", "twitter")
        }
        patch.setattr(example.packages, "read_drawings", lambda vendor, folder: drawn[vendor])
        counts = example.make_data.write(folder, folder.parent / "packages", 0.02, QUESTIONS, 0)
    assert counts["held_out/other_drawings"] == 4 * QUESTIONS and counts["pretrain/digits"] == 100
    return folder


def rows_of(data: pathlib.Path, meta: str) -> dict[str, list[dict]]:
    sources = json.loads((data / f"{meta}.json").read_text())
    return {
        name: [json.loads(line) for line in (data / f"{name}.jsonl").read_text().splitlines()]
        for name in sources
    }


def config(data: pathlib.Path, stage: str, **changes):
    recipe = get_config(stage)
    values = {
        "source": str(data / f"{stage}.json"),
        "tokenizer": str(data / "tokenizer"),
        **changes,
    }
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, **values))


def test_the_tokenizer_is_the_recipes(data):
    tokenizer, model = Tokenizer.from_directory(data / "tokenizer"), get_config("pretrain").model
    assert tokenizer.vocab_size == model.language.vocab_size
    assert tokenizer.token_id("<IMG_CONTEXT>") == model.image_token_id
    text = 'Where is the <ref>star</ref>? "é" [[10, 20]]'
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("sunflower")) == len(tokenizer.encode(" ladybug")) == 1


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_the_pipeline_reads_what_is_written(data, stage):
    settings = config(data, stage)
    with BatchLoader(
        settings.data, settings.processor, Tokenizer.from_directory(data / "tokenizer")
    ) as batches:
        found = [next(batches) for _ in range(8)]
    assert all(item.skipped_count == 0 and item.batch["tiles"].any() for item in found)
    names = list(json.loads((data / f"{stage}.json").read_text()))
    seen = [names[source] for item in found for row in item.origins for source, _ in row]
    assert set(seen) == set(names)
    if stage == "pretrain":
        # text to images 1 : 3
        assert np.mean([name in ("book", "words") for name in seen]) == pytest.approx(
            0.25, abs=0.07
        )


def test_every_question_is_a_row_of_the_held_out_data(data):
    """With the same text, images and tiles as training cuts them into."""
    asked = load(TASKS["requests"], data).rows
    settings, found = config(data, "sft"), []
    tokenizer = Tokenizer.from_directory(data / "tokenizer")
    builder = ExampleBuilder(settings.data, settings.processor, tokenizer)
    for meta in ("held_out", "long"):
        source_config = dataclasses.replace(settings.data, source=str(data / f"{meta}.json"))
        for source in open_sources(source_config):
            for row in range(len(source)):
                if source.name != "test_book":  # a novel has no correct continuation
                    found.append((source, row))
    assert len(asked) == len(found) == 16 * QUESTIONS
    for question, (source, row) in zip(asked, found, strict=True):
        conversation = builder.read(source, row, np.random.default_rng(0))
        user, assistant = conversation.messages
        assert (question.question, question.answer) == (user["content"], assistant["content"])
        assert question.values["task"] == f"{source.name}/{source.rows[row][0]['task']}"
        paths = question.load_images()
        assert len(paths) == len(conversation.images) == user["content"].count("<image>")
        for path, image in zip(paths, conversation.images, strict=True):
            opened = open_image(path)
            assert opened.tobytes() == image.tobytes()
            most = question.changes.get("max_tiles", settings.processor.max_tiles)
            assert count_tiles(*opened.size, settings.processor, most) == len(
                builder.cut(image, conversation)
            )
        assert not source.name.startswith("find_") or all(
            count <= 4 for count in builder.count(conversation)
        )


def test_no_eval_data_is_trained_on(example, data):
    trained, held_out = ({}, {})
    for metas, rows in ((("pretrain", "sft"), trained), (("held_out", "long"), held_out)):
        for meta in metas:
            rows |= rows_of(data, meta)
    images = [
        {
            (data / "pictures" / image).read_bytes()
            for part in rows.values()
            for row in part
            for image in row.get("image", [])
        }
        for rows in (trained, held_out)
    ]
    assert images[0] and images[1] and not images[0] & images[1]
    texts = [json.dumps(rows) for rows in (trained, held_out)]
    chapters_of = [
        {number for number in range(40) if f"chapter{number} " in text} for text in texts
    ]
    assert chapters_of[1] <= {9, 19, 29, 39} and not chapters_of[0] & {9, 19, 29, 39}
    # Another hand's drawings are in the images of other_drawings alone; of the searches every
    # image is eval data.
    images = {
        image.split("/")[0]
        for part in rows_of(data, "long").values()
        for row in part
        for image in row["image"]
    }
    assert images == {"other_drawings", "test_digits"}


def test_a_search_has_one_number_and_says_which(data):
    digits = {
        row["image"][0]: row["conversations"][1]["value"]
        for row in rows_of(data, "held_out")["test_digits"]
    }
    for name, rows in rows_of(data, "long").items():
        for row in rows:
            assert (
                len(row["image"])
                == int(name.removeprefix("find_"))
                == row["conversations"][0]["value"].count("<image>")
            )
            found = [
                place
                for place, image in enumerate(row["image"])
                if image.startswith("test_digits/")
            ]
            assert (
                found == [row["place"]]
                and digits[row["image"][row["place"]]] == row["conversations"][1]["value"]
            )


def test_the_same_seed_writes_the_same(example, data, tmp_path, monkeypatch):
    monkeypatch.setattr(example.packages, "read_book", lambda folder: chapters())
    monkeypatch.setattr(
        example.packages,
        "read_drawings",
        lambda vendor, folder: {thing: drawing(vendor, thing) for thing in example.packages.THINGS},
    )
    example.make_data.write(tmp_path, tmp_path / "packages", 0.02, QUESTIONS, 0)
    for path in sorted(
        path.relative_to(data)
        for path in data.rglob("*")
        if path.is_file() and path.suffix in (".json", ".jsonl", ".png", ".txt")
    ):
        assert (tmp_path / path).read_bytes() == (data / path).read_bytes(), path


def test_without_npm_it_says_what_to_do(example, tmp_path, monkeypatch):
    monkeypatch.setattr(example.packages.shutil, "which", lambda name: None)
    with pytest.raises(
        example.packages.PackageError,
        match="npm is not installed.*emoji-datasource-google-16.0.0.tgz",
    ):
        example.packages.read_drawings("google", tmp_path)
    (tmp_path / "emoji-datasource-google-16.0.0.tgz").write_bytes(b"cut off")
    with pytest.raises(example.packages.PackageError, match="damaged.*delete it"):
        example.packages.read_drawings("google", tmp_path)


def test_a_model_is_asked_and_the_tables_are_made(example, data, tmp_path, monkeypatch):
    """On random weights: every task of every source has its share, at every delta, and small deltas
    keep positions low.
    """
    tokenizer = Tokenizer.from_directory(data / "tokenizer")
    language = dataclasses.replace(CONFIG.language, vocab_size=tokenizer.vocab_size)
    model = dataclasses.replace(
        CONFIG, language=language, image_token_id=tokenizer.token_id("<IMG_CONTEXT>")
    )
    save_checkpoint(
        tmp_path / "run" / "sft", random_params(model), model, PROCESSOR, tokenizer.files()
    )
    monkeypatch.setattr(loading, "use_compilation_cache", lambda directory: None)
    monkeypatch.setattr(example.run, "trained_reach", lambda folder: 137.0)
    monkeypatch.setattr(example.run, "LONGEST", 4)
    monkeypatch.setattr(example.run, "DELTAS", ("1", "1/8"))
    example.run.evaluate(tmp_path / "run", data)
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert list(scores) == ["reach", "held_out", "long"] and scores["reach"] == 137.0
    assert len(scores["held_out"]["1"]) == 3 + 4 + 4 and list(scores["long"]["1"]) == [
        f"find_{n}/find" for n in (2, 4, 8, 16, 32)
    ]
    parts = [*scores["held_out"].values(), *scores["long"].values()]
    assert all(task["questions"] == QUESTIONS for part in parts for task in part.values())
    positions = [scores["long"][delta]["find_32/find"]["position"] for delta in ("1", "1/8")]
    assert positions[0] > 300 and positions[1] < 0.6 * positions[0]

    monkeypatch.setattr(example.report, "DELTAS", ("1", "1/8"))
    row = {"eval_loss": 2.0, "eval_loss/test_book": 5.0, "eval_loss/other_drawings": 1.0}
    for folder, digit in (
        ("native/seed_0", 0.25),
        ("native/seed_10", 1.0),
        ("native/seed_2", 0.25),
        ("text_only/seed_0", 0.5),
    ):
        for stage in example.report.STAGES:
            (tmp_path / folder / stage).mkdir(parents=True)
            lines = [{"step": 5, "loss": 2.0, "seconds": 3.0}, {"step": 5, **row}]
            (tmp_path / folder / stage / "log.jsonl").write_text(
                "".join(json.dumps(line) + "\n" for line in lines)
            )
        scores["held_out"]["1"]["test_digits/digit"]["right"] = digit
        (tmp_path / folder / "scores.json").write_text(json.dumps(scores | {"reach": 100.0}))
    text = example.report.summarize(tmp_path)
    assert (tmp_path / "results.md").read_text() == text and "| text_only | 1/8 |" in text
    assert (
        "native 3, text_only 1" in text and "| test_digits/digit | 50 % (25-100) | 50 % |" in text
    )
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((tmp_path / "results.json").read_text())["variants"]
    assert {name: [seed["seed"] for seed in seeds] for name, seeds in results.items()} == {
        "native": [0, 2, 10],
        "text_only": [0],
    }


def test_the_stored_tables_are_of_the_stored_numbers(example):
    results = json.loads((FOLDER / "results" / "results.json").read_text())["variants"]
    assert example.report.as_text(results) == (FOLDER / "results" / "results.md").read_text()


def test_variants_differ_in_what_they_name(example, data, tmp_path):
    def settings(variant, *stage):
        return example.run.settings(tmp_path / variant / "seed_2", data, *stage)

    assert settings("native", "sft")["init_from"] == str(
        tmp_path / "native" / "seed_2" / "pretrain"
    )
    assert settings("text_only", "pretrain")[
        "data.text_fraction"
    ] == 1.0 and "data.text_fraction" not in settings("text_only", "sft")
    assert settings("delta_one", "sft")["data.deltas"] == ("1",) and "data.deltas" not in settings(
        "native", "sft"
    )
    assert settings("native", "pretrain")["steps"] == get_config("pretrain").steps
    assert settings("native", "pretrain")["seed"] == settings("native", "sft")["data.seed"] == 2
    short = settings("native", "sft", 65)
    assert short["steps"] == 20 and short["optimizer.warmup_steps"] == 4
