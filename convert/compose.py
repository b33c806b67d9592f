"""Composes a new model of a language model and an InternViT: the start of native pre-training.

Tower and decoder are unchanged. The projector is random: kernels normal with standard deviation
0.02, biases 0, norm scale 1. The nine tokens of InternVL are added to the tokenizer, and the
vocabulary gets exactly its length (Qwen's padding rows are dropped). The rows of new tokens in
embedding and head are the mean of the others, as InternVL's trainer does for the head. A tied head
becomes a copy of the embedding, because InternVL3 never ties.
"""

import dataclasses
import json
import pathlib
import zlib
from collections.abc import Iterator

import numpy as np

from convert.hf_files import has_token
from internvl3_jax.checkpoints.hf.assemble import (
    HEADS,
    Plan,
    Source,
    fill_leaf,
    has_head,
    padded_shape,
    plan,
)
from internvl3_jax.checkpoints.hf.config import layout_of, read_vision
from internvl3_jax.checkpoints.hf.internlm2 import table_source
from internvl3_jax.checkpoints.hf.language import read_language
from internvl3_jax.checkpoints.hf.mapping import Row, bits
from internvl3_jax.checkpoints.hf.released import Hashes, allocate, companion_files, read_json
from internvl3_jax.checkpoints.hf.safetensors import SafetensorsSource
from internvl3_jax.checkpoints.hf.values import refuse_nonfinite
from internvl3_jax.config import ModelConfig, ProcessorConfig, VisionConfig
from internvl3_jax.data.text.tokenizer import Tokenizer
from internvl3_jax.io.strict_json import Object

NEW_TOKENS = (
    "<img>",
    "</img>",
    "<IMG_CONTEXT>",
    "<quad>",
    "</quad>",
    "<ref>",
    "</ref>",
    "<box>",
    "</box>",
)  # in the order of InternVL's code


@dataclasses.dataclass
class Composed:
    """A composed model, with the interface of `released.Released`."""

    config: ModelConfig
    processor: ProcessorConfig
    tokenizer: Tokenizer
    files: dict[str, bytes]
    vision: tuple[Plan, Source]
    language: tuple[Plan, Source]
    known_rows: int  # of the vocabulary, before the new tokens
    seed: int
    hashes: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def dtype(self) -> str:
        return self.vision[0].dtype.name

    @property
    def allow_nonfinite(self) -> bool:
        return self.vision[0].allow_nonfinite

    def origins(self) -> str:
        """Returns one line about the origin of each part; `plan` has checked that all are there."""
        lines = [
            f"{part}: all {len(checked.names)} tensors loaded"
            for part, (checked, _) in (("vision", self.vision), ("language", self.language))
        ]
        new = self.config.language.vocab_size - self.known_rows
        head = (
            ""
            if HEADS[0] in self.language[0].names
            else "; the head initialized as a copy of the embedding"
        )
        lines.append(
            f"vocabulary: {self.known_rows:,} rows loaded, {new} initialized as their mean{head}"
        )
        lines.append(f"projector: initialized at random, seed {self.seed}")
        return "\n".join(lines)

    def leaf(
        self, row: Row, hashes: Hashes | None = None, scratch: pathlib.Path | None = None
    ) -> np.ndarray:
        shape, dtype = padded_shape(row, self.config), self.vision[0].dtype
        part = row.target.split("/")[0]
        if part == "projector":
            leaf = self._random(row.target, shape).astype(dtype)
        elif row.target in ("language/embedding", "language/head/kernel"):
            leaf = self._vocabulary(row, shape, dtype)
        else:
            leaf = allocate(shape, dtype, scratch)
            fill_leaf(*getattr(self, part), row, leaf)
        if hashes is not None:
            hashes.add_leaf(self.config, row, leaf)
        return leaf

    def layers(self, row: Row, hashes: Hashes | None = None) -> Iterator[np.ndarray]:
        count, *shape = padded_shape(row, self.config)
        for layer in range(count):
            out = np.empty(shape, self.vision[0].dtype)
            fill_leaf(*getattr(self, row.target.split("/")[0]), row, out, layer=(layer,))
            if hashes is not None:
                hashes.add_leaf(self.config, row, out, (layer,))
            yield out

    def hash_leaf(self, row: Row, hashes: Hashes) -> None:
        self.leaf(row, hashes)

    def _random(self, path: str, shape: tuple[int, ...]) -> np.ndarray:
        if path.endswith("kernel"):
            # One generator for each leaf, so that the order of the conversion does not matter.
            generator = np.random.default_rng([self.seed, zlib.crc32(path.encode())])
            return 0.02 * generator.standard_normal(shape, np.float32)
        return np.full(shape, 1.0 if path.endswith("scale") else 0.0, np.float32)

    def _vocabulary(self, row: Row, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        checked, source = self.language
        key = row.keys("internvl", ())[0]
        name = checked.names.get(key) or checked.names["language_model.model.embed_tokens.weight"]
        rows = source.read(name)[: self.known_rows]
        if not checked.allow_nonfinite:
            refuse_nonfinite([(name, rows)])
        mean = rows.mean(axis=0, dtype=np.float32)
        leaf = np.zeros(shape, dtype)
        by_rows = leaf if row.target == "language/embedding" else leaf.T
        bits(by_rows)[: self.known_rows] = bits(rows.astype(dtype))
        by_rows[self.known_rows : self.config.language.vocab_size] = mean.astype(dtype)
        return leaf


def open_parts(
    llm: pathlib.Path,
    vision: pathlib.Path,
    dtype: str | None = None,
    seed: int = 0,
    allow_nonfinite: bool = False,
) -> Composed:
    """Opens a language model and a vision tower.

    Args:
      llm: directory of a Qwen2.5, InternLM2 or InternLM3 model.
      vision: directory of an InternViT or of an InternVL model.
      dtype: name of the dtype to convert to; None keeps the stored one.
      seed: of the random projector.
      allow_nonfinite: accept NaN and infinities when reading.

    Raises:
      FileNotFoundError, ValueError, ConversionError: it names the file, key or tensor.
    """
    tower_config, layout, tower = _open_tower(vision)
    files = companion_files(llm)
    values = read_json(files, "config.json", llm)
    if values is None:
        raise FileNotFoundError(
            f"{llm} has no config.json; give the directory of a Qwen2.5, InternLM2 or InternLM3 "
            "model"
        )
    decoder = SafetensorsSource(llm, rename=lambda name: "language_model." + name)
    known = Tokenizer.from_files(files, str(llm))
    known.require("<|im_start|>", "<|im_end|>")
    has_own_head = has_head(decoder.infos())
    # transformers ties Qwen2 only if the file says so; `plan` checks a file that also has a head.
    stated = Object(values, f"{llm}/config.json").get("tie_word_embeddings", bool, False)
    base = read_language(values, f"{llm}/config.json: config", tied=stated or not has_own_head)
    decoder = table_source(decoder, base)
    if known.vocab_size > base.vocab_size:
        raise ValueError(
            f"{llm}: the tokenizer has {known.vocab_size} tokens, the model only "
            f"{base.vocab_size} rows"
        )

    files = add_tokens(files, known)
    for name in ("config.json", "generation_config.json"):  # of the language model only
        files.pop(name, None)
    tokenizer = Tokenizer.from_files(files, str(llm))
    token = tokenizer.token_id("<IMG_CONTEXT>")
    stored = ModelConfig(vision=tower_config, language=base, image_token_id=0)
    language_plan = plan(stored, decoder, "internvl", dtype, "language", allow_nonfinite)
    vision_plan = plan(stored, tower, layout, dtype, "vision", allow_nonfinite)
    if vision_plan.dtype != language_plan.dtype:
        raise ValueError(
            f"the tower is {vision_plan.dtype}, the language model {language_plan.dtype}; name "
            "one dtype with --dtype"
        )
    language = dataclasses.replace(base, vocab_size=tokenizer.vocab_size, tie_embeddings=False)
    config = ModelConfig(vision=tower_config, language=language, image_token_id=token)
    processor = ProcessorConfig(
        image_size=tower_config.image_size, tokens_per_tile=config.tokens_per_tile
    )
    parts = ((vision_plan, tower), (language_plan, decoder))
    return Composed(
        config, processor, tokenizer, files, *parts, known_rows=known.vocab_size, seed=seed
    )


def _open_tower(directory: pathlib.Path) -> tuple[VisionConfig, str, SafetensorsSource]:
    """Returns (configuration, layout, tensors of the tower under that layout's names)."""
    values = read_json(companion_files(directory), "config.json", directory)
    place = f"{directory}/"
    if values is None:
        raise FileNotFoundError(
            f"{directory} has no config.json; give the directory of an InternViT or of an "
            "InternVL model"
        )
    alone = {
        "intern_vit_6b": ("internvl", "vision_model."),
        "internvl_vision": ("hf", "model.vision_tower."),
    }
    model_type = Object(values, f"{place}config.json").get("model_type", str, None)
    if model_type in alone:
        layout, prefix = alone[model_type]
        source = SafetensorsSource(
            directory, rename=lambda name: name if name.startswith(prefix) else prefix + name
        )
        return read_vision(values, layout, f"{place}config.json: config"), layout, source
    layout = layout_of(values, place)
    prefixes = (
        ("vision_model.",) if layout == "internvl" else ("model.vision_tower.", "vision_tower.")
    )
    source = SafetensorsSource(
        directory, rename=lambda name: name if name.startswith(prefixes) else None
    )
    return (
        read_vision(
            values.get("vision_config"), layout, f"{place}config.json: config.vision_config"
        ),
        layout,
        source,
    )


def add_tokens(files: dict[str, bytes], known: Tokenizer) -> dict[str, bytes]:
    """Adds the missing ones of the nine tokens to every tokenizer file that lists added tokens."""
    new = [token for token in NEW_TOKENS if not has_token(known, token)]
    ids = {token: known.vocab_size + index for index, token in enumerate(new)}
    entry = {
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    files = dict(files)

    def edit(name: str, change) -> None:
        values = read_json(files, name) or {}
        change(values)
        files[name] = json.dumps(values, indent=2, ensure_ascii=False).encode()

    if "tokenizer.json" in files:
        added = [{"id": id, "content": token, **entry} for token, id in ids.items()]
        edit("tokenizer.json", lambda values: values.setdefault("added_tokens", []).extend(added))
    if "tokenizer.json" not in files or "added_tokens.json" in files:
        edit("added_tokens.json", lambda values: values.update(ids))
    decoder = {str(id): {"content": token, **entry} for token, id in ids.items()}
    edit(
        "tokenizer_config.json",
        lambda values: values.setdefault("added_tokens_decoder", {}).update(decoder),
    )
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if name in files:
            edit(name, lambda values: _extend_special(values, new))
    return files


def _extend_special(values: dict, new: list[str]) -> None:
    listed = values.setdefault("additional_special_tokens", [])
    if isinstance(listed, list):
        listed.extend(token for token in new if token not in listed)
