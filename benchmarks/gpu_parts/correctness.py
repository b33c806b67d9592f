"""Checks that the card computes the same: attention and rope against float64, and the digits
model's answers against those of a CPU.

Each case's line has "ok". tests/test_gpu.py runs the same cases.
"""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

MODEL = pathlib.Path(__file__).resolve().parents[2] / "examples" / "tiny_digits"
ANSWERS = MODEL / "cpu_answers.json"

# Largest relative error, by the norm, of outputs and gradients.
TOLERANCE = {"bfloat16": 2e-2, "float32": 2e-5}


def cases(size: str, smoke: bool) -> dict:
    kernel = "cudnn" if jax.default_backend() == "gpu" else "xla_per_head"
    # The cheap ones first: the products of the plain attention take long to tune.
    result = {"rope at 256k": functools.partial(rope_error, smoke)}
    for dtype in ("float32", "bfloat16"):
        result[f"digits {dtype}"] = functools.partial(digits, dtype, 2 if smoke else None)
    for shape in attention_shapes(smoke):
        names = ["auto", "xla", "flash"] + ([kernel] if shape != "decode" else [])
        runs = [(name, "bfloat16") for name in names]
        if shape in ("prefill into cache", "packed 1b"):
            runs += [(name, "float32") for name in names if name != "cudnn"]
        for name, dtype in runs:
            call = functools.partial(attention_error, shape, name, dtype, smoke)
            result[f"attention {shape} {name} {dtype}"] = call
    return result


def attention_shapes(smoke: bool) -> dict[str, tuple]:
    """Returns rows, queries, keys, heads, key heads, width and kind of mask by name."""
    length, tower = (64, 65) if smoke else (1024, 1025)
    rows, slots = (2, 96) if smoke else (8, 5120)
    shapes = {
        "tower": (2, tower, tower, 16, 16, 64, None),
        "prefill 1b": (1, length, length, 14, 2, 64, "causal"),
        "prefill 8b": (1, length, length, 28, 4, 128, "causal"),
        "prefill into cache": (2, length, length + length // 4, 14, 2, 64, "cache"),
        "packed 1b": (1, length, length, 14, 2, 64, "packed"),
        "packed 2b": (1, length, length, 12, 2, 128, "packed"),
        "decode": (rows, 1, slots, 14, 2, 64, "cache"),
    }
    if smoke:  # the others run the same lines
        return {name: shapes[name] for name in ("tower", "packed 1b", "decode")}
    return shapes


def attention_error(shape: str, implementation: str, dtype: str, smoke: bool) -> dict:
    """Returns relative errors of the output and of all gradients against float64."""
    from internvl3_jax.model.ops.attention import attention

    inputs, mask, real, expected = _problem(shape, dtype, smoke)

    @jax.jit
    def run(q, k, v, gradient):
        out, pull = jax.vjp(lambda *x: attention(*x, mask, implementation), q, k, v)
        return out, *pull(gradient)

    with jax.default_matmul_precision("highest"):
        actual = [np.asarray(x, np.float64) for x in run(*inputs)]
    actual[0] = np.where(real[..., None, None], actual[0], 0)
    errors = [
        float(np.linalg.norm(a - e) / np.linalg.norm(e))
        for a, e in zip(actual, expected, strict=True)
    ]
    return {
        "forward_error": errors[0],
        "gradient_error": max(errors[1:]),
        "tolerance": TOLERANCE[dtype],
        "ok": all(error < TOLERANCE[dtype] for error in errors),  # false for NaN too
    }


@functools.lru_cache(maxsize=2)
def _problem(shape: str, dtype: str, smoke: bool):
    """Returns (q, k, v, gradient), the mask, which queries are no padding, and what is right."""
    rows, queries, keys, heads, kv_heads, width, kind = attention_shapes(smoke)[shape]
    rng = np.random.default_rng(0)
    sizes = [(queries, heads), (keys, kv_heads), (keys, kv_heads), (queries, heads)]
    q, k, v, gradient = (
        jnp.asarray(rng.normal(size=(rows, *size, width)), jnp.dtype(dtype)) for size in sizes
    )
    mask, real = _mask(kind, rows, queries, keys)
    gradient = jnp.where(real[..., None, None], gradient, 0)
    visible = None if mask is None else np.asarray(mask.dense())
    expected = _attention_float64(q, k, v, gradient, visible)
    expected[0] = np.where(real[..., None, None], expected[0], 0)
    return (q, k, v, gradient), mask, real, expected


def _mask(kind: str | None, rows: int, queries: int, keys: int):
    """Returns a mask and which queries are no padding."""
    from internvl3_jax.model.ops.attention import cache_mask, causal_mask

    real = np.ones((rows, queries), bool)
    if kind is None:
        return None, real
    if kind == "causal":
        return causal_mask((rows, queries)), real
    if kind == "cache":
        slots = np.arange(queries)[None] + (keys - queries) // 2 + np.arange(rows)[:, None]
        return cache_mask(jnp.asarray(slots, jnp.int32), keys), real
    segments = np.zeros((rows, queries), np.int32)
    segments[:, : queries // 2] = 1
    segments[:, queries // 2 : queries - queries // 8] = 2
    limit = int(segments.max())
    mask = causal_mask((rows, queries), jnp.asarray(segments), max_segments=limit)
    return mask, segments > 0


def _attention_float64(q, k, v, gradient, visible) -> list[np.ndarray]:
    """Returns the output and the gradients of q, k and v."""
    q, k, v, gradient = (np.asarray(x, np.float64) for x in (q, k, v, gradient))
    group, scale = q.shape[2] // k.shape[2], q.shape[-1] ** -0.5
    k, v = np.repeat(k, group, axis=2), np.repeat(v, group, axis=2)
    scores = np.einsum("btnh,bsnh->bnts", q, k, optimize=True) * scale
    if visible is not None:
        # As the package's masked value: a padded query attends to something finite.
        scores = np.where(visible[:, None], scores, -1e30)
    scores -= scores.max(axis=-1, keepdims=True)
    weights = np.exp(scores)
    weights /= weights.sum(axis=-1, keepdims=True)
    out = np.einsum("bnts,bsnh->btnh", weights, v, optimize=True)
    d_v = np.einsum("bnts,btnh->bsnh", weights, gradient, optimize=True)
    d_weights = np.einsum("btnh,bsnh->bnts", gradient, v, optimize=True)
    d_scores = weights * (d_weights - (d_weights * weights).sum(axis=-1, keepdims=True)) * scale
    d_q = np.einsum("bnts,bsnh->btnh", d_scores, k, optimize=True)
    d_k = np.einsum("bnts,btnh->bsnh", d_scores, q, optimize=True)
    grouped = (*k.shape[:2], -1, group, k.shape[-1])
    return [out, d_q, d_k.reshape(grouped).sum(axis=3), d_v.reshape(grouped).sum(axis=3)]


def rope_error(smoke: bool) -> dict:
    """Returns the largest error of cos and sin at V2PE positions around 262,144.

    float32 rounds the angle itself, by up to 2**-24 of it for each of three roundings.
    """
    from internvl3_jax.config import UNITS
    from internvl3_jax.model.ops.rope import rope_tables
    from internvl3_jax.sizes import SIZES

    config, last = SIZES["8b"].language, 262_144
    count = 512 if smoke else 16_384
    positions = last * UNITS - np.arange(count, dtype=np.int32)[::-1]
    cos, sin = jax.jit(lambda p: rope_tables(config, p, None, "none"))(positions[None])
    exponent = np.arange(0, config.head_dim, 2) / config.head_dim
    angle = positions[:, None] / UNITS / config.rope_theta**exponent
    error = max(
        float(np.abs(np.asarray(table[0], np.float64) - exact).max())
        for table, exact in ((cos, np.cos(angle)), (sin, np.sin(angle)))
    )
    tolerance = 3 * last * 2.0**-24 + 1e-6
    return {"max_error": error, "tolerance": tolerance, "ok": error < tolerance}


def digits(dtype: str, count: int | None = None) -> dict:
    """Asks the digits model the first `count` questions and compares with a CPU's answers.

    A GPU's float32 products are TF32 unless the precision is "highest".
    """
    answers = digit_answers(dtype, count)
    expected = json.loads(ANSWERS.read_text(encoding="utf-8"))[dtype][: len(answers)]
    equal = sum(a == e for a, e in zip(answers, expected, strict=True))
    return {"equal": equal, "of": len(answers), "answers": answers, "ok": answers == expected}


def digit_answers(dtype: str, count: int | None = None) -> list[str]:
    from internvl3_jax import Chat, load

    lines = (MODEL / "questions.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    precision = "highest" if dtype == "float32" else None
    with jax.default_matmul_precision(precision):
        chat, answers = Chat(load(MODEL, dtype=dtype)), []
        for question in map(json.loads, lines):
            chat.reset()
            images = [str(MODEL / path) for path in question["image"]]
            answers.append(str(chat(question["prompt"], images=images)))
    return answers


if __name__ == "__main__":  # writes the answers of this machine's CPU
    values = {dtype: digit_answers(dtype) for dtype in ("float32", "bfloat16")}
    ANSWERS.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
