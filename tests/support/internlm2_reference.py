"""A tiny InternVL2.5-8B (and so VisualPRM) in torch: transformers' tower and projector, and
InternLM2 written out here.

transformers has no InternLM2. This one follows the modeling file published with the weights: fused
wqkv by groups of heads, no biases unless asked for, rotation of halves, dynamic NTK beyond the
trained length. It keeps the published names, so that its state dict under `language_model.` is what
a released checkpoint holds.
"""

import copy
import json
import pathlib

import torch
from safetensors.torch import save_file
from torch import nn

from internvl3_jax.checkpoints.hf.assemble import ArraySource, params_from_tensors
from internvl3_jax.checkpoints.hf.config import from_hf
from internvl3_jax.checkpoints.hf.internlm2 import table_source
from tests.support import torch_reference

LLM = {
    "architectures": ["InternLM2ForCausalLM"],
    "attn_implementation": "flash_attention_2",
    "auto_map": {"AutoConfig": "configuration_internlm2.InternLM2Config"},
    "bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 48,
    "initializer_range": 0.02,
    "intermediate_size": 56,
    "max_position_embeddings": 32768,
    "model_type": "internlm2",
    "num_attention_heads": 6,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "pad_token_id": 2,
    "rms_norm_eps": 1e-5,
    "rope_scaling": {"factor": 2.0, "type": "dynamic"},
    "rope_theta": 1000000,
    "torch_dtype": "float32",
    "use_cache": True,
    "vocab_size": 131,
}


class Norm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        return self.weight * x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


class Attention(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        self.config = config
        self.width = config["hidden_size"] // config["num_attention_heads"]
        self.groups = config["num_attention_heads"] // config["num_key_value_heads"]
        rows = (config["num_attention_heads"] + 2 * config["num_key_value_heads"]) * self.width
        self.wqkv = nn.Linear(config["hidden_size"], rows, bias=config["bias"])
        self.wo = nn.Linear(config["hidden_size"], config["hidden_size"], bias=config["bias"])

    def rotate(self, x):
        """x [B, heads, T, d]"""
        length, trained = x.shape[2], self.config["max_position_embeddings"]
        base, factor = (
            self.config["rope_theta"],
            (self.config["rope_scaling"] or {}).get("factor", 1.0),
        )
        if self.config["rope_scaling"] and length > trained:
            base = base * (factor * length / trained - (factor - 1)) ** (
                self.width / (self.width - 2)
            )
        frequencies = 1.0 / base ** (torch.arange(0, self.width, 2).float() / self.width)
        angles = torch.outer(torch.arange(length).float(), frequencies).repeat(1, 2)
        first, second = x.chunk(2, dim=-1)
        return x * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()

    def forward(self, x):
        rows, length, _ = x.shape
        heads = self.wqkv(x).view(
            rows, length, self.config["num_key_value_heads"], self.groups + 2, self.width
        )
        q = heads[:, :, :, : self.groups].flatten(2, 3).transpose(1, 2)
        k, v = (heads[:, :, :, self.groups + i].transpose(1, 2) for i in (0, 1))
        q, k = self.rotate(q), self.rotate(k)
        k, v = (part.repeat_interleave(self.groups, dim=1) for part in (k, v))
        scores = q @ k.transpose(2, 3) / self.width**0.5
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf"))
        return self.wo((scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(rows, length, -1))


class FeedForward(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        inner = config["intermediate_size"]
        self.w1 = nn.Linear(config["hidden_size"], inner, bias=False)
        self.w3 = nn.Linear(config["hidden_size"], inner, bias=False)
        self.w2 = nn.Linear(inner, config["hidden_size"], bias=False)

    def forward(self, x):
        return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))


class Layer(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        self.attention, self.feed_forward = Attention(config), FeedForward(config)
        self.attention_norm, self.ffn_norm = (
            Norm(config["hidden_size"], config["rms_norm_eps"]) for _ in range(2)
        )

    def forward(self, x):
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.ffn_norm(x))


class InternLM2(nn.Module):
    """[B,T,D] of embeddings -> logits [B,T,V]."""

    def __init__(self, config: dict):
        super().__init__()
        self.config = config
        self.model = nn.Module()
        self.model.tok_embeddings = nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.model.layers = nn.ModuleList(Layer(config) for _ in range(config["num_hidden_layers"]))
        self.model.norm = Norm(config["hidden_size"], config["rms_norm_eps"])
        self.output = nn.Linear(config["hidden_size"], config["vocab_size"], bias=False)

    def forward(self, x):
        for layer in self.model.layers:
            x = layer(x)
        return self.output(self.model.norm(x))


class Reference(nn.Module):
    """The complete model: `forward(ids i64[B,T], pixels f32[N,3,S,S])` -> logits f32[B,T,V]."""

    def __init__(self, seed: int = 0, vit: str = "300m", **llm):
        super().__init__()
        llm = {**LLM, **llm}
        # Its decoder is unused; its width makes the projector as wide as InternLM2.
        text = {"hidden_size": llm["hidden_size"], "vocab_size": llm["vocab_size"]}
        self.body, _ = torch_reference.build_reference(vit, seed=seed, text=text)
        self.language = InternLM2(llm)
        torch_reference.randomise(self.language, seed + 1)
        self.eval()

    @torch.no_grad()
    def forward(self, ids, pixels):
        return self.logits(ids, pixels)

    def logits(self, ids, pixels):
        """Returns the logits with their graph, for gradients."""
        x = self.language.model.tok_embeddings(ids)
        if len(pixels):
            tower = self.body.model.vision_tower(pixels).last_hidden_state[:, 1:]
            side = int(tower.shape[1] ** 0.5)
            grid = self.body.model.pixel_shuffle(tower.reshape(len(tower), side, side, -1), 0.5)
            features = self.body.model.multi_modal_projector(
                grid.reshape(len(tower), -1, grid.shape[-1])
            )
            x[ids == self.body.config.image_token_id] = features.flatten(0, 1)
        return self.language(x)

    def tensors(self, gradients: bool = False) -> dict[str, torch.Tensor]:
        """Returns the tensors, or their gradients, under the names of a released checkpoint."""
        if gradients:
            holder = copy.deepcopy(self)
            for held, tensor in zip(holder.parameters(), self.parameters(), strict=True):
                held.data = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
            return holder.tensors()
        body = torch_reference.original_state_dict(self.body)
        kept = {
            name: tensor for name, tensor in body.items() if not name.startswith("language_model.")
        }
        return kept | {
            f"language_model.{name}": tensor.clone()
            for name, tensor in self.language.state_dict().items()
        }

    def config(self) -> dict:
        return torch_reference.original_config(self.body) | {"llm_config": self.language.config}

    def save(self, directory: pathlib.Path, dtype: torch.dtype = torch.float32) -> pathlib.Path:
        directory.mkdir(parents=True)
        save_file(
            {name: tensor.to(dtype) for name, tensor in self.tensors().items()},
            directory / "model.safetensors",
        )
        (directory / "config.json").write_text(json.dumps(self.config()))
        return directory


def converted(reference: Reference, image_token_id: int = 120):
    """Returns (ModelConfig, params) with the reference's weights."""
    config = from_hf(reference.config(), image_token_id=image_token_id, has_head=True)
    tensors = ArraySource({name: tensor.numpy() for name, tensor in reference.tensors().items()})
    return config, params_from_tensors(config, table_source(tensors, config.language))
