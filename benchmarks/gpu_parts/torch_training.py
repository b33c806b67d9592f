"""PyTorch's train step on the samples of our packed row, each without padding, one update for all.

float32 weights with bfloat16 autocast, gradient checkpointing, clipping, fused AdamW.
"""

import functools

import torch

from benchmarks.gpu_parts.torch_model import Peer
from benchmarks.gpu_parts.training import samples


def cases(size: str, smoke: bool) -> dict:
    peer = functools.cache(lambda: _peer(size, smoke))
    return {"remat full": functools.partial(_step, peer)}


def _peer(size: str, smoke: bool) -> Peer:
    peer = Peer(size, smoke, torch.float32)
    peer.model.train()
    peer.model.gradient_checkpointing_enable()
    return peer


def _step(peer) -> dict:
    peer = peer()
    model, batches = peer.model, [_inputs(peer, *sample) for sample in samples(peer.smoke)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-5, fused=peer.device == "cuda")

    def once():
        for inputs in batches:
            with torch.autocast(peer.device, torch.bfloat16):
                loss = model(**inputs, use_cache=False).loss
            (loss / len(batches)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    values = peer.measured(once, 4.0, 3)
    tokens = sum(inputs["input_ids"].numel() for inputs in batches)
    return values | {"tokens": tokens, "tokens_s": 1e3 * tokens / values["ms"]}


def _inputs(peer, tiles: int, text: int) -> dict:
    visual, image_token = tiles * peer.config.tokens_per_tile, peer.settings.image_token_id
    ids = peer.words(1, visual + text)
    ids[0, 2 : 2 + visual] = image_token
    labels = torch.where(ids == image_token, -100, ids)
    labels[0, : 2 + visual] = -100
    inputs = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
    return inputs | ({"pixel_values": peer.pixels(tiles)} if tiles else {})
