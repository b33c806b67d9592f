"""Opens the sources of data that a configuration names."""

import importlib
import re
import warnings
from typing import Protocol

from internvl3_jax.config import DataConfig, ProcessorConfig
from internvl3_jax.data.sources.meta import MetaError, read_sources
from internvl3_jax.data.sources.row_source import Conversation, RowSource

_PYTHON = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


class Source(Protocol):
    """A finite source of conversations with random access.

    Attributes:
      name: Unique among the sources of a run.
      has_images: Whether any of its rows has an image.
      repeat: How often it is read in one pass over the mixture; a fraction reads a part.
      weight: Its share under data.source_weights "given", or None.
      identity: A text that changes whenever the content does.
      ordered: Whether rows are read in their own order. Only for a run with a single source.
    """

    name: str
    has_images: bool
    repeat: float
    weight: float | None
    identity: str
    ordered: bool

    def __len__(self) -> int: ...

    def locate(self, row: int) -> str:
        """Names a row in messages."""

    def conversation(
        self, row: int, choose, processor: ProcessorConfig, limits=None
    ) -> Conversation:
        """Reads a row."""


def is_python(source: str) -> bool:
    """Returns whether data.source is "package.module:function" and not a path."""
    return bool(_PYTHON.fullmatch(source))


def source_names(config: DataConfig) -> list[str]:
    """Returns the names of the sources in their order."""
    if is_python(config.source):
        return [source.name for source in open_sources(config)]
    return [spec.name for spec in read_sources(config.source)]


def open_sources(config: DataConfig) -> list[Source]:
    """Opens the sources of the mixture and counts their rows.

    Raises:
      MetaError, FileError: Names the file, entry or function that is wrong.
    """
    if is_python(config.source):
        return _python_sources(config)
    sources = [RowSource(spec) for spec in read_sources(config.source)]
    for source in sources:
        expected = source.spec.length
        if expected is not None and expected != len(source):
            warnings.warn(
                f"{config.source}, entry {source.name!r}: length is {expected:,}, but the "
                f"annotation has {len(source):,} rows",
                stacklevel=2,
            )
    return sources


def _python_sources(config: DataConfig) -> list[Source]:
    module, _, function = config.source.partition(":")
    try:
        create = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise MetaError(
            f"data.source is {config.source}: {error}; name an importable "
            f"MODULE:FUNCTION, a meta JSON or a file of rows"
        ) from error
    return create(config)
