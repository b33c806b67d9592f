"""Makes engines of the tiny model, and counts what is compiled."""

import dataclasses
import functools

import jax
import numpy as np

from internvl3_jax.checkpoints.adapters import Adapter
from internvl3_jax.config import UNITS, LoraConfig
from internvl3_jax.inference.engine.engine import Engine
from internvl3_jax.inference.generator import Generator
from internvl3_jax.model import lora
from tests.support.generation import PARAMS, RAGGED, generator, make_run
from tests.support.tiny_checkpoint import CONFIG

LENGTH = 256


COMPILED: list[str] = []  # an entry for every program that is compiled


def _note(event: str, _: float, **details) -> None:
    if "backend_compile" in event:
        COMPILED.append(event)


jax.monitoring.register_event_duration_secs_listener(_note)


@functools.cache
def shared_engine() -> Engine:
    engine = Engine(adapted_generator(), rows=3, max_length=LENGTH)
    engine.warm_up()
    return engine


@functools.cache
def adapted_generator() -> Generator:
    """Adapter "a" is of rank 2 for attention, "b" of rank 3 for the MLPs, tower and projector; "nan"
    gives no numbers.
    """
    adapters = {
        "a": make_adapter(2, "language/layers/(q|v|o)", seed=1),
        "b": make_adapter(3, "(language|vision)/layers/(gate|down|fc1)|projector/fc1", seed=2),
        "nan": make_adapter(1, "language/layers/k", seed=3, value=np.nan),
    }
    return Generator(CONFIG, PARAMS, named_adapters=adapters)


def make_adapter(rank: int, pattern: str, seed: int, value: float = 0.3) -> Adapter:
    config = LoraConfig(rank=rank, targets=(pattern,))
    tree, rng = lora.init(PARAMS, config, jax.random.key(seed)), np.random.default_rng(seed)
    random = jax.tree.map(
        lambda leaf: (value * rng.standard_normal(leaf.shape)).astype(np.float32), tree
    )
    return Adapter(random)


def ask(engine, *requests):
    """The tickets of requests, after all have ended."""
    tickets = [engine.submit(request) for request in requests]
    engine.run()
    return tickets


@functools.cache
def alone(index: int, limit: int, seed: int = 0, **sampling) -> list[int]:
    """The answer to one of RAGGED by the generator, in a batch of one row."""
    run = make_run(1, limit, seeds=(seed,), **sampling)
    return generator().generate([RAGGED[index]], run)[0]


def forget(engine) -> None:
    """Makes the rows' contents unusable for later prompts."""
    for row in engine._scheduler.rows:
        row.content = None


def continued(prompt, ids, more):
    """The prompt with an answer and further text after it."""
    added = [*ids, *more]
    steps = UNITS * np.arange(1, len(added) + 1, dtype=np.int32)
    return dataclasses.replace(
        prompt,
        tokens=np.concatenate([prompt.tokens, np.asarray(added, np.int32)]),
        positions=np.concatenate([prompt.positions, prompt.positions[-1] + steps]),
    )


class OneAfterAnother:
    """Allows exactly one id at each place."""

    def __init__(self, ids, vocabulary=CONFIG.language.vocab_size):
        self.ids, self.accepted, self.vocabulary = list(ids), [], vocabulary

    def allowed(self):
        allowed = np.zeros(self.vocabulary, bool)
        allowed[self.ids[len(self.accepted)]] = True
        return allowed

    def accept(self, token):
        self.accepted.append(token)
