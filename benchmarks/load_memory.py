"""Peak memory of a process that loads the 1B shape on a CPU and samples one token, next to
transformers on the same weights.

    python benchmarks/load_memory.py             writes benchmarks/results/load_memory.json
    python benchmarks/load_memory.py --layers 2  a model of two layers: does it still run?

Random weights in float32, from the safetensors of transformers' layout and from a checkpoint that
is converted from them. Each case is a process of its own. "kept" leaves the parameters in the
checkpoint, too, so that the layers are in memory twice; the programs donate them. The memory is the
largest that was resident, pages of mapped files included: transformers maps the file, so that it
reads every weight once before its token. Needs PyTorch, transformers, and 8 GB of disk.
"""

import argparse
import datetime
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
from convert_1b import machine
from cpu_peer_sides import Settings, peak_bytes, reset_peak

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "load_memory.json"
TOKENS = 16  # of the prompt
VOCABULARY = 151674
CASES = {  # name -> (side, directory)
    "transformers, safetensors": ("torch", "released"),
    "safetensors": ("donate", "released"),
    "safetensors, kept": ("keep", "released"),
    "checkpoint": ("donate", "converted"),
    "checkpoint, kept": ("keep", "converted"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, help="of tower and decoder; nothing is written")
    parser.add_argument("--directory", help="where the temporary checkpoints go")
    parser.add_argument("--role", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role:
        side, directory = options.role
        measure = measure_torch if side == "torch" else measure_jax
        print(json.dumps(measure(directory, side == "donate")))
        return
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        released = write_weights(pathlib.Path(folder) / "released", options.layers)
        child("-m", "convert", str(released), str(released.parent / "converted"))
        cases = {}
        for name, (side, directory) in CASES.items():
            out = child(__file__, "--role", side, str(released.parent / directory))
            cases[name] = json.loads(out.splitlines()[-1])
            print(f"{name:<26}", *(f"{key} {size:.2f}" for key, size in cases[name].items()))
    if options.layers is None:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        report = {"date": now, "machine": machine(), "unit": "GiB", "cases": cases}
        RESULT.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def write_weights(directory: pathlib.Path, layers: int | None) -> pathlib.Path:
    """Writes a released model of random weights by cpu_peer_sides.py."""
    directory.mkdir()
    settings = vars(Settings(layers, VOCABULARY, 1, 1, 1, os.cpu_count()))
    (directory / "settings.json").write_text(json.dumps(settings))
    child(str(ROOT / "benchmarks" / "cpu_peer_sides.py"), "weights", str(directory))
    return directory


def child(*arguments: str) -> str:
    """Runs Python and returns what it prints."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])
    environment = {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "PYTHONPATH": paths}
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, env=os.environ | environment, check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def peak() -> float:
    return peak_bytes() / 2**30


def measure_jax(directory: str, donate: bool) -> dict[str, float]:
    import jax

    from internvl3_jax import load
    from internvl3_jax.config import UNITS
    from internvl3_jax.data.batch import Prompt
    from internvl3_jax.inference.generation_config import GenerationConfig
    from internvl3_jax.inference.generator import Generator
    from internvl3_jax.inference.sampling import Sampling

    reset_peak()  # a child begins with its parent's
    found = {"before": peak()}
    checkpoint = load(directory, dtype="float32")
    config = checkpoint.config
    sizes = [leaf.nbytes / 2**30 for leaf in jax.tree.leaves(checkpoint.params)]
    found |= {"weights": sum(sizes), "largest leaf": max(sizes), "load": peak()}
    generator = Generator(config, checkpoint.take_params(donate), donate=donate)
    found["layers apart"] = peak()
    ids = np.arange(TOKENS, dtype=np.int32)
    prompt = Prompt(ids, ids * UNITS, [], [])
    run = GenerationConfig(1, Sampling(), (0,), config.language.rope_scaling)
    generator.generate([prompt], run)
    return found | {"one token": peak()}


def measure_torch(directory: str, _: bool) -> dict[str, float]:
    import torch
    import transformers

    reset_peak()
    found = {"before": peak()}
    model = transformers.InternVLForConditionalGeneration.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    found["load"] = peak()
    with torch.inference_mode():
        for parameter in model.parameters():
            parameter.sum().item()
        model(input_ids=torch.arange(TOKENS)[None], logits_to_keep=1).logits.argmax().item()
    return found | {"one token": peak()}


if __name__ == "__main__":
    main()
