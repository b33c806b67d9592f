"""One training step: seconds, tokens a second, MFU, peak memory and where the time goes; with
--peer PyTorch's step beside it.

    python benchmarks/train_step.py --size tiny                                  all of the digits model
    python benchmarks/train_step.py --size 1b --layers 2 --tokens 512 --peer     two layers of the 1B model, against transformers
    python benchmarks/train_step.py --smoke                                      does it still run?

Float32, AdamW with clipping, every parameter trained, random weights; half of the text tokens carry
a loss. Ours makes the logits of whole chunks of such tokens: with chunks far longer than there are,
time is spent on nothing. Each side runs in turn in a process of its own, held to the same cores.
PyTorch's step is transformers' InternVL with sdpa attention on the same shapes and number of
weights, its own loss (which makes the logits of every position), clip_grad_norm_ and
torch.optim.AdamW.
"""

import argparse
import dataclasses
import datetime
import functools
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time

import numpy as np
from cpu_peer import machine
from cpu_peer_sides import peak_bytes, reset_peak

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PARTS = (
    "vision forward",
    "vision backward",
    "decoder forward",
    "decoder backward",
    "loss and its gradient",
    "optimizer",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=("tiny", "1b", "2b"), default="tiny")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=512, help="a row, visual ones included (512)")
    parser.add_argument("--tiles", type=int, default=1, help="a row (1)")
    parser.add_argument(
        "--layers", type=int, help="of the tower and of the decoder, in place of the size's own"
    )
    parser.add_argument(
        "--remat", default="none", help="policy for tower and decoder; see ops/remat.py (none)"
    )
    parser.add_argument(
        "--chunk",
        type=int,
        default=256,
        help="loss_chunk: tokens whose logits are made at a time (256)",
    )
    parser.add_argument("--repeats", type=int, default=5, help="timed steps in a round (5)")
    parser.add_argument("--rounds", type=int, default=3, help="how often each side runs (3)")
    parser.add_argument("--threads", type=int, default=2, help="cores for either side (2)")
    parser.add_argument("--peer", action="store_true", help="also PyTorch's step")
    parser.add_argument("--smoke", action="store_true", help="one short round of the tiny size")
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        help="JSON file (results/train_step_SIZE.json; with --smoke none)",
    )
    parser.add_argument("--role", choices=("jax", "torch"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.smoke:
        (
            options.size,
            options.rows,
            options.tokens,
            options.layers,
            options.repeats,
            options.rounds,
        ) = "tiny", 2, 64, 1, 2, 1
    if options.role:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
        print(json.dumps({"jax": measure_jax, "torch": measure_torch}[options.role](options)))
        return
    report = run(options)
    show(report)
    output = options.output or (
        None if options.smoke else RESULTS / f"train_step_{options.size}.json"
    )
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


# --- both sides ----------------------------------------------------------------------------------


def model_config(options):
    from internvl3_jax.sizes import SIZES

    config = SIZES[options.size]
    if not options.layers:
        return config
    parts = {
        name: dataclasses.replace(getattr(config, name), num_layers=options.layers)
        for name in ("vision", "language")
    }
    return dataclasses.replace(config, **parts)


def make_batch(config, options) -> dict:
    """A `Batch`: in each row a picture of all its tiles, then text, every other token of which is
    trained.
    """
    rng = np.random.default_rng(0)
    rows, visual, size = (
        options.rows,
        options.tiles * config.tokens_per_tile,
        config.vision.image_size,
    )
    if options.tokens < visual + 8:
        sys.exit(
            f"{options.tokens} tokens do not hold {options.tiles} tiles of {config.tokens_per_tile} and some text"
        )
    tokens = rng.integers(0, config.image_token_id, (rows, options.tokens), dtype=np.int32)
    tokens[:, 2 : 2 + visual] = config.image_token_id
    weights = np.zeros(tokens.shape, np.float32)
    weights[:, 2 + visual : -1 : 2] = 1.0
    return {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, axis=1),
        "loss_weights": weights,
        "segments": np.ones_like(tokens),
        "positions": np.broadcast_to(
            256 * np.arange(options.tokens, dtype=np.int32), tokens.shape
        ).copy(),
        "tiles": rng.integers(0, 256, (rows, options.tiles, size, size, 3), dtype=np.uint8),
    }


def timed(function, repeats: int) -> list[float]:
    """Seconds of each call, after one that is not timed."""
    function()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - began)
    return seconds


# --- ours ----------------------------------------------------------------------------------------


def measure_jax(options) -> dict:
    import jax

    from internvl3_jax.config import OptimizerConfig
    from internvl3_jax.model.internvl import InternVL
    from internvl3_jax.training.flops import batch_counts, train_flops
    from internvl3_jax.training.objective import SftLoss
    from internvl3_jax.training.optimizer import make_optimizer
    from internvl3_jax.training.step import init_state, train_step

    config = model_config(options)
    layers = max(config.vision.num_layers, config.language.num_layers)
    unroll = layers if jax.default_backend() == "cpu" else 1  # a loop's body runs on one core there
    model = InternVL(
        config, scan_unroll=unroll, remat_vision=options.remat, remat_language=options.remat
    )
    batch, optimizer = (
        make_batch(config, options),
        make_optimizer(OptimizerConfig(warmup_steps=0), 1000),
    )
    state = jax.jit(functools.partial(init_state, model, optimizer, batch, 0))()
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    began = time.perf_counter()
    step = jax.jit(
        functools.partial(train_step, SftLoss(model, options.chunk), optimizer), donate_argnums=0
    )
    step = step.lower(state, batch, jax.random.key(0)).compile()
    compile_seconds = time.perf_counter() - began
    reset_peak()

    def one():
        nonlocal state
        state, metrics = step(state, batch, jax.random.key(0))
        jax.block_until_ready((state, metrics))

    seconds, peak = timed(one, options.repeats), peak_bytes()
    return {
        "seconds": seconds,
        "peak_bytes": peak,
        "compile_seconds": compile_seconds,
        "parameters": parameters,
        "flops": train_flops(config, batch_counts(batch, config)),
        "matmul_flops_per_second": matmul_speed(),
        "parts": time_parts(model, optimizer, state, batch, options),
        "versions": {"jax": jax.__version__},
    }


def matmul_speed(size: int = 2048) -> float:
    """FLOP/s of a square float32 product, the best of five: the peak that MFU refers to."""
    import jax

    x = jax.random.normal(jax.random.key(0), (size, size))
    product = jax.jit(lambda x: x @ x)
    return 2 * size**3 / min(timed(lambda: product(x).block_until_ready(), 5))


def time_parts(model, optimizer, state, batch, options) -> dict[str, float]:
    """Median seconds of each part compiled by itself; a backward pass is a forward and backward one
    less a forward one.
    """
    import jax
    import jax.numpy as jnp

    from internvl3_jax.training.losses import chunked_cross_entropy

    params, config, chunk = state.params, model.config.language, options.chunk
    tiles = batch["tiles"].reshape(-1, *batch["tiles"].shape[2:])
    hidden = jax.random.normal(jax.random.key(1), (*batch["tokens"].shape, config.hidden_size))

    def encode(params):
        return model.apply({"params": params}, tiles, method=lambda model, x: model.encode(x)).sum()

    def decode(language, hidden):
        variables = {"params": params | {"language": language}}
        run = functools.partial(
            model.apply, variables, method=lambda model, *args: model.language(*args)[0]
        )
        return run(hidden, batch["positions"], batch["segments"]).sum()

    def loss(hidden, kernel):
        return chunked_cross_entropy(
            hidden, kernel, batch["targets"], batch["loss_weights"], config.vocab_size, chunk
        )[0]

    def seconds(function, *args):
        compiled = jax.jit(function)
        return statistics.median(
            timed(lambda: jax.block_until_ready(compiled(*args)), options.repeats)
        )

    vision, language = {name: params[name] for name in ("vision", "projector")}, params["language"]
    kernel = language["embedding"].T if config.tie_embeddings else language["head"]["kernel"]
    towers = seconds(encode, vision), seconds(jax.grad(encode), vision)
    decoders = (
        seconds(decode, language, hidden),
        seconds(jax.grad(decode, (0, 1)), language, hidden),
    )
    losses = seconds(jax.value_and_grad(loss, (0, 1)), hidden, kernel)
    updates = seconds(
        optimizer.update, jax.tree.map(jnp.ones_like, params), state.opt_state, params
    )
    values = (
        towers[0],
        towers[1] - towers[0],
        decoders[0],
        decoders[1] - decoders[0],
        losses,
        updates,
    )
    return dict(zip(PARTS, values, strict=True))


# --- PyTorch's -----------------------------------------------------------------------------------


def measure_torch(options) -> dict:
    import torch
    import transformers

    from convert.config_json import to_hf

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    config = model_config(options)
    settings = transformers.InternVLConfig.from_dict(to_hf(config, None, "hf", "float32"))
    settings._attn_implementation = "sdpa"
    model = transformers.InternVLForConditionalGeneration(settings).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-5, weight_decay=0.05)
    batch = make_batch(config, options)
    tokens = torch.from_numpy(batch["tokens"].astype(np.int64))
    tokens[tokens == config.image_token_id] = settings.image_token_id
    # transformers moves the labels itself: the label of a token is the token.
    trained = np.roll(batch["loss_weights"] > 0, 1, axis=1)
    labels = torch.where(torch.from_numpy(trained), tokens, -100)
    mean, std = np.float32(config.vision.mean), np.float32(config.vision.std)
    pixels = (
        batch["tiles"].reshape(-1, *batch["tiles"].shape[2:]).astype(np.float32) / 255 - mean
    ) / std
    inputs = {
        "input_ids": tokens,
        "pixel_values": torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(),
    }

    def step():
        loss = model(
            **inputs, attention_mask=torch.ones_like(tokens), labels=labels, use_cache=False
        ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    reset_peak()
    seconds = timed(step, options.repeats)
    return {
        "seconds": seconds,
        "peak_bytes": peak_bytes(),
        "parameters": sum(tensor.numel() for tensor in model.parameters()),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


# --- the report ----------------------------------------------------------------------------------


def run(options) -> dict:
    rounds = {side: [] for side in (("jax", "torch") if options.peer else ("jax",))}
    for number in range(options.rounds):
        for side, results in rounds.items():
            print(f"round {number + 1} of {options.rounds}: {side}", file=sys.stderr, flush=True)
            results.append({"load_average": os.getloadavg()[0]} | start(side))
    best = {
        side: min(min(result["seconds"]) for result in results) for side, results in rounds.items()
    }
    first = rounds["jax"][0]
    speed = max(result["matmul_flops_per_second"] for result in rounds["jax"])
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": {"python": platform.python_version()}
        | functools.reduce(dict.__or__, (r[0]["versions"] for r in rounds.values())),
        "settings": {
            name: value for name, value in vars(options).items() if name not in ("output", "role")
        },
        "seconds": best,
        "median_seconds": {
            side: statistics.median(s for r in results for s in r["seconds"])
            for side, results in rounds.items()
        },
        "tokens_per_second": {
            side: options.rows * options.tokens / seconds for side, seconds in best.items()
        },
        "mfu": {side: first["flops"] / seconds / speed for side, seconds in best.items()},
        "matmul_gflops_per_second": speed / 1e9,
        "peak_gib": {
            side: max(result["peak_bytes"] for result in results) / 2**30
            for side, results in rounds.items()
        },
        "parts_seconds": {
            part: min(result["parts"][part] for result in rounds["jax"]) for part in PARTS
        },
        "rounds": rounds,
    }


def start(side: str) -> dict:
    """Runs one side in a process of its own; returns what it prints last."""
    environment = {"JAX_PLATFORMS": "cpu"} | os.environ | {"HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
    )
    command = [sys.executable, __file__, *sys.argv[1:], "--role", side]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"the {side} process failed with status {done.returncode}:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def show(report: dict) -> None:
    for side, seconds in report["seconds"].items():
        median, rate = report["median_seconds"][side], report["tokens_per_second"][side]
        print(
            f"{side:<6} step {1000 * seconds:8.1f} ms (median {1000 * median:.1f})  {rate:8.0f} tokens/s  "
            f"MFU {100 * report['mfu'][side]:5.1f} %  peak {report['peak_gib'][side]:.2f} GiB"
        )
    print(
        f"MFU is against {report['matmul_gflops_per_second']:.0f} GFLOP/s of a float32 product on this machine"
    )
    for part, seconds in report["parts_seconds"].items():
        print(f"  {part:<24} {1000 * seconds:8.1f} ms")
    if "torch" in report["seconds"]:
        print(f"torch / jax: {report['seconds']['torch'] / report['seconds']['jax']:.2f}")


if __name__ == "__main__":
    main()
