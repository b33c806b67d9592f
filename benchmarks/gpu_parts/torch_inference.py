"""PyTorch's inference: transformers' InternVL, bfloat16, sdpa, eager, with its growing cache."""

import functools

import torch

from benchmarks.gpu_parts.torch_model import Peer


def cases(size: str, smoke: bool) -> dict:
    peer = functools.cache(lambda: Peer(size, smoke))
    batches = (2, 3) if smoke else (8, 64)
    rows = {f"decode batch {count}": functools.partial(_decode, peer, count) for count in batches}
    return {
        "vision tower": functools.partial(_encode, peer),
        "decode batch 1": functools.partial(_decode, peer, 1),
        "prefill batch 1": functools.partial(_prefill, peer, 1),
        "first token": functools.partial(_first_token, peer),
        **rows,
        f"prefill batch {batches[0]}": functools.partial(_prefill, peer, batches[0]),
    }


@torch.inference_mode()
def _encode(peer) -> dict:
    peer = peer()
    pixels = peer.pixels(peer.tiles)
    values = peer.measured(lambda: peer.model.model.get_image_features(pixel_values=pixels))
    return values | {"tiles": peer.tiles, "ms_per_tile": values["ms"] / peer.tiles}


@torch.inference_mode()
def _prefill(peer, rows: int) -> dict:
    peer = peer()
    ids = peer.words(rows)
    values = peer.measured(lambda: peer.model(input_ids=ids, use_cache=True, logits_to_keep=1))
    return values | {"rows": rows, "tokens": peer.length}


@torch.inference_mode()
def _first_token(peer) -> dict:
    peer = peer()
    ids, pixels = peer.prompt(), peer.pixels(peer.tiles)
    inputs = {"input_ids": ids, "pixel_values": pixels, "attention_mask": torch.ones_like(ids)}
    values = peer.measured(lambda: peer.model(**inputs, use_cache=True, logits_to_keep=1))
    return values | {"rows": 1, "tokens": peer.length}


def _decode(peer, rows: int) -> dict:
    peer = peer()
    return peer.decode_ms(peer.words(rows), 2 if peer.smoke else 24)
