"""Writes the data of the native pre-training run in miniature, in InternVL's own format.

    pip install -e '.[demo]'
    python examples/native_pretraining/make_data.py runs/miniature/data

    pretrain.json    text: a novel, counting and comparing in words; images: descriptions of
                     numbers and of things, one by one and interleaved, some with boxes
    sft.json         questions about such images; the search for a number among images of things
    held_out.json    the same questions about handwriting of unseen scans, about drawings by another
                     hand, and about the training drawings in new images; and unseen chapters
    long.json        the search among 2 to 32 images of held_out.json
    questions.jsonl  the questions of held_out.json and long.json, for internvl3_jax.evaluate
    tokenizer/       Qwen2.5's construction, trained on all texts of the training data

Each JSON is a meta file with JSONL files and images beside it. The same seed writes the same files.
packages.py says what is downloaded, and its licenses; the handwriting is scikit-learn's.
"""

import argparse
import pathlib
import sys

import packages
from make_tokenizer import write_tokenizer
from questions import (
    cut_passages,
    digit_turns,
    find_digit,
    number_scenes,
    passage_row,
    thing_scenes,
    thing_turns,
    words_row,
)
from scenes import PROMPTS, make_number, make_things, make_turn
from writer import Writer, make_row

IMAGE_COUNTS = (2, 4, 8, 16, 32)  # of a search in long.json; training has 2 or 3
# Of each of these images, thumbnail not counted; as many as two images of a training sample get
TILES = 3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=pathlib.Path)
    parser.add_argument(
        "--packages",
        type=pathlib.Path,
        default=None,
        help="folder of the npm packages; default: OUTPUT/../packages",
    )
    parser.add_argument(
        "--scale", type=float, default=1.0, help="fraction of the training samples to write"
    )
    parser.add_argument(
        "--questions", type=int, default=100, help="test questions of each task (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    try:
        folder = options.packages or options.output.parent / "packages"
        counts = write(options.output, folder, options.scale, options.questions, options.seed)
    except (OSError, ImportError, ValueError) as error:
        sys.exit(f"error: {error}")
    for name, rows in counts.items():
        print(f"{name:<24} {rows:>7,} rows")


def write(
    output: pathlib.Path, folder: pathlib.Path, scale: float, questions: int, seed: int
) -> dict[str, int]:
    """Writes everything under `output`, with packages from `folder`.

    Returns:
      META/SOURCE -> number of rows.

    Raises:
      ValueError: scale or questions is not positive.
    """
    if scale <= 0 or questions < 1:
        raise ValueError(f"--scale is {scale} and --questions {questions}; both must be above 0")
    passages = cut_passages(packages.read_book(folder))
    drawings = packages.read_drawings("google", folder)
    other_drawings = packages.read_drawings("twitter", folder)
    writer = Writer(output, seed)
    write_pretrain(writer, drawings, passages["train"], scale)
    write_sft(writer, drawings, scale)
    corpus = list(writer.texts)  # before the test data is added
    write_held_out(writer, drawings, other_drawings, passages["test"], questions)
    write_long(writer, questions)
    write_tokenizer(output / "tokenizer", corpus)
    return writer.finish()


def write_pretrain(
    writer: Writer, drawings: dict, passages: list[tuple[str, str]], scale: float
) -> None:
    # Text
    rng = writer.rng("book")
    chosen = rng.permutation(len(passages))[: round(6000 * scale)]
    writer.add("pretrain", "book", [passage_row(passages[index]) for index in chosen])
    rng, names = writer.rng("words"), sorted(drawings)
    rows = [words_row(rng, names) for _ in range(round(1500 * scale))]
    writer.add("pretrain", "words", rows)

    # Images of numbers and of things
    numbers = number_scenes(writer, "digits", round(5000 * scale), "train")
    rows = [make_row([make_turn("describe", scene)], [path], "describe") for path, scene in numbers]
    writer.add("pretrain", "digits", rows)
    rng = writer.rng("things turns")
    things = thing_scenes(writer, "things", round(5000 * scale), drawings, True)
    rows = []
    for path, scene in things:
        turns = [make_turn("describe", scene)]
        turns += [make_turn("ground", scene)] * int(rng.random() < 0.4)
        rows.append(make_row(turns, [path], "describe"))
    writer.add("pretrain", "things", rows)

    # Two or three of them interleaved
    rng, rows = writer.rng("interleaved"), []
    for _ in range(round(2500 * scale)):
        kinds = [(numbers, things)[int(rng.integers(2))] for _ in range(int(rng.integers(2, 4)))]
        chosen = [scenes[int(rng.integers(len(scenes)))] for scenes in kinds]
        answer = "; ".join(scene.text for _, scene in chosen)
        rows.append(make_row([(PROMPTS["each"], answer)], [path for path, _ in chosen], "each"))
    writer.add("pretrain", "interleaved", rows)


def write_sft(writer: Writer, drawings: dict, scale: float) -> None:
    numbers = number_scenes(writer, "digit_questions", round(1500 * scale), "train")
    rng = writer.rng("digit questions turns")
    rows = [make_row(digit_turns(rng, scene), [path], "digits") for path, scene in numbers]
    writer.add("sft", "digit_questions", rows)

    things = thing_scenes(writer, "thing_questions", round(2500 * scale), drawings, True)
    rng = writer.rng("thing questions turns")
    rows = [make_row(thing_turns(rng, scene), [path], "things") for path, scene in things]
    writer.add("sft", "thing_questions", rows)

    rng = writer.rng("find")
    single = [(path, scene) for path, scene in numbers if len(scene.text) == 1]
    count = round(1500 * scale)
    rows = [find_digit(rng, single, things, int(rng.integers(2, 4))) for _ in range(count)]
    writer.add("sft", "find", rows)

    rng, names = writer.rng("word questions"), sorted(drawings)
    rows = [words_row(rng, names) for _ in range(round(500 * scale))]
    writer.add("sft", "word_questions", rows)


def write_held_out(
    writer: Writer,
    drawings: dict,
    other_drawings: dict,
    passages: list[tuple[str, str]],
    questions: int,
) -> None:
    # Handwriting of the test scans
    rng, rows = writer.rng("test digits"), []
    for task, fewest, most in (("digit", 1, 1), ("number", 2, 3), ("count digits", 1, 3)):
        for _ in range(questions):
            scene = make_number(rng, "test", most, fewest)
            turn = make_turn(task if task in PROMPTS else "read", scene)
            rows.append(make_row([turn], [writer.save("test_digits", len(rows), scene)], task))
    writer.add("held_out", "test_digits", rows)
    writer.ask("test_digits")

    # Things as another hand draws them, and the training drawings in new images
    tasks = (("name", 1, 1), ("what", 2, 3), ("count", 1, 3), ("where", 1, 3))
    for source, drawn in (("other_drawings", other_drawings), ("same_drawings", drawings)):
        rng, rows = writer.rng(source), []
        for task, fewest, most in tasks:
            for _ in range(questions):
                scene = make_things(rng, drawn, int(rng.integers(fewest, most + 1)), False)
                wanted = int(rng.integers(len(scene.names)))
                turn = make_turn("what" if task == "name" else task, scene, wanted)
                rows.append(make_row([turn], [writer.save(source, len(rows), scene)], task))
        writer.add("held_out", source, rows)
        writer.ask(source)

    # The unseen chapters
    chosen = writer.rng("test book").permutation(len(passages))[:questions]
    writer.add("held_out", "test_book", [passage_row(passages[index]) for index in chosen])


def write_long(writer: Writer, questions: int) -> None:
    """Searches for a test digit among images of two or three things each by another hand."""
    digits = [row for row in writer.rows["test_digits"] if row["task"] == "digit"]
    things = [row for row in writer.rows["other_drawings"] if row["task"] == "what"]
    for count in IMAGE_COUNTS:
        rng, rows = writer.rng(f"find {count}"), []
        for _ in range(questions):
            chosen = rng.integers(len(things), size=count)
            images = [things[index]["image"][0] for index in chosen]
            place, wanted = int(rng.integers(count)), digits[int(rng.integers(len(digits)))]
            images[place] = wanted["image"][0]
            turn = (PROMPTS["read"], wanted["conversations"][1]["value"])
            rows.append(make_row([turn], images, "find") | {"place": place})
        writer.add("long", f"find_{count}", rows, count * TILES)
        writer.ask(f"find_{count}", TILES)


if __name__ == "__main__":
    main()
