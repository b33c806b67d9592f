"""PyTorch's inference, compiled: decoding with a static cache, the tower, and the prefill."""

import functools
import time

import torch

from benchmarks.gpu_parts.torch_model import Peer


def cases(size: str, smoke: bool) -> dict:
    peer = functools.cache(lambda: Peer(size, smoke))
    return {
        "decode batch 1": functools.partial(_decode, peer),
        "vision tower": functools.partial(_encode, peer),
        "prefill batch 1": functools.partial(_prefill, peer),
    }


def _decode(peer) -> dict:
    """generate() compiles the decoding step by itself where the cache is static, on a GPU."""
    peer, began = peer(), time.perf_counter()
    values = peer.decode_ms(peer.words(1), 2 if peer.smoke else 64, cache_implementation="static")
    return values | {"with_compilation_s": time.perf_counter() - began}


@torch.inference_mode()
def _encode(peer) -> dict:
    peer = peer()
    call, pixels = _compiled(peer, peer.model.model.get_image_features), peer.pixels(peer.tiles)
    values = _measured(peer, lambda: call(pixel_values=pixels))
    return values | {"tiles": peer.tiles, "ms_per_tile": values["ms"] / peer.tiles}


@torch.inference_mode()
def _prefill(peer) -> dict:
    peer = peer()
    call, ids = _compiled(peer, peer.model.model.language_model), peer.words(1)
    values = _measured(peer, lambda: call(input_ids=ids, use_cache=True))
    return values | {"rows": 1, "tokens": peer.length}


def _compiled(peer, function):
    return torch.compile(function, backend="eager" if peer.smoke else "inductor")


def _measured(peer, call) -> dict:
    began = time.perf_counter()
    call()
    peer.wait()
    return {"compile_s": time.perf_counter() - began} | peer.measured(call)
