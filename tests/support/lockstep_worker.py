"""One host of tests/test_engine_hosts.py: an engine of the tiny model, sharded over all hosts.

The first one prints its answers as JSON.
"""

import json
import os
import sys
import threading
import time

import jax
import numpy as np

from internvl3_jax.config import MeshConfig
from internvl3_jax.inference.engine.lockstep import LockstepEngine
from internvl3_jax.inference.engine.request import Request, RowSampling
from internvl3_jax.inference.generator import Generator
from internvl3_jax.parallel import multihost
from internvl3_jax.parallel.sharding import make_mesh, param_shardings

CONSTRAINED = [3, 1, 4, 1, 5, 9]


# The tests' modules compute when they are imported, which may be only after `initialize`.


def make_engine(kind: str) -> LockstepEngine:
    """kind: "plain", or "flash" for a model with a router."""
    from tests.support.generation import PARAMS
    from tests.support.tiny_checkpoint import CONFIG, FLASH, random_params

    config, whole = (FLASH, random_params(FLASH)) if kind == "flash" else (CONFIG, PARAMS)
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices())
    shardings = param_shardings(whole, mesh)
    params = jax.tree.map(
        lambda leaf, sharding: jax.make_array_from_callback(
            leaf.shape, sharding, lambda index, leaf=leaf: np.asarray(leaf)[index]
        ),
        whole,
        shardings,
    )
    return LockstepEngine(Generator(config, params), rows=3, max_length=256, max_queue=16)


def ask(engine: LockstepEngine) -> list[dict]:
    """Requests from another thread, some while others run; one is cancelled, one fails."""
    from tests.support.engine import OneAfterAnother
    from tests.support.generation import RAGGED

    tickets = []

    def submit():
        for number, prompt in enumerate(RAGGED):
            tickets.append(engine.submit(Request(prompt, max_new_tokens=12)))
            time.sleep(0.05 * number)
        sampled = RowSampling(temperature=1.0, seed=4)
        tickets.append(engine.submit(Request(RAGGED[1], sampled, max_new_tokens=12)))
        for limit in (6, 8):  # the second has no token left for its end
            constraint = OneAfterAnother(CONSTRAINED)
            tickets.append(
                engine.submit(Request(RAGGED[2], max_new_tokens=limit, constraint=constraint))
            )
        cancelled = engine.submit(Request(RAGGED[3], max_new_tokens=200))
        engine.cancel(cancelled)
        tickets.append(cancelled)

    def fail(piece):
        raise OSError("the client has left")

    thread = threading.Thread(target=submit)
    thread.start()
    while thread.is_alive() or engine.wait(0):
        if engine.wait(0.1):
            engine.step()
    left = engine.submit(Request(RAGGED[0], max_new_tokens=200), fail)
    while engine.wait(0):
        engine.step()
    return [{"ids": ticket.ids, "finish": ticket.finish} for ticket in [*tickets, left]]


def ask_flash(engine: LockstepEngine) -> list[dict]:
    """Prompts with tiles that the router decides about."""
    from tests.support.generation import RAGGED

    tickets = [engine.submit(Request(prompt, max_new_tokens=12)) for prompt in RAGGED]
    while engine.wait(0):
        engine.step()
    return [{"ids": ticket.ids, "tokens": len(ticket.request.prompt.tokens)} for ticket in tickets]


def main() -> None:
    address, number, kind = sys.argv[1:]
    multihost.initialize(address, 2, int(number))
    with multihost.abort_together():
        engine = make_engine(kind)
        if jax.process_index():
            engine.follow()
            print(json.dumps({"finished": engine.stats.finished}))
        else:
            answers = (ask_flash if kind == "flash" else ask)(engine)
            engine.close()
            print(json.dumps({"answers": answers, "finished": engine.stats.finished}))


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    main()
