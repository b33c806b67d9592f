"""Measures the card with PyTorch: copying, reading, products with a matrix and with a vector."""

import functools
import statistics
import time


def cases(size: str, smoke: bool) -> dict:
    square = 256 if smoke else 8192
    shapes = {f"matmul {square}": (square,) * 3}
    if not smoke:
        shapes |= {
            "matmul tower mlp": (13 * 1025, 1024, 4096),
            "matmul 8b gate and up": (3840, 3584, 2 * 18944),
        }
    return {
        "copy": functools.partial(_copy, smoke),
        "read": functools.partial(_read, smoke),
        "gemv": functools.partial(_gemv, smoke),
        **{name: functools.partial(_matmul, shape, smoke) for name, shape in shapes.items()},
    }


def _random(*shape, smoke: bool):
    import torch

    device = "cpu" if smoke else "cuda"
    return torch.randn(*shape, device=device, dtype=torch.bfloat16)


def _copy(smoke: bool) -> dict:
    a = _random(2**18 if smoke else 2**30, smoke=smoke)
    b = a.clone()
    return {"tb_s": 2 * a.nbytes / _seconds(lambda: b.copy_(a), smoke) / 1e12}


def _read(smoke: bool) -> dict:
    a = _random(2**18 if smoke else 2**30, smoke=smoke)
    return {"tb_s": a.nbytes / _seconds(a.sum, smoke) / 1e12}


def _gemv(smoke: bool) -> dict:
    width = 64 if smoke else 8 * 18944
    matrix, vector = _random(3584, width, smoke=smoke), _random(1, 3584, smoke=smoke)
    return {"tb_s": matrix.nbytes / _seconds(lambda: vector @ matrix, smoke) / 1e12}


def _matmul(shape: tuple[int, int, int], smoke: bool) -> dict:
    rows, inner, columns = shape
    a, b = _random(rows, inner, smoke=smoke), _random(inner, columns, smoke=smoke)
    seconds = _seconds(lambda: a @ b, smoke)
    return {"shape": list(shape), "tflop_s": 2 * rows * inner * columns / seconds / 1e12}


def _seconds(call, smoke: bool) -> float:
    """Returns the median of 20 calls, by the device's events."""
    import torch

    call()
    if smoke:
        began = time.perf_counter()
        call()
        return time.perf_counter() - began
    times = []
    for _ in range(23):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times[3:])
