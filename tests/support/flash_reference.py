"""InternVL3.5-Flash restated in torch around a tiny transformers model, and the rule of its router.

The modules have the names of the released files, so that their state dict is one of them.
"""

import copy
import functools
import math

import numpy as np
import torch
from torch import nn

from internvl3_jax.checkpoints.hf.assemble import params_from_tensors
from internvl3_jax.checkpoints.hf.config import from_hf
from tests.support.torch_reference import build_reference, original_config, original_state_dict

RELATIVE, ABSOLUTE = 0.3, 0.05  # of the tiles of the tests, some are on either side


class Pooling(nn.Module):
    """One query per tile, through attention 1 once and attention 2 three times."""

    def __init__(self, width):
        super().__init__()
        self.query_token = nn.Parameter(torch.zeros(1, width))
        for number in range(1, 5):
            attention = nn.MultiheadAttention(width, num_heads=16, batch_first=True)
            setattr(self, f"attn{number}", attention)
            setattr(self, f"norm{number}", nn.LayerNorm(width))

    def forward(self, patches):
        state = self.query_token[None].repeat(len(patches), 1, 1)
        for number in (1, 2, 2, 2):
            attended = getattr(self, f"attn{number}")(state, patches, patches)[0]
            state = getattr(self, f"norm{number}")(attended)
        return state[:, 0]


class Gating(nn.Module):
    """Residual MLPs, then the probabilities of "compress" and "keep"."""

    def __init__(self, width):
        super().__init__()
        for number in range(1, 5):
            layers = [nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(0.1)]
            layers += [nn.Linear(4 * width, width), nn.Dropout(0.1), nn.LayerNorm(width)]
            setattr(self, f"block{number}", nn.Sequential(*layers))
        self.gate = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2))

    def forward(self, state):
        for block in (self.block1, self.block2, self.block3, self.block4):
            state = state + block(state)
        return self.gate(state).softmax(-1)


class FlashModel(nn.Module):
    """A transformers model with the parts of a Flash model; its other tensors are `base`'s."""

    def __init__(self, base, relative=RELATIVE, absolute=ABSOLUTE):
        super().__init__()
        self.base, self.relative, self.absolute = base, relative, absolute
        tower, decoder = base.config.vision_config, base.config.text_config
        folded, width = 16 * tower.hidden_size, decoder.hidden_size
        layers = [nn.LayerNorm(folded), nn.Linear(folded, 2 * width), nn.GELU(), nn.Dropout(0.1)]
        layers += [nn.Linear(2 * width, 2 * width), nn.GELU(), nn.Dropout(0.1)]
        self.mlp2 = nn.Sequential(*layers, nn.Linear(2 * width, width))
        self.pooling_before_gating = Pooling(tower.hidden_size)
        self.gating = Gating(tower.hidden_size)

    def encode(self, pixels):
        """Returns each tile's features, those of the compressed tile, and its probability."""
        patches = self.base.model.vision_tower(pixels).last_hidden_state[:, 1:]
        full = self.base.model.get_image_features(pixels).pooler_output.reshape(
            len(pixels), -1, self.base.config.text_config.hidden_size
        )
        count, side, width = len(patches), math.isqrt(patches.shape[1]), patches.shape[2]
        # Blocks of 4 x 4 patches, each one token.
        blocks = patches.reshape(count, side // 4, 4, side // 4, 4, width).transpose(2, 3)
        compressed = self.mlp2(blocks.reshape(count, -1, 16 * width))
        probability = self.gating(self.pooling_before_gating(patches))[:, 0]
        return full, compressed, probability

    def decide(self, probabilities):
        """Returns which tiles of one request are compressed."""
        quantile = torch.quantile(probabilities, self.relative)
        return (probabilities > quantile) & (probabilities >= self.absolute)

    @torch.no_grad()
    def run(self, tokens, spans, pixels, delta=1.0, new_tokens=0, decisions=None):
        """Answers greedily, without a cache.

        Args:
          tokens: with every tile uncompressed.
          spans: (first token, tiles) of each image.
          delta: V2PE step, of all images.
          decisions: in place of those of the router.

        Returns:
          (ids of the answer, logits of all tokens, decisions)
        """
        full, compressed, probability = self.encode(pixels)
        decisions = self.decide(probability) if decisions is None else decisions
        # 1) The sequence as a list of pieces: text, or the features of one tile.
        embed, pieces, steps, at, tile = self.base.get_input_embeddings(), [], [], 0, 0
        for start, tiles in [*spans, (len(tokens), 0)]:
            pieces.append(embed(torch.as_tensor(np.asarray(tokens[at:start], np.int64))))
            steps.append(("text", start - at))
            for number in range(tile, tile + tiles):
                pieces.append((compressed if decisions[number] else full)[number])
            steps.append(("image", sum(len(piece) for piece in pieces[-tiles:]) if tiles else 0))
            at, tile = start + tiles * full.shape[1], tile + tiles
        states, places = torch.cat(pieces)[None], _places(steps, delta)
        # 2) One token after the other.
        answer = []
        while True:
            position = torch.tensor(places, dtype=torch.float32)[None]
            # Without a mask transformers would take positions with other steps than 1 for packing.
            hidden = self.base.model.language_model(
                inputs_embeds=states,
                position_ids=position,
                attention_mask=torch.ones(1, states.shape[1]),
                use_cache=False,
            ).last_hidden_state
            logits = self.base.lm_head(hidden)[0]
            if len(answer) == new_tokens:
                return answer, logits.numpy(), decisions.numpy()
            answer.append(int(logits[-1].argmax()))
            states = torch.cat([states, embed(torch.tensor([[answer[-1]]]))], 1)
            places = [*places, math.ceil(places[-1]) + 1]


def _places(steps, delta):
    """Returns the position of each token: text is at whole numbers, one after the other."""
    places, last = [], -1
    for kind, count in steps:
        for _ in range(count):
            last = last + delta if kind == "image" else math.ceil(last) + 1
            places.append(last)
    return places


@functools.cache
def flash_pair(relative=RELATIVE, absolute=ABSOLUTE, seed=0):
    """Returns (torch model, tensors of the released layout, ModelConfig, params)."""
    vision = {"image_size": [32, 32], "num_attention_heads": 4}
    base, _ = build_reference("300m", "qwen3", vision=vision, seed=seed)
    model = FlashModel(base, relative, absolute).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("base."):
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                scaled = 0.2 * noise + (name.endswith("weight") and "proj" not in name)
            else:
                scaled = noise if "query" in name else noise / parameter.shape[-1] ** 0.5
            parameter.copy_(scaled)
    tensors = dict(original_state_dict(base))
    tensors |= {k: v.clone() for k, v in model.state_dict().items() if not k.startswith("base.")}
    tensors = {name: tensor.numpy() for name, tensor in tensors.items()}
    config = from_hf(released_config(model), image_token_id=120, has_head=True)
    return model, tensors, config, params_from_tensors(config, tensors, "internvl")


def released_config(model) -> dict:
    """Returns config.json of the model as released."""
    values = copy.deepcopy(original_config(model.base))
    return values | {
        "flash_mode": True,
        "flash_relative_threshold": model.relative,
        "flash_absolute_threshold": model.absolute,
    }
