"""Runs the tiny model with every annotated shape checked by jaxtyping and beartype.

Started by test_shapes.py in a process of its own: the checks are compiled into modules when they
are imported. Prints a JSON object with what each check saw.
"""

import json
import pathlib
import sys

import jaxtyping

PACKAGES = ["internvl3_jax.model", "internvl3_jax.parallel"]
PACKAGES += ["internvl3_jax.training", "internvl3_jax.inference"]
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
jaxtyping.install_import_hook(PACKAGES, "beartype.beartype")

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from internvl3_jax.config import LoraConfig, MeshConfig
from internvl3_jax.data.batch import Prompt
from internvl3_jax.inference.generation_config import GenerationConfig
from internvl3_jax.inference.generator import Generator
from internvl3_jax.inference.sampling import Sampling
from internvl3_jax.model import kv_cache, language, lora
from internvl3_jax.model.internvl import InternVL
from internvl3_jax.model.ops.attention import attention, causal_mask
from internvl3_jax.parallel.sharding import make_mesh
from internvl3_jax.positions import build_positions
from internvl3_jax.training.optimizer import make_optimizer
from internvl3_jax.training.step import init_state, make_model, make_step, shardings_of
from tests.support.tiny_checkpoint import CONFIG, random_params, train_config

jax.config.update("jax_num_cpu_devices", 8)
# Shapes do not depend on how well a program is compiled.
jax.config.update("jax_disable_most_optimizations", True)
ROWS, TOKENS, TILES = 8, 32, 4
SIZE = CONFIG.vision.image_size


def batch() -> dict[str, np.ndarray]:
    """Rows of one image of one tile and some text; the rest of the tiles is unused."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 400, (ROWS, TOKENS)).astype(np.int32)
    tokens[:, 2 : 2 + CONFIG.tokens_per_tile] = CONFIG.image_token_id
    return {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, axis=1),
        "loss_weights": np.ones((ROWS, TOKENS), np.float32),
        "segments": np.ones((ROWS, TOKENS), np.int32),
        "positions": np.tile(np.arange(TOKENS, dtype=np.int32) * 256, (ROWS, 1)),
        "tiles": rng.integers(0, 256, (ROWS, TILES, SIZE, SIZE, 3)).astype(np.uint8),
    }


def forward() -> list[int]:
    params, model = random_params(CONFIG), InternVL(CONFIG)
    return list(jax.jit(model.apply)({"params": params}, batch()).shape)


def prefill_and_decode() -> list[int]:
    """One call of several tokens and one of a single token, into the same cache."""
    params = random_params(CONFIG)
    params = params | {"language": language.unroll(params["language"], CONFIG.language)}
    model = InternVL(CONFIG, unrolled=True)

    @jax.jit
    def run(params, tokens, positions):
        cache = kv_cache.init_cache(CONFIG.language, ROWS, TOKENS)
        slots = jnp.broadcast_to(jnp.arange(TOKENS, dtype=jnp.int32), tokens.shape)
        for part in (slice(0, TOKENS - 1), slice(TOKENS - 1, TOKENS)):
            inputs = tokens[:, part], None, positions[:, part], slots[:, part], cache
            hidden, cache = model.apply({"params": params}, *inputs, method=InternVL.step)
        return model.apply({"params": params}, hidden, method=InternVL.logits)

    values = batch()
    return list(run(params, values["tokens"], values["positions"]).shape)


def generate() -> int:
    """Sampled answers of a prompt with an image, by the generator."""
    runs = [(2, CONFIG.tokens_per_tile)]
    tokens = batch()["tokens"][0, :12]
    tiles = [batch()["tiles"][0, :1]]
    prompt = Prompt(tokens, build_positions(len(tokens), runs, [64]), runs, tiles)
    sampling = Sampling(temperature=1.0, top_k=20, top_p=0.9)
    generator = Generator(CONFIG, random_params(CONFIG))
    answers = generator.generate([prompt, prompt], GenerationConfig(3, sampling, (0, 1), "none"))
    return sum(map(len, answers))


def train(**changes) -> list[str]:
    """One update on a mesh with every kind of axis, rows in zigzag order."""
    config = dataclasses.replace(train_config(), micro_batches=2, **changes)
    config = lora.freeze_base(config)
    values = batch()
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2, context=2))
    model, optimizer = make_model(config), make_optimizer(config.optimizer, config.steps)
    with jax.set_mesh(mesh):
        init = functools.partial(init_state, model, optimizer, seed=0, adapters=config.lora)
        state = jax.jit(init)(values)
        step = make_step(config, model, optimizer, 0, shardings_of(state, mesh))
        _, metrics = step(state, values, jax.random.key(0), None)
    return sorted(name for name, value in metrics.items() if name == "loss" and value > 0)


def refused() -> str:
    """What is said of keys and values of different lengths."""
    q, v = jnp.zeros((1, 4, 2, 8)), jnp.zeros((1, 5, 2, 8))
    try:
        attention(q, q, v, causal_mask((1, 4)))
    except jaxtyping.TypeCheckError as error:
        return str(error)
    return ""


CHECKS = {
    "forward": forward,
    "prefill_and_decode": prefill_and_decode,
    "generate": generate,
    "train": train,
    "train_lora": lambda: train(
        lora=LoraConfig(rank=2, targets=("language/layers/(q|v)",), dropout=0.1),
        remat_language="attention",
        attention_language="ring",
    ),
    "refused": refused,
}

if __name__ == "__main__":
    print(json.dumps({name: check() for name, check in CHECKS.items()}))
