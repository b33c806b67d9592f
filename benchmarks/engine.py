"""Tokens per second of the engine against fixed batches, on the same requests in the same process.

    python benchmarks/engine.py --size tiny               writes results/engine_tiny.json
    python benchmarks/engine.py --size 1b --layers 2

The requests ask for answers of mixed lengths, log-normal around 60 tokens. A fixed batch runs until
its longest answer has ended, as `Generator.generate` does; a row of the engine takes the next request
when its answer has ended. Both decode greedily, and their answers are compared. Rounds alternate.
"""

import argparse
import dataclasses
import datetime
import json
import os
import pathlib
import platform
import time

import jax
import numpy as np

from internvl3_jax.config import UNITS
from internvl3_jax.data.batch import Prompt
from internvl3_jax.inference.engine.engine import Engine
from internvl3_jax.inference.engine.request import Request
from internvl3_jax.inference.generation_config import GenerationConfig
from internvl3_jax.inference.generator import Generator
from internvl3_jax.inference.sampling import Sampling
from internvl3_jax.model.internvl import abstract_params
from internvl3_jax.positions import build_positions
from internvl3_jax.sizes import SIZES

RESULTS = pathlib.Path(__file__).resolve().parent / "results"


def make_requests(config, count: int, longest: int, images: bool) -> list[Request]:
    """Requests of 16 to 160 text tokens; every other one has an image of one tile."""
    rng = np.random.default_rng(0)
    size, per_tile = config.vision.image_size, config.tokens_per_tile
    requests = []
    for number in range(count):
        text = rng.integers(0, 400, int(rng.integers(16, 160)))
        tokens, runs, tiles = list(text), [], []
        if images and number % 2:
            runs = [(4, per_tile)]
            tokens[4:4] = [config.image_token_id] * per_tile
            tiles = [rng.integers(0, 256, (1, size, size, 3), dtype=np.uint8)]
        positions = build_positions(len(tokens), runs, [UNITS] * len(runs))
        prompt = Prompt(np.asarray(tokens, np.int32), positions, runs, tiles)
        limit = int(np.clip(rng.lognormal(np.log(60), 0.9), 4, longest))
        requests.append(Request(prompt, max_new_tokens=limit))
    return requests


def fixed_batches(generator: Generator, requests: list[Request], rows: int) -> list[list[int]]:
    answers = []
    for start in range(0, len(requests), rows):
        batch = requests[start : start + rows]
        longest = max(request.max_new_tokens for request in batch)
        run = GenerationConfig(longest, Sampling(), (0,) * len(batch), "none")
        found = generator.generate([request.prompt for request in batch], run)
        answers += [
            ids[: request.max_new_tokens] for ids, request in zip(found, batch, strict=True)
        ]
    return answers


def by_engine(engine: Engine, requests: list[Request]) -> list[list[int]]:
    tickets = [engine.submit(request) for request in requests]
    engine.run()
    engine.forget()  # no prompt is found again in the next round
    return [ticket.ids for ticket in tickets]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="tiny", choices=sorted(SIZES))
    parser.add_argument("--layers", type=int, help="decoder layers, instead of all")
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--longest", type=int, default=400, help="tokens of the longest answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no_images", action="store_true")
    parser.add_argument("--output", type=pathlib.Path)
    options = parser.parse_args()
    output = options.output or RESULTS / f"engine_{options.size}.json"
    if not is_own(output):
        parser.error(f"{output} exists and is not of this program; name another file")

    config = SIZES[options.size]
    if options.layers:
        language = dataclasses.replace(config.language, num_layers=options.layers)
        config = dataclasses.replace(config, language=language)
    rng = np.random.default_rng(1)
    params = jax.tree.map(
        lambda leaf: (0.02 * rng.standard_normal(leaf.shape)).astype(np.float32),
        abstract_params(config),
    )
    generator = Generator(config, params)
    del params
    requests = make_requests(config, options.requests, options.longest, not options.no_images)
    longest = max(len(r.prompt.tokens) + r.max_new_tokens for r in requests)
    engine = Engine(generator, rows=options.rows, max_length=longest)
    sides = {
        "fixed": lambda: fixed_batches(generator, requests, options.rows),
        "engine": lambda: by_engine(engine, requests),
    }
    answers = {name: side() for name, side in sides.items()}  # compiles
    same = sum(a == b for a, b in zip(*answers.values(), strict=True))
    tokens = sum(map(len, answers["engine"]))
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(options.rounds):
        for name, side in sides.items():
            began = time.perf_counter()
            side()
            rates[name].append(tokens / (time.perf_counter() - began))
    best = {name: max(values) for name, values in rates.items()}
    result = {
        "size": options.size,
        "layers": config.language.num_layers,
        "requests": len(requests),
        "rows": options.rows,
        "tokens": tokens,
        "equal_answers": same,
        "tokens_per_second": {name: [round(rate, 1) for rate in v] for name, v in rates.items()},
        "ratio_of_the_best": round(best["engine"] / best["fixed"], 3),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "date": datetime.date.today().isoformat(),
        "load_average": os.getloadavg(),
    }
    text = json.dumps(result, indent=1)
    print(text)
    output.write_text(text + "\n")


def is_own(path: pathlib.Path) -> bool:
    """Returns whether the file may be replaced: it does not exist, or this program wrote it."""
    if not os.path.lexists(path):
        return True
    try:
        return {"equal_answers", "ratio_of_the_best"} <= set(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return False


if __name__ == "__main__":
    main()
