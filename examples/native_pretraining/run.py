"""Runs native pre-training in miniature and its ablations, and scores the results.

    python examples/native_pretraining/make_data.py runs/miniature/data
    python examples/native_pretraining/run.py runs/miniature

    --only native                                one variant in place of all
    --seeds 3                                    each variant from three seeds
    --steps 60 --data runs/miniature/data        a short try, in another folder than runs/miniature

    native      one stage of text and multimodal data 1 : 3 with a V2PE step sampled for each
                image, then SFT
    text_only   the same stage without the multimodal data, with frozen tower and projector; then
                the same SFT
    delta_one   as native, with every V2PE step 1 in both stages

Under OUTPUT, VARIANT/seed_S/pretrain and sft are runs of train.py, evaluation has the answers and
the report of internvl3_jax.evaluate, and scores.json what is read of them. A seed changes the
initial weights and the order of the data, not the questions.
results.json, results.md and curves.png are made of all finished seeds. Run again, it resumes.

All questions are on unseen data: handwriting of other scans, drawings by another hand (and, to
compare, the training drawings in new images), and the search for a number among more images than
any training sample has.
"""

import argparse
import itertools
import json
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from report import DELTAS, STAGES, VARIANTS, read_scores, seed_of, summarize
from writer import QUESTIONS

from configs.miniature import STEPS, get_config
from examples.experiment import train

LONGEST = 64  # tokens of an answer
BATCH = 16  # answers that decode together
STEP_ONE = {"data.deltas": ("1",)}
# Variant -> stage -> what differs from configs/miniature.py.
CHANGES = {
    "native": {},
    "text_only": {
        "pretrain": {"data.text_fraction": 1.0, "optimizer.freeze": ("vision/.*", "projector/.*")}
    },
    "delta_one": {"pretrain": STEP_ONE, "sft": STEP_ONE},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=pathlib.Path)
    parser.add_argument(
        "--data",
        type=pathlib.Path,
        default=None,
        help="output of make_data.py; default: OUTPUT/data",
    )
    parser.add_argument(
        "--only", choices=VARIANTS, action="append", help="a variant; may be given several times"
    )
    parser.add_argument(
        "--seeds", type=int, default=1, help="number of seeds of each variant (%(default)s)"
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=None,
        help="steps of pre-training, and of SFT in proportion; default: the recipe's",
    )
    options = parser.parse_args()
    data = (options.data or options.output / "data").resolve()
    for name in ("pretrain.json", "sft.json", "held_out.json", QUESTIONS):
        if not (data / name).is_file():
            program = "python examples/native_pretraining/make_data.py"
            sys.exit(f"error: {data / name} does not exist; make it with: {program} {data}")
    for seed, variant in itertools.product(range(options.seeds), options.only or VARIANTS):
        folder = options.output.resolve() / variant / f"seed_{seed}"
        for stage in STAGES:
            changes = settings(folder, data, stage, options.steps)
            train(f"miniature.py:{stage}", folder / stage, changes)
        evaluate(folder, data)
    print(summarize(options.output))


def settings(
    folder: pathlib.Path, data: pathlib.Path, stage: str, steps: int | None = None
) -> dict[str, object]:
    """Returns field of TrainConfig -> value in place of the recipe's. folder: VARIANT/seed_S."""
    seed, variant = seed_of(folder), folder.parent.name
    values = {
        "data.source": str(data / f"{stage}.json"),
        "data.tokenizer": str(data / "tokenizer"),
        "eval.source": str(data / "held_out.json"),
        "steps": STEPS[stage],
        "seed": seed,
        "data.seed": seed,
    }
    values |= CHANGES[variant].get(stage, {})
    if stage == "sft":
        values["init_from"] = str(folder / "pretrain")
    if steps is not None:
        warmup = get_config(stage).optimizer.warmup_steps
        values["steps"] = max(5, round(steps * STEPS[stage] / STEPS["pretrain"]))
        values["optimizer.warmup_steps"] = min(warmup, values["steps"] // 5)
    return values


def evaluate(folder: pathlib.Path, data: pathlib.Path) -> None:
    """Asks the questions as any benchmark's, with internvl3_jax.evaluate, and writes scores.json
    unless it exists: {"reach": of `trained_reach`} and what `read_scores` returns.
    """
    path = folder / "scores.json"
    if path.is_file():
        print(f"{path} exists", flush=True)
        return
    from internvl3_jax.evaluate import command

    output = folder / "evaluation"
    arguments = ["--checkpoint", folder / "sft", "--data", data, "--output", output]
    arguments += ["--tasks", "requests", "--delta", *DELTAS, "--max_new_tokens", LONGEST]
    status = command.main([*map(str, arguments), "--dtype=float32", f"--batch_size={BATCH}"])
    if status:
        sys.exit(status)
    scores = {"reach": trained_reach(folder)} | read_scores(output, data / QUESTIONS)
    path.write_text(json.dumps(scores, indent=1) + "\n")


def trained_reach(folder: pathlib.Path, samples: int = 1000) -> float:
    """Returns the largest position among the first samples of both stages."""
    from internvl3_jax.config import UNITS, TrainConfig, from_dict
    from internvl3_jax.data.pipeline import make_tokenizer, sample_dataset

    largest = 0
    for stage in STAGES:
        config = from_dict(TrainConfig, json.loads((folder / stage / "config.json").read_text()))
        dataset = sample_dataset(config.data, config.processor, make_tokenizer(config.data))
        largest = max(largest, *(int(dataset[index]["positions"][-1]) for index in range(samples)))
    return largest / UNITS


if __name__ == "__main__":
    main()
