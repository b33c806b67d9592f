"""Lists what is changed in a command of the pages before it runs, and what cannot run here, with
the reason.
"""

import re

from tests.support.documents import Command, commands, pages

# What is changed before a command runs: (regular expression, replacement), all of them, in this
# order.
SUBSTITUTED = (
    (r"^python3? |^\.venv-test/bin/python ", "python "),
    (r"runs/receipts/checkpoints/500", "runs/receipts/checkpoints/2"),  # of a run of 2 steps
    # A mesh of many devices: what the analysis says of the same configuration.
    (
        r"^python train.py --config (\S+:(?:8|38|78)b) --workdir \S+ (.*--config\.mesh.*)",
        r"python -m internvl3_jax.fit --config \1 \2 --topology h100:2x8x8 --analytic",
    ),
    # no compiler of a TPU or GPU
    (r"^(python -m internvl3_jax.fit (?!.*--analytic).*)", r"\1 --analytic"),
    (r"(infer.py --checkpoint DIR --devices 4)", r"\1 --prompt Hello"),  # no conversation
)
# Flags behind those of the page, by program. A later one wins.
SMALL_DATA = "--config.data.rows=1 --config.data.tokens_per_row=1024 --config.data.tiles_per_row=16 --config.data.workers=0"
ADDED = {
    "train.py --config configs/tiny_digits.py": "--config.steps=2 --config.optimizer.warmup_steps=0",
    "train.py --config configs/pretrain.py": f"--config.steps=2 --config.optimizer.warmup_steps=0 {SMALL_DATA} "
    "--config.data.text_fraction=-1",
    "train.py": f"--config.steps=2 --config.optimizer.warmup_steps=0 {SMALL_DATA}",
    "internvl3_jax.training.make_reference": f"--config.steps=2 --config.optimizer.warmup_steps=0 {SMALL_DATA}",
    "internvl3_jax.evaluate": "--limit=2 --max_new_tokens=4",
    "infer.py": "--max_new_tokens=4",
    "internvl3_jax.parity pack --output pack_dir": "--family internvl3_5",
    "internvl3_jax.reward.make_pairs": "--max_new_tokens=8 --samples=2",
    "internvl3_jax.reward.make_process_labels": "--max_new_tokens=8 --solutions=1 --continuations=2",
}
# What is not run, and why.
NOT_RUN = (
    (r"^make ", "sets up environments; this test is part of make test"),
    (
        r"^pip install |^python3? -m venv |^\. \S+/bin/activate$",
        "tests/test_install.py runs the pages' installations",
    ),
    (r"^git clone |^cd internvl3_jax$", "the clone is here"),
    (r"^export ", "of a cloud, or of the reader's shell"),
    (
        r"^launch/|^sbatch |^kubectl |^sky |^docker |^gcloud ",
        "needs a cluster; tests/test_launch_clusters.py runs launch/ with stand-ins",
    ),
    (r"^\S*python -m pytest ", "another test"),
    (
        r"^python .*(gs|s3)://",
        "needs a bucket; tests/test_object_storage.py runs the programs with servers of this machine",
    ),
    (
        r"^python benchmarks/",
        "minutes to hours; tests/test_benchmarks.py and others run their smallest forms",
    ),
    (
        r"^python -m internvl3_jax\.parity check .*--engine http",
        "needs a server; tests/test_parity_engines.py asks one",
    ),
    (r"^python examples/", "half an hour; tests of their own run their parts"),
    (r"^python -m internvl3_jax\.fit$", "named, not called"),
    (
        r"^python -m internvl3_jax\.serve",
        "runs until a signal; tests/test_serve_documented.py starts it and asks it as the page does",
    ),
    (r"^curl ", "asks a server; tests/test_serve_documented.py runs it with one"),
    (
        r"^python (run\.py --api-mode|-m internvl3_jax\.evaluate\.kits\.vlmevalkit )",
        "needs VLMEvalKit; tests/test_kits.py runs it (make test-kits)",
    ),
    (r"^python (-m )?tools[./]", "many runs of the programs; tests of their own run a few"),
)
# Commands whose files later ones of the same page make: they run at its end, with the name linked
# to what was made.
LAST = {"peft_directory": "adapter"}

ALL = [command for page in pages() for command in commands(page)]


def reason(command: Command) -> str | None:
    return next((why for pattern, why in NOT_RUN if re.search(pattern, command.text)), None)


def prepared(text: str) -> str:
    """The command as it runs here."""
    for pattern, replacement in SUBSTITUTED:
        text = re.sub(pattern, replacement, text)
    added = next(
        (
            flags
            for program, flags in ADDED.items()
            if f"{program}" in text.replace("python -m ", "python ")
        ),
        "",
    )
    return f"{text} {added}".strip()
