"""Writes the data of the native pre-training run in miniature, in InternVL's own format.

    pip install -e '.[demo]'
    python examples/native_pretraining/make_data.py runs/miniature/data

    pretrain.json    text: a novel, counting and comparing in words. Pictures: descriptions of numbers and of things, one by one and
                     interleaved, some with boxes
    sft.json         questions about such pictures, and the search for a number among pictures of things
    held_out.json    the same questions about handwriting of scans that are in no training picture; about things drawn by another
                     hand; about the drawings of the training in new pictures; and chapters that are
                     not trained on
    long.json        the search among 2 to 32 held-out pictures
    tokenizer/       Qwen2.5's construction, learnt from all of the training's prompts and answers

Each is a meta JSON with JSONL files and pictures beside it. The same seed writes the same files.
What is fetched, and under which licence, is in packages.py; the handwriting is scikit-learn's.
"""

import argparse
import json
import pathlib
import sys

import numpy as np
import packages
from scenes import PROMPTS, Scene, number, things, turn
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # the clone

from examples.tiny_digits.recipe import data as digits
from examples.tiny_digits.recipe import tokenizer as tiny_tokenizer
from internvl3_jax.data.text.tokenizer_files import QWEN2_SPLIT

VOCABULARY = 1024  # entries, added tokens included
WORDS = 15  # of a passage to read, and of its continuation
HELD_OUT_CHAPTER = 10  # every tenth
PICTURES = (2, 4, 8, 16, 32)  # of a search in long.json; training has 2 or 3
# of each of them, thumbnail not counted; as many as two pictures of a training sample get
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
        help="where the npm packages are kept (OUTPUT/../packages)",
    )
    parser.add_argument(
        "--scale", type=float, default=1.0, help="share of the training samples to write"
    )
    parser.add_argument(
        "--questions", type=int, default=100, help="held-out questions of each task"
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
    """Writes everything under `output`, with packages from `folder`; returns the number of rows of
    each source.
    """
    if scale <= 0 or questions < 1:
        raise ValueError(f"--scale is {scale} and --questions {questions}; both must be above 0")
    passages = cut_passages(packages.read_book(folder))
    seen, unseen = (
        packages.read_drawings("google", folder),
        packages.read_drawings("twitter", folder),
    )
    writer = Writer(output, seed)
    write_pretrain(writer, seen, passages["train"], scale)
    write_sft(writer, seen, scale)
    corpus = list(writer.texts)  # what is written after this is held out
    write_held_out(writer, seen, unseen, passages["test"], questions)
    write_long(writer, questions)
    write_tokenizer(output / "tokenizer", corpus)
    return writer.finish()


class Writer:
    """Rows, pictures and meta files under a folder. Each source draws from an rng of its own."""

    def __init__(self, output: pathlib.Path, seed: int):
        self.output, self.seed = output, seed
        self.metas: dict[str, dict] = {}
        self.rows: dict[str, list[dict]] = {}
        self.texts: list[str] = []

    def rng(self, source: str) -> np.random.Generator:
        return np.random.default_rng([self.seed, *source.encode()])

    def add(self, meta: str, source: str, rows: list[dict], max_tiles: int | None = None) -> None:
        """Registers a source of a meta file. max_tiles: of a sample's pictures together."""
        entry = {"root": "pictures", "annotation": f"{source}.jsonl", "length": len(rows)}
        self.metas.setdefault(meta, {})[source] = entry | (
            {"max_dynamic_patch": max_tiles} if max_tiles else {}
        )
        self.rows[source] = rows
        self.texts += [
            said["value"].replace("<image>\n", "") for row in rows for said in row["conversations"]
        ]

    def save(self, source: str, index: int, scene: Scene) -> str:
        """Writes a picture; returns its path under the root."""
        path = self.output / "pictures" / source / f"{index:05}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        scene.image.save(path, compress_level=1)
        return f"{source}/{path.name}"

    def finish(self) -> dict[str, int]:
        """Writes the JSONL and the meta files; the number of rows of each source as META/SOURCE."""
        for source, rows in self.rows.items():
            lines = [
                json.dumps({"id": index} | row, ensure_ascii=False) + "\n"
                for index, row in enumerate(rows)
            ]
            (self.output / f"{source}.jsonl").write_text("".join(lines), encoding="utf-8")
        for meta, entries in self.metas.items():
            (self.output / f"{meta}.json").write_text(json.dumps(entries, indent=1) + "\n")
        return {
            f"{meta}/{source}": entry["length"]
            for meta, entries in self.metas.items()
            for source, entry in entries.items()
        }


def row(turns: list[tuple[str, str]], images: list[str], task: str) -> dict:
    """A line of a JSONL file: turns of (question, answer), one <image> in the first for each
    picture.
    """
    said = [
        {"from": who, "value": text}
        for pair in turns
        for who, text in zip(("human", "gpt"), pair, strict=True)
    ]
    said[0]["value"] = "<image>\n" * len(images) + said[0]["value"]
    return ({"image": images} if images else {}) | {"task": task, "conversations": said}


def write_pretrain(
    writer: Writer, drawings: dict, passages: list[tuple[str, str]], scale: float
) -> None:
    rng = writer.rng("book")
    chosen = rng.permutation(len(passages))[: round(6000 * scale)]
    writer.add("pretrain", "book", [continuation(passages[index]) for index in chosen])
    rng = writer.rng("words")
    writer.add(
        "pretrain", "words", [in_words(rng, sorted(drawings)) for _ in range(round(1500 * scale))]
    )
    numbers = number_scenes(writer, "digits", round(5000 * scale), "train")
    writer.add(
        "pretrain",
        "digits",
        [row([turn("describe", scene)], [path], "describe") for path, scene in numbers],
    )
    rng = writer.rng("things turns")
    seen = thing_scenes(writer, "things", round(5000 * scale), drawings, True)
    rows = []
    for path, scene in seen:
        turns = [turn("describe", scene)] + [turn("ground", scene)] * int(rng.random() < 0.4)
        rows.append(row(turns, [path], "describe"))
    writer.add("pretrain", "things", rows)
    rng = writer.rng("interleaved")
    rows = []
    for _ in range(round(2500 * scale)):
        parts = [(numbers, seen)[int(rng.integers(2))] for _ in range(int(rng.integers(2, 4)))]
        chosen = [part[int(rng.integers(len(part)))] for part in parts]
        answer = "; ".join(scene.text for _, scene in chosen)
        rows.append(row([(PROMPTS["each"], answer)], [path for path, _ in chosen], "each"))
    writer.add("pretrain", "interleaved", rows)


def write_sft(writer: Writer, drawings: dict, scale: float) -> None:
    numbers = number_scenes(writer, "digit_questions", round(1500 * scale), "train")
    rng = writer.rng("digit questions turns")
    writer.add(
        "sft",
        "digit_questions",
        [row(digit_turns(rng, scene), [path], "digits") for path, scene in numbers],
    )
    seen = thing_scenes(writer, "thing_questions", round(2500 * scale), drawings, True)
    rng = writer.rng("thing questions turns")
    writer.add(
        "sft",
        "thing_questions",
        [row(thing_turns(rng, scene), [path], "things") for path, scene in seen],
    )
    rng = writer.rng("find")
    single = [(path, scene) for path, scene in numbers if len(scene.text) == 1]
    rows = [find(rng, single, seen, int(rng.integers(2, 4))) for _ in range(round(1500 * scale))]
    writer.add("sft", "find", rows)
    rng = writer.rng("word questions")
    writer.add(
        "sft",
        "word_questions",
        [in_words(rng, sorted(drawings)) for _ in range(round(500 * scale))],
    )


def write_held_out(
    writer: Writer, seen: dict, unseen: dict, passages: list[tuple[str, str]], questions: int
) -> None:
    rng, rows = writer.rng("test digits"), []
    for task, fewest, most in (("digit", 1, 1), ("number", 2, 3), ("count digits", 1, 3)):
        for _ in range(questions):
            scene = number(rng, "test", most, fewest)
            asked = turn(task if task in PROMPTS else "read", scene)
            rows.append(row([asked], [writer.save("test_digits", len(rows), scene)], task))
    writer.add("held_out", "test_digits", rows)
    for source, drawings in (("other_drawings", unseen), ("same_drawings", seen)):
        rng, rows = writer.rng(source), []
        for task, fewest, most in (
            ("name", 1, 1),
            ("what", 2, 3),
            ("count", 1, 3),
            ("where", 1, 3),
        ):
            for _ in range(questions):
                scene = things(rng, drawings, int(rng.integers(fewest, most + 1)), False)
                asked = turn(
                    "what" if task == "name" else task, scene, int(rng.integers(len(scene.names)))
                )
                rows.append(row([asked], [writer.save(source, len(rows), scene)], task))
        writer.add("held_out", source, rows)
    chosen = writer.rng("test book").permutation(len(passages))[:questions]
    writer.add("held_out", "test_book", [continuation(passages[index]) for index in chosen])


def write_long(writer: Writer, questions: int) -> None:
    """Searches over the pictures of held_out.json: a test digit among pictures of two or three
    things each by another hand.
    """
    single = [entry["image"][0] for entry in writer.rows["test_digits"] if entry["task"] == "digit"]
    answers = [
        entry["conversations"][1]["value"]
        for entry in writer.rows["test_digits"]
        if entry["task"] == "digit"
    ]
    others = [
        entry["image"][0] for entry in writer.rows["other_drawings"] if entry["task"] == "what"
    ]
    for count in PICTURES:
        rng, rows = writer.rng(f"find {count}"), []
        for _ in range(questions):
            images = [others[index] for index in rng.integers(len(others), size=count)]
            place, wanted = int(rng.integers(count)), int(rng.integers(len(single)))
            images[place] = single[wanted]
            rows.append(
                row([(PROMPTS["read"], answers[wanted])], images, "find") | {"place": place}
            )
        writer.add("long", f"find_{count}", rows, count * TILES)


def number_scenes(writer: Writer, source: str, count: int, split: str) -> list[tuple[str, Scene]]:
    """Pictures of numbers, half of them of one digit and the rest of up to three: (path, scene)."""
    rng = writer.rng(source)
    scenes = [number(rng, split, 1 if rng.random() < 0.5 else 3) for _ in range(count)]
    return [(writer.save(source, index, scene), scene) for index, scene in enumerate(scenes)]


def thing_scenes(
    writer: Writer, source: str, count: int, drawings: dict, vary: bool
) -> list[tuple[str, Scene]]:
    """Pictures of things, half of them of one and the rest of up to three: (path, scene)."""
    rng = writer.rng(source)
    scenes = [
        things(rng, drawings, 1 if rng.random() < 0.5 else int(rng.integers(2, 4)), vary)
        for _ in range(count)
    ]
    return [(writer.save(source, index, scene), scene) for index, scene in enumerate(scenes)]


def digit_turns(rng: np.random.Generator, scene: Scene) -> list[tuple[str, str]]:
    tasks = ["read", "count digits"]
    rng.shuffle(tasks)
    return [turn(task, scene) for task in tasks]


def thing_turns(rng: np.random.Generator, scene: Scene) -> list[tuple[str, str]]:
    """Two of: what, how many, where."""
    tasks = rng.permutation(["what", "count", "where"])[:2]
    return [turn(str(task), scene, int(rng.integers(len(scene.names)))) for task in tasks]


def find(rng: np.random.Generator, numbers: list, others: list, count: int) -> dict:
    """The search for the one picture of a digit among `count`."""
    chosen = [others[int(rng.integers(len(others)))] for _ in range(count)]
    place = int(rng.integers(count))
    chosen[place] = numbers[int(rng.integers(len(numbers)))]
    return row([turn("read", chosen[place][1])], [path for path, _ in chosen], "find")


def in_words(rng: np.random.Generator, names: list[str]) -> dict:
    """A question without a picture: how many of some words there are, or which of two numbers is
    larger.
    """
    if rng.random() < 0.5:
        question = digits.compare_in_words(rng)
        return row([(question.messages[0]["content"], question.answer)], [], "words")
    chosen = [str(name) for name in rng.choice(names, int(rng.integers(1, 4)), replace=False)]
    return row([(f"{', '.join(chosen)}. {PROMPTS['count']}", str(len(chosen)))], [], "words")


def cut_passages(chapters: list[str]) -> dict[str, list[tuple[str, str]]]:
    """{"train": ..., "test": ...} of (passage, its continuation), of WORDS words each; every tenth
    chapter is for testing.
    """
    passages = {"train": [], "test": []}
    for chapter, text in enumerate(chapters):
        words = text.split()
        split = "test" if chapter % HELD_OUT_CHAPTER == HELD_OUT_CHAPTER - 1 else "train"
        for start in range(0, len(words) - 2 * WORDS + 1, 2 * WORDS):
            halves = words[start : start + WORDS], words[start + WORDS : start + 2 * WORDS]
            passages[split].append((" ".join(halves[0]), " ".join(halves[1])))
    return passages


def continuation(passage: tuple[str, str]) -> dict:
    return row([(f"{PROMPTS['continue']}\n{passage[0]}", passage[1])], [], "continue")


def write_tokenizer(folder: pathlib.Path, corpus: list[str]) -> None:
    """tiny_tokenizer's files with VOCABULARY entries learnt from the corpus."""
    files = tiny_tokenizer.build()
    settings = json.loads(files["tokenizer_config.json"])
    tokens = tiny_tokenizer.ADDED + tiny_tokenizer.MARKUP
    entries = VOCABULARY - len(tokens)
    model = learn(entries, corpus)
    described = {entry["content"]: entry for entry in settings["added_tokens_decoder"].values()}
    settings["added_tokens_decoder"] = {
        str(entries + index): described[token] for index, token in enumerate(tokens)
    }
    added = {token: entries + index for index, token in enumerate(tokens)}
    contents = {
        "vocab.json": model["vocab"],
        "added_tokens.json": added,
        "tokenizer_config.json": settings,
    }
    files |= {
        name: json.dumps(content, ensure_ascii=False, indent=1).encode()
        for name, content in contents.items()
    }
    files["merges.txt"] = "".join(
        ["#version: 0.2\n", *(f"{' '.join(pair)}\n" for pair in model["merges"])]
    ).encode()
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def learn(entries: int, corpus: list[str]) -> dict:
    """{"vocab": .., "merges": ..} of byte-level BPE with Qwen2.5's normaliser and split rule.
    ValueError if the corpus is too small.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer, tokenizer.decoder = normalizers.NFC(), decoders.ByteLevel()
    split = pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=entries, initial_alphabet=alphabet, show_progress=False
    )
    # The words of the chat format and the names come first: they are single tokens, however small
    # the corpus.
    names = [f"{space}{name}" for name in packages.THINGS for space in ("", " ")]
    tokenizer.train_from_iterator(
        [*(["system\n", "user\n", "assistant\n", *names] * 1000), *corpus], trainer
    )
    model = json.loads(tokenizer.to_str())["model"]
    if len(model["vocab"]) != entries:
        raise ValueError(
            f"the corpus gave {len(model['vocab'])} of {entries} vocabulary entries; write more of it with --scale"
        )
    return model


if __name__ == "__main__":
    main()
