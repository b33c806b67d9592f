"""The two sides of train_step.py: one training step in JAX and in PyTorch."""

import dataclasses
import functools
import statistics
import sys
import time

import numpy as np
from cpu_peer_sides import peak_bytes, reset_peak

PARTS = (
    "vision forward",
    "vision backward",
    "decoder forward",
    "decoder backward",
    "loss and its gradient",
    "optimizer",
)


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
    """Returns a `Batch`: in each row an image of all its tiles, then text, every other token of
    which is trained.
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


def steps_in_turn(step) -> dict[str, list[float]]:
    """Returns wall and CPU seconds of the steps that the parent asks for; one before is not timed.

    The protocol: a line {} when the side is ready and after every step; "step" or "end" from the
    parent.
    """
    step()
    times = {"seconds": [], "cpu_seconds": []}
    print("{}", flush=True)
    while sys.stdin.readline().strip() == "step":
        began = time.perf_counter(), time.process_time()
        step()
        times["seconds"].append(time.perf_counter() - began[0])
        times["cpu_seconds"].append(time.process_time() - began[1])
        print("{}", flush=True)
    return times


# --- ours ----------------------------------------------------------------------------------------


def measure_jax(options) -> dict:
    import jax

    from internvl3_jax.config import OptimizerConfig
    from internvl3_jax.model.internvl import InternVL
    from internvl3_jax.parallel.host_memory import keep_freed_memory
    from internvl3_jax.training.flops import batch_counts, train_flops
    from internvl3_jax.training.objective import SftLoss
    from internvl3_jax.training.optimizer import make_optimizer
    from internvl3_jax.training.step import init_state, train_step

    keep_freed_memory()  # as train.py
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

    times, peak = steps_in_turn(one), peak_bytes()
    return times | {
        "peak_bytes": peak,
        "compile_seconds": compile_seconds,
        "parameters": parameters,
        "flops": train_flops(config, batch_counts(batch, config)),
        "matmul_flops_per_second": matmul_speed(),
        "parts": time_parts(model, optimizer, state, batch, options),
        "versions": {"jax": jax.__version__},
    }


def matmul_speed(size: int = 2048) -> float:
    """Returns the FLOP/s of a square float32 product, the best of five: the peak that MFU refers
    to.
    """
    import jax

    x = jax.random.normal(jax.random.key(0), (size, size))
    product = jax.jit(lambda x: x @ x)
    return 2 * size**3 / min(timed(lambda: product(x).block_until_ready(), 5))


def time_parts(model, optimizer, state, batch, options) -> dict[str, float]:
    """Returns the median seconds of each part compiled by itself; a backward pass is a forward and
    backward one less a forward one.
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
    times = steps_in_turn(step)
    return times | {
        "peak_bytes": peak_bytes(),
        "parameters": sum(tensor.numel() for tensor in model.parameters()),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
