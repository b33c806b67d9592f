"""The sources that a configuration names, opened."""

import warnings

from internvl3_jax.config import DataConfig, ProcessorConfig
from internvl3_jax.data import digits
from internvl3_jax.data.meta import read_meta
from internvl3_jax.data.official import Conversation, OfficialSource
from internvl3_jax.data.tiles import image_limit


class DigitsConversations:
    """The generated digits as a source of conversations."""

    name, has_pictures, repeat, weight = "digits", True, 1.0, None

    def __init__(self, length: int, seed: int):
        self.questions = digits.DigitsSource(length, seed)

    @property
    def identity(self) -> str:
        """As that of `OfficialSource`."""
        return f"{len(self)} digits questions, seed {self.questions.seed}"

    def __len__(self) -> int:
        return len(self.questions)

    def locate(self, row: int) -> str:
        return f"{self.name} row {row}"

    def conversation(self, row: int, choose, processor: ProcessorConfig, limits=None) -> Conversation:
        question = self.questions[row]
        limit = image_limit(processor, len(question.pictures))
        return Conversation(question.messages, question.pictures, limit)


def source_names(config: DataConfig) -> list[str]:
    """Names of the sources by their number."""
    return ["digits"] if config.source == "digits" else [spec.name for spec in read_meta(config.source)]


def open_sources(config: DataConfig) -> list:
    """The sources of the mixture, their files opened and counted. Raises MetaError or FileError."""
    if config.source == "digits":
        return [DigitsConversations(config.samples, config.seed)]
    sources = [OfficialSource(spec) for spec in read_meta(config.source)]
    for source in sources:
        expected = source.spec.length
        if expected is not None and expected != len(source):
            warnings.warn(
                f"{config.source}, entry {source.name!r}: length is {expected:,}, but the annotation has {len(source):,} rows",
                stacklevel=2,
            )
    return sources
