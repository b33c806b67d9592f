"""What a checkpoint says of itself: model, processor, how it was made and, of a LoRA run, what it was trained beside."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping

import jax

from internvl3_jax.config import LoraConfig, ModelConfig, ProcessorConfig, from_dict, to_dict
from internvl3_jax.data.tokenizer import Tokenizer
from internvl3_jax.find import MANIFEST
from internvl3_jax.fingerprint import fingerprint

FORMAT = 1


@dataclasses.dataclass
class Base:
    """What a LoRA run trains beside."""

    path: str  # directory or hub id
    dtype: str  # of its parameters in the run
    frozen: str  # `adapters.base_hash`
    lora: LoraConfig


@dataclasses.dataclass
class Manifest:
    """internvl3_jax.json"""

    model: ModelConfig
    processor: ProcessorConfig
    fingerprint: dict
    hashes: dict[str, str] = dataclasses.field(default_factory=dict)
    base: Base | None = None  # of a LoRA run

    def write(self, directory: pathlib.Path) -> None:
        values = {"format": FORMAT, **{name: to_dict(getattr(self, name)) for name in ("model", "processor")}}
        values |= {"fingerprint": self.fingerprint, "hashes": self.hashes}
        values |= {"base": to_dict(self.base)} if self.base else {}
        (directory / MANIFEST).write_text(json.dumps(values, indent=1, ensure_ascii=False), encoding="utf-8")

    @classmethod
    def read(cls, directory: pathlib.Path) -> "Manifest":
        path = directory / MANIFEST
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        if values.get("format") != FORMAT:
            raise ValueError(f"{path} has format {values.get('format')!r}; this version reads {FORMAT}")
        model = from_dict(ModelConfig, values["model"], f"{path}: model")
        processor = from_dict(ProcessorConfig, values["processor"], f"{path}: processor")
        base = from_dict(Base, values["base"], f"{path}: base") if "base" in values else None
        return cls(model, processor, values["fingerprint"], values["hashes"], base)


def write_files(
    directory: pathlib.Path,
    model: ModelConfig,
    processor: ProcessorConfig,
    files: Mapping[str, bytes],
    dtype: str,
    hashes: dict[str, str] | None = None,
    base: Base | None = None,
) -> None:
    """Writes everything of a checkpoint directory but its arrays; the tokenizer among `files` must fit the configuration."""
    tokenizer = Tokenizer.from_files(dict(files), str(directory))
    made = fingerprint(model, processor, tokenizer, dtype)
    if jax.process_index() == 0:
        for name, content in files.items():
            (directory / name).write_bytes(content)
        Manifest(model, processor, made, hashes or {}, base).write(directory)
