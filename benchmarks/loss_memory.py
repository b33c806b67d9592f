"""Peak memory of the loss and its gradients, chunked against plain, as the compiler counts it:
nothing is computed or allocated.

    python benchmarks/loss_memory.py           16,384 tokens, 151,674 vocabulary entries, width 896 (the 1B model), on the CPU
    python benchmarks/loss_memory.py --tpu     also for one device of TPU v5e (16 GB) and v5p (95 GB), ahead of time; needs libtpu

The peak holds the hidden states and the head's matrix, both gradients, and all between. Both sides
take the same hidden states in bfloat16 and the same float32 matrix, and differ only in the function
called.
"""

import argparse
import datetime
import json
import os
import pathlib
import platform

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
from cpu_peer import machine

from internvl3_jax.sizes import SIZES
from internvl3_jax.training.losses import chunked_cross_entropy, cross_entropy

RESULTS = pathlib.Path(__file__).resolve().parent / "results" / "loss_memory.json"
TOKENS = 16_384
CHUNKS = (256, 1024, 4096)
TPUS = {"tpu v5e": "v5e:2x2", "tpu v5p": "v5p:2x2x1"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tpu", action="store_true", help="also ahead of time for TPU devices")
    parser.add_argument("--size", choices=SIZES, default="1b", help="of the model (1b)")
    parser.add_argument("--tokens", type=int, default=TOKENS, help=f"in the batch ({TOKENS})")
    parser.add_argument(
        "--output", type=pathlib.Path, default=RESULTS, help=f"JSON file ({RESULTS.name})"
    )
    options = parser.parse_args()
    language = SIZES[options.size].language
    devices = {"cpu": jax.devices("cpu")[0]}
    if options.tpu:
        from jax.experimental import topologies

        for name, topology in TPUS.items():
            devices[name] = topologies.get_topology_desc(
                platform="tpu", topology_name=topology
            ).devices[0]
    peaks = {name: measure(language, options.tokens, device) for name, device in devices.items()}
    report = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "settings": {
            "tokens": options.tokens,
            "vocabulary": language.vocab_size,
            "padded": language.padded_vocab_size,
            "width": language.hidden_size,
            "hidden": "bfloat16",
            "kernel": "float32",
        },
        "peak_bytes": peaks,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for name, sides in peaks.items():
        print(
            f"{name}, {options.tokens:,} tokens, {language.vocab_size:,} entries, width {language.hidden_size}"
        )
        for side, peak in sides.items():
            share = (
                f"   {sides['plain'] / peak:5.1f} times less than plain"
                if peak and sides["plain"]
                else ""
            )
            print(
                f"  {side:<20} "
                + (f"peak {peak / 2**30:7.2f} GiB{share}" if peak else "does not fit")
            )


def measure(language, tokens: int, device) -> dict[str, int | None]:
    """Returns the peak bytes of loss and gradients of each function; None where the compiler says
    that the device has less.
    """
    vocabulary, padded = language.vocab_size, language.padded_vocab_size

    def plain(hidden, kernel, targets, weights):
        logits = jnp.dot(hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)
        logits = jnp.where((jnp.arange(padded) < vocabulary)[None, None], logits, -1e30)
        return cross_entropy(logits, targets, weights)[0]

    def chunked(chunk):
        return lambda *args: chunked_cross_entropy(*args, vocabulary, chunk)[0]

    where = jax.sharding.SingleDeviceSharding(device)
    shapes = [
        ((1, tokens, language.hidden_size), jnp.bfloat16),
        ((language.hidden_size, padded), jnp.float32),
        ((1, tokens), jnp.int32),
        ((1, tokens), jnp.float32),
    ]
    args = [jax.ShapeDtypeStruct(shape, dtype, sharding=where) for shape, dtype in shapes]
    sides = {"plain": plain} | {
        f"chunks of {chunk}": chunked(chunk) for chunk in CHUNKS if chunk <= tokens
    }
    return {name: peak(side, args, device.platform) for name, side in sides.items()}


def peak(function, args, platform: str) -> int | None:
    lowered = jax.jit(jax.value_and_grad(function, argnums=(0, 1))).lower(*args)
    try:
        analysis = lowered.compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None
    if platform != "cpu":
        return analysis.peak_memory_in_bytes
    # The CPU's analysis leaves the temporaries out of the peak; they are one block beside what goes
    # in and out.
    return (
        analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        + analysis.temp_size_in_bytes
    )


if __name__ == "__main__":
    main()
