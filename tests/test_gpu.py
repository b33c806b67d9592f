"""Numbers of an NVIDIA GPU: attention and rope against float64, fused decoding against float32, the
digits model against a CPU.

JAX_PLATFORMS=cuda python -m pytest -m gpu tests/test_gpu.py
"""

import functools

import jax
import pytest

from benchmarks.gpu_parts import correctness
from internvl3_jax.model.language import float32_layer
from internvl3_jax.model.ops import fused_decode
from internvl3_jax.sizes import SIZES

pytestmark = [pytest.mark.gpu, pytest.mark.optimized]

ATTENTION = [
    (shape, name, dtype)
    for shape in correctness.attention_shapes(smoke=False)
    for name in ("auto", "xla", "flash", "cudnn")
    for dtype in ("bfloat16", "float32")
    if (name, dtype) != ("cudnn", "float32") and (shape, name) != ("decode", "cudnn")
]


@functools.cache
def has_gpu() -> bool:
    try:
        return jax.default_backend() == "gpu"
    except RuntimeError:
        return False


@pytest.fixture(autouse=True)
def gpu():
    if not has_gpu():
        pytest.skip("no NVIDIA GPU, or JAX_PLATFORMS does not name it")


@pytest.mark.parametrize(("shape", "implementation", "dtype"), ATTENTION)
def test_attention_agrees_with_float64(shape, implementation, dtype):
    result = correctness.attention_error(shape, implementation, dtype, smoke=False)
    assert result["ok"], result


def test_rope_at_long_positions():
    result = correctness.rope_error(smoke=False)
    assert result["ok"], result


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_digits_model_answers_as_on_a_cpu(dtype):
    result = correctness.digits(dtype)
    assert result["ok"], result


@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("size", ["1b", "2b"])
def test_fused_decoding(size, rows):
    if jax.__version_info__ < fused_decode._JAX or not fused_decode._is_one_hopper():
        pytest.skip("the kernels need a Hopper GPU and jax 0.11.2")
    config = SIZES[size].language
    assert fused_decode._trial_error(config, rows, float32_layer) <= fused_decode._TOLERANCE
