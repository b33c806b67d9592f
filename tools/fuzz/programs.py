"""Runs the programs as from a shell: each in a fresh process, in a folder with the inputs."""

import hashlib
import json
import pathlib
import runpy
import sys

import internvl3_jax
from tools.fuzz.case import digest_of
from tools.fuzz.corpus import CACHE

PROJECT = pathlib.Path(internvl3_jax.__file__).resolve().parent.parent
_cache = ""  # folder of compiled programs


def prepare(corpus: pathlib.Path) -> None:
    """Sets where the programs keep what they compile; called before the first."""
    global _cache
    _cache = str(corpus / CACHE)
    sys.path.insert(0, str(PROJECT))


def _script(name: str, *arguments: str) -> None:
    sys.argv = [name, *arguments]
    sys.path.insert(0, "")
    runpy.run_path(str(PROJECT / name), run_name="__main__")


def _module(name: str, *arguments: str) -> None:
    sys.argv = [name, *arguments]
    sys.path.insert(0, "")
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def here(name: str) -> str:
    return str(pathlib.Path(name).absolute())


def convert(arguments: tuple[str, ...], source: str = "released") -> int:
    from convert.__main__ import main

    return main([here(source), here("out"), "--to", "internvl", *arguments])


def converted(folder: pathlib.Path) -> str:
    """Returns a hash of the tensors and their description."""
    return digest_of(
        *sorted((folder / "out").glob("*.safetensors")), folder / "out/internvl3_jax.json"
    )


def load(arguments: tuple[str, ...]) -> int:
    """Opens a checkpoint as every program does."""
    import internvl3_jax

    try:
        opened = internvl3_jax.load(here("conv"))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    words = opened.tokenizer._backend._tokenizer.to_str()
    pathlib.Path("loaded").write_text(
        json.dumps([str(opened.config), str(opened.processor), words, _hash_of(opened.params)])
    )
    print("loaded")


def _hash_of(tree) -> str:
    import jax
    import numpy as np

    found = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        found.update(jax.tree_util.keystr(path).encode() + np.ascontiguousarray(leaf).tobytes())
    return found.hexdigest()


def loaded(folder: pathlib.Path) -> str:
    return (folder / "loaded").read_text()


def load_adapter(arguments: tuple[str, ...]) -> int:
    return convert(("--adapter", here("peft"), *arguments), "released")


def train(arguments: tuple[str, ...]) -> None:
    import jax

    jax.config.update("jax_compilation_cache_dir", _cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    given = any(argument.startswith("--config=") for argument in arguments)
    _script("train.py", *(() if given else ("--config=tiny.py",)), "--workdir=run", *arguments)


def trained(folder: pathlib.Path) -> str:
    """Returns the log without times, and a hash of the arrays of the last step."""
    from internvl3_jax.checkpoints import storage

    rows = [json.loads(line) for line in (folder / "run/log.jsonl").read_text().splitlines()]
    steps = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    last = (
        folder
        / "run/checkpoints"
        / str(
            max(int(path.parent.name) for path in (folder / "run/checkpoints").glob("[0-9]/params"))
        )
    )
    arrays = [
        _hash_of(storage.load_tree(last / part, storage.ocp.metadata(last / part).metadata))
        for part in ("params", "opt_state")
    ]
    return json.dumps([steps, last.name, *arrays])


def infer(arguments: tuple[str, ...]) -> None:
    mine = (
        "--checkpoint=conv",
        "--requests=ask/requests.jsonl",
        "--output=answers.jsonl",
        "--max_new_tokens=3",
    )
    _script("infer.py", *mine, f"--compilation_cache={_cache}", *arguments)


def ask(arguments: tuple[str, ...]) -> None:
    """Asks one question."""
    _script(
        "infer.py",
        f"--compilation_cache={_cache}",
        "--checkpoint=conv",
        "--prompt=hi",
        "--max_new_tokens=2",
        *arguments,
    )


def resume(arguments: tuple[str, ...]) -> None:
    infer(("--output=ask/answers.jsonl", *arguments))


def answered(folder: pathlib.Path) -> str:
    output = next(
        path for path in (folder / "answers.jsonl", folder / "ask/answers.jsonl") if path.exists()
    )
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8-sig").splitlines()]
    return json.dumps(
        [[row["id"], row.get("text"), row.get("token_ids"), row.get("error")] for row in rows]
    )


def doctor(arguments: tuple[str, ...]) -> int:
    from internvl3_jax.data.doctor.command import main

    limits = ("--tokens_per_row", "256", "--tiles_per_row", "16", "--max_frames", "8")
    return main(
        ["data/meta.json", "--tokenizer", "conv", *limits, "--report", "report", *arguments]
    )


def examined(folder: pathlib.Path) -> str:
    report = json.loads((folder / "report/report.json").read_text())
    return json.dumps([report["errors"], report["sources"]])


def open_images(arguments: tuple[str, ...]) -> int:
    """Cuts images into tiles as inference does, and prints a summary of each."""
    from internvl3_jax.data.media.images import open_image
    from internvl3_jax.data.media.tiles import cut_tiles
    from tests.support.tiny_checkpoint import PROCESSOR

    good = pathlib.Path(_cache).parent / "images"
    for name in sorted(f"images/{path.name}" for path in good.iterdir()):
        try:
            tiles = cut_tiles(open_image(name), PROCESSOR)
        except (ValueError, OSError) as error:
            sys.exit(f"error: {error}")
        print(tiles.shape, hashlib.sha256(tiles.tobytes()).hexdigest()[:12])
    return 0


def printed(folder: pathlib.Path) -> str:
    return (folder / ".out").read_text()


def make_pairs(arguments: tuple[str, ...]) -> None:
    few = ("--samples=2", "--max_new_tokens=8", "--batch_size=2")
    _module(
        "internvl3_jax.reward.make_pairs",
        "--checkpoint=conv",
        "--questions=questions/questions.jsonl",
        "--output=made.jsonl",
        *few,
        *arguments,
    )


def make_reference(arguments: tuple[str, ...]) -> None:
    _module(
        "internvl3_jax.training.make_reference",
        "--config=pairs.py",
        "--config.data.ref_logps_file=",
        "--output=pairs/reference.jsonl",
        *arguments,
    )


def train_on_pairs(arguments: tuple[str, ...]) -> None:
    train(("--config=pairs.py", *arguments))
