"""internvl3_jax.json: a checkpoint's model, processor, fingerprint and, of a LoRA run, its base."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping

import jax
import numpy as np

from internvl3_jax.checkpoints.fingerprint import fingerprint
from internvl3_jax.config import LoraConfig, ModelConfig, ProcessorConfig, from_dict, to_dict
from internvl3_jax.data.text.tokenizer import Tokenizer
from internvl3_jax.io import strict_json
from internvl3_jax.io.checkpoint_paths import MANIFEST
from internvl3_jax.model.ops.quantize import FORMATS as WEIGHTS

FORMAT = 1


@dataclasses.dataclass
class Base:
    """The frozen base of a LoRA run.

    Attributes:
      path: directory or hub id.
      dtype: dtype of its parameters in the run.
      frozen: `adapters.base_hash`.
      lora: settings of the adapters.
    """

    path: str
    dtype: str
    frozen: str
    lora: LoraConfig


@dataclasses.dataclass
class Manifest:
    """The content of internvl3_jax.json."""

    model: ModelConfig
    processor: ProcessorConfig
    fingerprint: dict
    hashes: dict[str, str] = dataclasses.field(default_factory=dict)
    base: Base | None = None  # of a LoRA run
    # owner/name@commit of the hub that it was converted from
    source: str | None = None
    # format of quantized kernels, for inference alone (model/weights.py)
    weights: str | None = None

    def write(self, directory: pathlib.Path) -> None:
        values = {
            "format": FORMAT,
            **{name: to_dict(getattr(self, name)) for name in ("model", "processor")},
        }
        values |= {"fingerprint": self.fingerprint, "hashes": self.hashes}
        values |= {"base": to_dict(self.base)} if self.base else {}
        values |= {"source": self.source} if self.source else {}
        values |= {"weights": self.weights} if self.weights else {}
        (directory / MANIFEST).write_text(
            json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False), encoding="utf-8"
        )

    @classmethod
    def read(cls, directory: pathlib.Path) -> "Manifest":
        """Reads the file; ValueError names the file and the key that is wrong."""
        path = directory / MANIFEST
        try:
            values = strict_json.read_object(path)
        except strict_json.JsonError as error:
            raise strict_json.JsonError(f"{error}; {MANIFEST} is damaged") from error
        version = values.get("format", int)
        if version != FORMAT:
            raise strict_json.JsonError(
                f"{values.where} has format {version}; this version reads {FORMAT}"
            )
        model, processor = (
            _part(values, name, part)
            for name, part in (("model", ModelConfig), ("processor", ProcessorConfig))
        )
        base = _part(values, "base", Base) if "base" in values.values else None
        hashes = values.get("hashes", dict)
        for name, text in hashes.items():
            strict_json.check(text, str, f"{values.where}: hashes: {name}", high=128)
        source = values.get("source", str, None, high=1000)
        weights = values.get("weights", str, None, high=20)
        if weights is not None and weights not in WEIGHTS:
            raise strict_json.JsonError(
                f"{values.where} has weights {weights!r}; this version reads {', '.join(WEIGHTS)}"
            )
        made = cls(model, processor, values.get("fingerprint", dict), hashes, base, source, weights)
        values.finish()
        return made


def _part(values: strict_json.Object, name: str, kind: type):
    where = f"{values.where}: {name}"
    try:
        return from_dict(kind, values.get(name, dict), where)
    except (
        TypeError,
        AttributeError,
        ArithmeticError,
    ) as error:  # the field checks failed on a wrong type
        raise strict_json.JsonError(f"{where} is damaged ({error})") from error


def write_files(
    directory: pathlib.Path,
    model: ModelConfig,
    processor: ProcessorConfig,
    files: Mapping[str, bytes],
    dtype: str,
    hashes: dict[str, str] | None = None,
    base: Base | None = None,
    source: str | None = None,
    weights: str | None = None,
) -> None:
    """Writes all files of a checkpoint except its arrays and files.json.

    Args:
      directory: the directory being filled.
      model: configuration of the model.
      processor: how images and messages become tiles and ids.
      files: name -> content; the tokenizer among them must fit the configuration.
      dtype: names of the parameters' dtypes; see `dtype_name`.
      hashes: name of each released tensor -> sha256.
      base: the base of a LoRA run.
      source: owner/name@commit of the hub.
      weights: the format of quantized kernels.
    """
    tokenizer = Tokenizer.from_files(dict(files), str(directory))
    made = fingerprint(model, processor, tokenizer, dtype)
    if jax.process_index() == 0:
        for name, content in files.items():
            (directory / name).write_bytes(content)
        Manifest(model, processor, made, hashes or {}, base, source, weights).write(directory)


def dtype_name(params) -> str:
    """Returns the dtypes of a tree's leaves, such as "bfloat16" or "bfloat16+float32"."""
    return "+".join(sorted({np.dtype(leaf.dtype).name for leaf in jax.tree.leaves(params)}))
