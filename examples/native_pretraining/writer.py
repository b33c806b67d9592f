"""Writes the sources of the experiment: rows as JSONL, images, meta JSONs over them, and questions
for internvl3_jax.evaluate.
"""

import json
import pathlib
import sys

import numpy as np
from scenes import Scene

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # the clone

from examples.experiment import write_jsonl

ROOT = "pictures"  # of the images, below the output
QUESTIONS = "questions.jsonl"


class Writer:
    """Collects rows and meta files under a folder. Each source has its own random generator."""

    def __init__(self, output: pathlib.Path, seed: int):
        self.output, self.seed = output, seed
        self.metas: dict[str, dict] = {}  # meta file -> source -> its entry
        self.rows: dict[str, list[dict]] = {}  # source -> rows
        self.texts: list[str] = []  # of all turns, for the tokenizer
        self.questions: list[dict] = []  # to score a model with

    def rng(self, source: str) -> np.random.Generator:
        return np.random.default_rng([self.seed, *source.encode()])

    def add(self, meta: str, source: str, rows: list[dict], max_tiles: int | None = None) -> None:
        """Adds a source to a meta file. max_tiles: of all images of a sample together."""
        entry = {"root": ROOT, "annotation": f"{source}.jsonl", "length": len(rows)}
        if max_tiles:
            entry["max_dynamic_patch"] = max_tiles
        self.metas.setdefault(meta, {})[source] = entry
        self.rows[source] = rows
        turns = [turn for row in rows for turn in row["conversations"]]
        self.texts += [turn["value"].replace("<image>\n", "") for turn in turns]

    def ask(self, source: str, max_tiles: int | None = None) -> None:
        """Makes questions of a source whose rows have one answer each. max_tiles: of an image."""
        for row in self.rows[source]:
            asked, answer = row["conversations"]
            question = {"task": f"{source}/{row['task']}", "prompt": asked["value"]}
            question["image"] = [f"{ROOT}/{image}" for image in row["image"]]
            question |= {"max_tiles": max_tiles} if max_tiles else {}
            self.questions.append(question | {"expected": answer["value"]})

    def save(self, source: str, index: int, scene: Scene) -> str:
        """Writes an image; returns its path under the root."""
        path = self.output / ROOT / source / f"{index:05}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        scene.image.save(path, compress_level=1)
        return f"{source}/{path.name}"

    def finish(self) -> dict[str, int]:
        """Writes the JSONL and meta files and the questions; returns META/SOURCE -> number of
        rows.
        """
        for source, rows in self.rows.items():
            numbered = ({"id": index} | row for index, row in enumerate(rows))
            write_jsonl(self.output / f"{source}.jsonl", numbered)
        for meta, entries in self.metas.items():
            (self.output / f"{meta}.json").write_text(json.dumps(entries, indent=1) + "\n")
        write_jsonl(self.output / QUESTIONS, self.questions)
        return {
            f"{meta}/{source}": entry["length"]
            for meta, entries in self.metas.items()
            for source, entry in entries.items()
        }


def make_row(turns: list[tuple[str, str]], images: list[str], task: str) -> dict:
    """Returns a row of turns (question, answer). The first question gets one <image> per image."""
    conversation = [
        {"from": speaker, "value": text}
        for pair in turns
        for speaker, text in zip(("human", "gpt"), pair, strict=True)
    ]
    conversation[0]["value"] = "<image>\n" * len(images) + conversation[0]["value"]
    row = {"image": images} if images else {}
    return row | {"task": task, "conversations": conversation}
