"""InternLM2's tensor names in the original layout, in both directions.

The table has the names of Qwen2 and InternLM3. InternLM2 (InternVL2.5-8B, and VisualPRM) has other
names, and one wqkv in place of q, k and v: for each key head its query heads, the key head and the
value head. `table_source` reads it under the table's names; `FileWriter` writes it.

Shapes: K key heads, G query heads for each, d head width, D width; wqkv is [K * (G + 2) * d, D].
"""

from collections.abc import Iterable

import numpy as np

from internvl3_jax.checkpoints.hf.assemble import ConversionError, Source, TensorInfo
from internvl3_jax.checkpoints.hf.mapping import (
    INTERNLM2_QKV,
    QKV,
    bits,
    file_name,
    internlm2_names,
)
from internvl3_jax.config import LanguageConfig, ModelConfig
from internvl3_jax.io.terminal import one_line


def table_source(source: Source, language: LanguageConfig, layout: str = "internvl") -> Source:
    """Returns a source with the table's names."""
    if language.family != "internlm2" or layout != "internvl":
        return source
    return _TableSource(source, language)


class _TableSource:
    """Splits wqkv into q, k and v, and renames the other tensors."""

    def __init__(self, source: Source, language: LanguageConfig):
        self.source, self.language = source, language
        # By the table's name: the name in the file; shape and dtype.
        self.stored, self.found = {}, {}
        height = (language.num_heads + 2 * language.num_kv_heads) * language.head_dim
        for name, info in source.infos().items():
            names = internlm2_names(name)
            rows = info.shape[0] if info.shape else 0
            if len(names) > 1 and rows != height:
                raise ConversionError(
                    f"{one_line(name)} has {rows} rows; the heads in config.json need {height}"
                )
            for part in names:
                if part in self.found:
                    raise ConversionError(
                        f"given twice: {one_line(self.stored[part])} and {one_line(name)}"
                    )
                shape = (_rows(part, language), *info.shape[1:]) if len(names) > 1 else info.shape
                self.stored[part], self.found[part] = name, TensorInfo(shape, info.dtype)

    def infos(self) -> dict[str, TensorInfo]:
        return self.found

    def read(self, name: str) -> np.ndarray:
        stored = self.stored[name]
        tensor = self.source.read(stored)
        if not INTERNLM2_QKV.search(stored):
            return tensor
        heads = _by_heads(bits(tensor), self.language)[:, _heads(name, self.language)]
        return np.ascontiguousarray(heads).view(tensor.dtype).reshape(self.found[name].shape)


class FileWriter:
    """Writes tensors of the table's names under the file's; q and k of a layer wait for its v."""

    def __init__(self, writer, config: ModelConfig, layout: str):
        self.writer, self.config, self.layout = writer, config, layout
        self.waiting = {}  # wqkv -> {the table's name: tensor}

    def write(self, key: str, tensor: np.ndarray) -> None:
        name = file_name(key, self.config, self.layout)
        if not INTERNLM2_QKV.search(name):
            self.writer.write(name, tensor)
            return
        parts = self.waiting.setdefault(name, {})
        parts[key] = tensor
        if len(parts) == len(QKV):
            self.writer.write(name, join(self.waiting.pop(name), self.config.language))

    def close(self) -> None:
        self.writer.close()


def join(parts: dict[str, np.ndarray], language: LanguageConfig) -> np.ndarray:
    """Joins q, k and v, by the table's names, to wqkv."""
    first = next(iter(parts.values()))
    height = sum(len(part) for part in parts.values())
    joined = np.empty((height, *first.shape[1:]), f"u{first.dtype.itemsize}")
    heads = _by_heads(joined, language)
    for name, part in parts.items():
        place = heads[:, _heads(name, language)]
        place[...] = bits(part).reshape(place.shape)
    return joined.view(first.dtype)


def file_tensors(
    tensors: Iterable[tuple[str, tuple[int, ...]]], config: ModelConfig, layout: str
) -> list:
    """Returns (name, shape) of the files' tensors from the table's."""
    shapes = {}
    for key, shape in tensors:
        name = file_name(key, config, layout)
        shapes[name] = (shapes[name][0] + shape[0], *shape[1:]) if name in shapes else shape
    return list(shapes.items())


def _by_heads(tensor: np.ndarray, language: LanguageConfig) -> np.ndarray:
    """Reshapes [K * (G + 2) * d, ...] -> [K, G + 2, d, ...], a view."""
    return tensor.reshape(language.num_kv_heads, -1, language.head_dim, *tensor.shape[1:])


def _heads(name: str, language: LanguageConfig) -> slice:
    """Returns the heads of q_proj, k_proj or v_proj in a group."""
    group = language.num_heads // language.num_kv_heads
    return {"q": slice(0, group), "k": slice(group, group + 1), "v": slice(group + 1, group + 2)}[
        _letter(name)
    ]


def _rows(name: str, language: LanguageConfig) -> int:
    return (
        language.num_heads if _letter(name) == "q" else language.num_kv_heads
    ) * language.head_dim


def _letter(name: str) -> str:
    """Returns a projection's letter: language_model.model.layers.0.self_attn.q_proj.weight -> q"""
    return name.rsplit(".", 2)[-2][0]
