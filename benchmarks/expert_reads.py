"""Bytes of experts that decoding one token of one row reads, by the compilers' programs.

    python benchmarks/expert_reads.py v5p:2x2x1      needs libtpu; no TPU
    python benchmarks/expert_reads.py h100:1x1x1     needs jax's CUDA plugin and cuDNN; no GPU

The program that decodes is compiled with the widths of a mixture of experts and two layers. Every
instruction that takes a layer's stacked kernels is found in its text, and what it reads of them:
the part that a slice or a gather takes out, or all of it. Several devices share each kernel over
"tensor". results/expert_reads.json has the last answer for each size and device.
"""

import argparse
import collections
import dataclasses
import datetime
import json
import os
import pathlib
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

from internvl3_jax.config import ModelConfig, TrainConfig
from internvl3_jax.fit import hlo
from internvl3_jax.fit.advice import with_flags
from internvl3_jax.fit.compilation import compile_for
from internvl3_jax.fit.lowering import Requests, generation_params, lower_generation
from internvl3_jax.fit.topology import Topology, parse
from internvl3_jax.parallel.sharding import make_mesh

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "expert_reads.json"
REQUESTS = Requests(rows=1, prompt=4096, new=1024, tiles=1)
_SLICES = ("dynamic-slice", "slice", "gather")
_SAME = ("bitcast", "copy-done")  # instructions that read nothing


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("topology", help="as of python -m internvl3_jax.fit")
    parser.add_argument("--size", default="3.5-30b-a3b")
    parser.add_argument("--text", type=pathlib.Path, help="where to write the compiled program")
    options = parser.parse_args()
    if options.text and options.text.exists():
        parser.error(f"{options.text} exists; name another file")
    sys.path.insert(0, str(ROOT))
    from configs.sft import get_config

    config = get_config(options.size)
    language = dataclasses.replace(config.model.language, num_layers=2)
    vision = dataclasses.replace(config.model.vision, num_layers=1)
    model = dataclasses.replace(config.model, language=language, vision=vision)
    row = measure(dataclasses.replace(config, model=model), parse(options.topology), options.text)
    print(
        f"{options.size} on {options.topology}: of {row['stored']:,} bytes of experts in a layer "
        f"and device, decoding a token reads {row['read']:,} ({row['share']:.2%}; "
        f"{row['chosen']} of {row['experts']} experts are {row['chosen'] / row['experts']:.2%})"
    )
    key = {"size": options.size, "topology": options.topology}
    earlier = json.loads(RESULT.read_text()) if RESULT.exists() else []
    kept = [other for other in earlier if {name: other[name] for name in key} != key]
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    versions = {"jax": jax.__version__}
    rows = [*kept, key | row | {"date": now, "versions": versions}]
    RESULT.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def measure(config: TrainConfig, topology: Topology, text: pathlib.Path | None = None) -> dict:
    """Compiles the program and reads its text; bytes are of one layer and one device."""
    config = with_flags(config, {"mesh.fsdp": 1, "mesh.tensor": topology.count})
    mesh = make_mesh(config.mesh, topology.devices())
    program = compile_for(lower_generation(config, mesh, REQUESTS)["decode"], topology).text
    if text:
        text.write_text(program, encoding="utf-8")
    layers, kernels = config.model.language.num_layers, kernels_of(config, mesh)
    stored = sum(count * size for count, size in kernels.values())
    read = sum(bytes_read(program, shape) for shape in kernels)
    return shares(config.model, stored // layers, read // layers)


def shares(model: ModelConfig, stored: int, read: int) -> dict:
    language = model.language
    return {
        "stored": stored,
        "read": read,
        "share": read / stored,
        "chosen": language.experts_per_token,
        "experts": language.num_experts,
    }


def kernels_of(config: TrainConfig, mesh) -> dict[str, tuple[int, int]]:
    """Returns shape in the program's text -> (kernels, bytes of each) of experts on a device."""
    counts, sizes = collections.Counter(), {}
    for path, leaf in jax.tree.leaves_with_path(generation_params(config, mesh, REQUESTS)):
        if "experts" in jax.tree_util.keystr(path) and len(leaf.shape) == 3:
            shape = leaf.sharding.shard_shape(leaf.shape)
            name = {"bfloat16": "bf16", "float32": "f32"}[leaf.dtype.name]
            text = f"{name}[{','.join(map(str, shape))}]"
            counts[text] += 1
            sizes[text] = jax.ShapeDtypeStruct(shape, leaf.dtype)
    return {
        text: (count, sizes[text].size * sizes[text].dtype.itemsize)
        for text, count in counts.items()
    }


def bytes_read(text: str, shape: str) -> int:
    """Returns the bytes that one iteration of the program's loop over tokens reads of arrays of a
    shape; an inner loop counts as often as it runs.
    """
    computations, entry = hlo.parse_computations(text)
    total, pending = 0, [(entry, 1, False)]
    while pending:
        name, times, inside = pending.pop()
        for instruction in computations[name]:
            if instruction.opcode in ("while", "conditional", "call"):
                rounds = 1
                if instruction.opcode == "while" and inside:
                    rounds = hlo.iterations(instruction, computations) or 1
                pending += [
                    (called, times * rounds, inside or instruction.opcode == "while")
                    for role, called in hlo.called_by(instruction)
                    if called in computations and role != "condition"
                ]
            elif instruction.opcode == "parameter" or instruction.opcode == "get-tuple-element":
                if instruction.shape.strip().startswith(shape):
                    total += times * _reads(computations, name, instruction.name)
    return total


def _reads(computations, computation: str, name: str) -> int:
    """Returns the bytes that the users of a value in a computation read of it."""
    total = 0
    for user in computations[computation]:
        names = hlo.operands(user)
        if name not in names or user.opcode in ("tuple", "while", "conditional", "call"):
            continue
        called = dict(hlo.called_by(user)).get("calls")
        if user.opcode in _SAME:
            total += _reads(computations, computation, user.name)
        elif user.opcode in _SLICES and names[0] == name:
            total += sum(hlo.array_bytes(user.shape))
        elif called in computations:
            parameters = [x for x in computations[called] if x.opcode == "parameter"]
            numbers = {f"({index})" for index, other in enumerate(names) if other == name}
            total += sum(
                _reads(computations, called, parameter.name)
                for parameter in parameters
                if parameter.rest.partition(")")[0] + ")" in numbers
            )
        else:
            shapes = [x.shape for x in computations[computation] if x.name == name]
            total += sum(hlo.array_bytes(shapes[0]))
    return total


if __name__ == "__main__":
    main()
