"""Converts a made-up mixture of experts both ways and prints how much memory each way took.

    python -m tests.support.convert_memory FOLDER

Run as a process of its own, whose peak memory is that of the conversions. Prints a line of JSON:
bytes of the largest leaf, of one layer of it, of a safetensors file, and the growth of the resident
memory during each conversion.
"""

import dataclasses
import json
import pathlib
import sys

import ml_dtypes
import numpy as np

from benchmarks.cpu_peer_sides import peak_bytes, reset_peak
from convert.config_json import to_hf
from convert.run import planned
from examples.tiny_digits.recipe import tokenizer as tiny_tokenizer
from internvl3_jax.checkpoints import storage
from internvl3_jax.checkpoints.hf.assemble import padded_shape
from internvl3_jax.checkpoints.hf.mapping import active_rows
from internvl3_jax.checkpoints.hf.safetensors import SafetensorsWriter
from internvl3_jax.config import ModelConfig
from tests.support.released import convert, reduce, reduce_processor

SHARD = 16 << 20
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def model(layers: int) -> ModelConfig:
    """Returns a model whose experts are nearly all of its parameters: 8 MiB a kernel and layer."""
    small = reduce("3.5-30b-a3b")
    language = dataclasses.replace(
        small.language, num_layers=layers, hidden_size=512, num_experts=8, expert_size=1024
    )
    return dataclasses.replace(small, language=language)


def write(directory: pathlib.Path, config: ModelConfig) -> pathlib.Path:
    """Writes random weights in the original layout, tensor by tensor."""
    directory.mkdir()
    for name, content in tiny_tokenizer.build().items():
        (directory / name).write_bytes(content)
    text = json.dumps(to_hf(config, reduce_processor(config), "internvl", "bfloat16"))
    (directory / "config.json").write_text(text)
    tensors = planned(config, "internvl")
    writer = SafetensorsWriter(directory, tensors, BFLOAT16, SHARD)
    rng = np.random.default_rng(0)
    for name, shape in tensors:
        # Random bits of finite values.
        bits = rng.integers(0x3F80, 0x3FFF, shape, np.uint16)
        writer.write(name, bits.view(BFLOAT16))
    writer.close()
    return directory


def both_ways(folder: pathlib.Path, config: ModelConfig) -> dict[str, int]:
    """Returns the growth of the peak memory while importing and exporting, in bytes."""
    grown = {}
    released = write(folder / "released", config)
    for name, source, to in (("import", released, None), ("export", folder / "import", "hf")):
        reset_peak()
        before = peak_bytes()
        convert(source, folder / name, to=to, shard_size=SHARD)
        grown[name] = peak_bytes() - before
    return grown


def main() -> None:
    folder = pathlib.Path(sys.argv[1])
    storage.BY_LAYER = 4 << 20  # as if the model were large
    for name in ("small", "large"):
        (folder / name).mkdir()
    both_ways(folder / "small", model(2))  # what the first conversion loads stays in memory
    config = model(16)
    shapes = [padded_shape(row, config) for row in active_rows(config)]
    leaf = max(shapes, key=np.prod)
    sizes = {"leaf": int(2 * np.prod(leaf)), "layer": int(2 * np.prod(leaf[1:])), "shard": SHARD}
    print(json.dumps(sizes | both_ways(folder / "large", config)))


if __name__ == "__main__":
    main()
