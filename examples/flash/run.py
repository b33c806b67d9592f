"""InternVL3.5-Flash in miniature: the digits model learns to compress blank tiles.

    pip install -e '.[demo]'
    python examples/flash/run.py runs/flash

For each seed:

    start    the shipped digits model with an untrained router and second projector
    vico     from it: the same answers with compressed tiles (loss.kind "vico")
    router   from that: which tiles are compressed (loss.kind "router")
    test     answers to sheets of unseen handwriting, with and without the router

Run again, it resumes. results.json, results.md and curves.png are made of all finished seeds.
"""

import argparse
import json
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from examples.experiment import (
    DIGITS_MODEL,
    markdown_table,
    percent,
    read_jsonl,
    run_python,
    run_seeds,
    seed_settings,
    train,
)

TEST = 1000  # questions
BATCH = 50  # questions answered together
# Name in the table -> checkpoint, and whether its router decides
MODELS = {
    "digits model, all tokens": ("start", "off"),
    "after vico, all tokens": ("vico", "off"),
    "after vico, untrained router": ("vico", "auto"),
    "after router": ("router", "auto"),
}
KINDS = ("blank", "written", "thumbnail")
CURVES = {"vico": ("loss",), "router": ("loss", "router_accuracy", "router_threshold")}


def main() -> None:
    run_seeds(__doc__, run_seed, summarize, test=(TEST, "test questions"))


def run_seed(folder: pathlib.Path, seed: int, options: argparse.Namespace) -> None:
    """Both stages, and the answers."""
    folder.mkdir(parents=True, exist_ok=True)
    start = folder / "start"
    if not start.exists():
        flags = {"checkpoint": DIGITS_MODEL, "output": start, "seed": seed}
        flags = [f"--{name}={value}" for name, value in flags.items()]
        run_python("-m", "internvl3_jax.training.add_router", *flags)
    settings = seed_settings(seed, options) | {"loss.ref_model": start}
    train("flash.py:vico", folder / "vico", settings | {"init_from": start})
    train("flash.py:router", folder / "router", settings | {"init_from": folder / "vico"})
    for name in MODELS:
        test(folder, name, options.test)


def test(folder: pathlib.Path, name: str, count: int) -> None:
    """Writes the answers' file: right ones, visual tokens, and compressed tiles of each kind."""
    from examples.flash import data
    from examples.tiny_digits.recipe.data import is_right
    from internvl3_jax import Chat, load

    path = folder / answers_file(name)
    if path.exists():
        return
    checkpoint, mode = MODELS[name]
    chat = Chat(load(folder / checkpoint), max_new_tokens=48, flash=mode)
    engine = chat.engines.with_rows(BATCH)
    questions, found = data.held_out(count), {"right": 0, "tokens": 0, "all_tokens": 0}
    tiles = {kind: [0, 0] for kind in KINDS}  # compressed, all
    for start in range(0, count, BATCH):
        batch = questions[start : start + BATCH]
        prompts = [chat.prepare(one.messages[0]["content"], one.images) for one in batch]
        asked = [chat.ask(engine, prompt, chat.options) for prompt in prompts]
        engine.run()
        for one, prompt, request in zip(batch, prompts, asked, strict=True):
            run = request.ticket.request.prompt  # as it was run
            found["right"] += is_right(one.task, one.answer, request.answer().text)
            found["tokens"] += run.runs[0][1]
            found["all_tokens"] += prompt.runs[0][1]
            add_tiles(tiles, run)
    path.write_text(json.dumps(found | {"questions": count, "tiles": tiles}) + "\n")


def add_tiles(tiles: dict[str, list[int]], prompt) -> None:
    """Counts the tiles of a sheet by kind, and those of them that are compressed."""
    from examples.flash.data import is_blank

    sheet = prompt.tiles[0]
    for index, blank in enumerate(is_blank(sheet)):
        last = index == len(sheet) - 1
        counts = tiles["thumbnail" if last else "blank" if blank else "written"]
        counts[0] += bool(prompt.compressed and prompt.compressed[0][index])
        counts[1] += 1


def answers_file(name: str) -> str:
    return f"test_{name.replace(' ', '_').replace(',', '')}.json"


# --- results -------------------------------------------------------------------------------------


def summarize(output: pathlib.Path) -> str:
    """Writes results.json, results.md and curves.png; returns the text of results.md."""
    names = {name: answers_file(name) for name in MODELS}
    seeds = sorted(
        path for path in output.glob("seed_*") if (path / names["after router"]).exists()
    )
    tests = {
        name: [json.loads((seed / file).read_text()) for seed in seeds]
        for name, file in names.items()
    }
    curves = {
        stage: [
            [
                {name: row[name] for name in ("step", *metrics)}
                for row in read_jsonl(seed / stage / "log.jsonl")
                if "loss" in row
            ]
            for seed in seeds
        ]
        for stage, metrics in CURVES.items()
    }
    results = {"tests": tests, "curves": curves}
    (output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    draw(output / "curves.png", curves)
    text = as_text(tests)
    (output / "results.md").write_text(text, encoding="utf-8")
    return text


def as_text(tests: dict) -> str:
    head = ["", "right", "visual tokens", *(f"compressed: {kind}" for kind in KINDS)]
    rows = []
    for name, runs in tests.items():
        shares = [[run["right"] / run["questions"] for run in runs]]
        shares += [[run["tokens"] / run["all_tokens"] for run in runs]]
        for kind in KINDS:
            counts = [run["tiles"][kind] for run in runs]
            shares.append([compressed / whole for compressed, whole in counts])
        rows.append([name, *map(percent, shares)])
    count = tests["after router"][0]["questions"]
    note = f"Greedy answers to {count} sheets of unseen handwriting; mean of {len(runs)} seeds"
    return f"{note} (lowest to highest).\n\n{markdown_table(head, rows)}\n"


def draw(path: pathlib.Path, curves: dict) -> None:
    """Draws the losses and the router's accuracy over the steps, one line per seed."""
    from matplotlib.figure import Figure

    drawn = [(stage, name) for stage, names in CURVES.items() for name in names]
    figure = Figure(figsize=(4 * len(drawn), 3.5), layout="constrained")
    for axis, (stage, name) in zip(figure.subplots(1, len(drawn)), drawn, strict=True):
        for run in curves[stage]:
            axis.plot([row["step"] for row in run], [row[name] for row in run], linewidth=1)
        axis.set_title(f"{stage}: {name}")
        axis.set_xlabel("step")
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    main()
