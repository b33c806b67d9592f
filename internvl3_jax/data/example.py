"""Builds a `Sample` of one conversation: frames, tiles, token ids, loss weights and positions.

Everything random is sampled from the rng of the sample.
"""

import dataclasses
import functools

import numpy as np

from internvl3_jax.config import DataConfig, ProcessorConfig, check_tile_rule
from internvl3_jax.data import truncation
from internvl3_jax.data.batch import AVERAGES, Sample, finish_sample
from internvl3_jax.data.media.augment import recompress
from internvl3_jax.data.media.tiles import count_tiles, cut_tiles
from internvl3_jax.data.media.video import training_frames
from internvl3_jax.data.pairs import PairError, finish_pair, pair_length
from internvl3_jax.data.reference_table import ReferenceTable
from internvl3_jax.data.sources.row_source import Conversation
from internvl3_jax.data.text.chat_template import Encoded, encode_chat
from internvl3_jax.data.text.tokenizer import Tokenizer
from internvl3_jax.positions import parse_delta, sample_deltas


class ExampleBuilder:
    """Builds samples. Threads may share it, and it can be sent to other processes."""

    def __init__(self, config: DataConfig, processor: ProcessorConfig, tokenizer: Tokenizer):
        if not 1 <= config.min_frames <= config.max_frames:
            raise ValueError(
                f"data.min_frames is {config.min_frames}; it must be in 1..max_frames "
                f"({config.max_frames})"
            )
        for name, known in (("overlong", truncation.RULES), ("loss_reduction", AVERAGES)):
            if getattr(config, name) not in known:
                raise ValueError(
                    f"data.{name} is {getattr(config, name)!r}; it must be one of "
                    f"{', '.join(known)}"
                )
        if config.pairs and config.overlong == "truncate":
            raise ValueError(
                "data.overlong is truncate, but a pair needs both answers complete; set it to "
                "error or drop"
            )
        check_tile_rule(config.tiles, "data.tiles")
        processor = dataclasses.replace(processor, tiles=config.tiles)
        self.config, self.processor, self.tokenizer = config, processor, tokenizer
        self.reference = ReferenceTable(config.ref_logps_file) if config.ref_logps_file else None
        self.deltas = [parse_delta(delta) for delta in config.deltas]
        self.frame_processor = dataclasses.replace(processor, use_thumbnail=False)

    def sample(self, source, row: int, rng: np.random.Generator) -> Sample:
        """Builds the sample of a row. ValueError or OSError if the row cannot be used."""
        conversation = self.read(source, row, rng)
        encoded, kept = self.encode(conversation, self.count(conversation))
        tiles = [self.cut(image, conversation) for image in conversation.images[:kept]]
        if conversation.augment:
            tiles = [recompress(image_tiles, rng) for image_tiles in tiles]
        deltas = sample_deltas(kept, rng, self.deltas)
        finish = finish_sample
        if self.config.pairs:
            finish = functools.partial(
                finish_pair, self.rejected(conversation, encoded), shared=self.config.share_question
            )
        sample = finish(encoded, tiles, deltas, self.processor, self.config.loss_reduction)
        return self.reference.added_to(sample) if self.reference else sample

    def read(self, source, row: int, rng: np.random.Generator) -> Conversation:
        """Reads a row and its images. PairError if it is a pair and should not be, or reverse."""
        fewest, most = self.config.min_frames, self.config.max_frames

        def choose(clip):
            return lambda footage: training_frames(footage, rng, fewest, most, clip)

        limits = {
            "max_pixels": self.config.max_image_pixels,
            "allow_truncated": self.config.allow_truncated,
        }
        conversation = source.conversation(row, choose, self.processor, limits)
        if self.config.pairs is (conversation.rejected is None):
            kind = "no pair of answers" if self.config.pairs else "a pair of answers"
            raise PairError(
                f"the row is {kind}, but data.pairs is {self.config.pairs} (only loss.kind mpo "
                f"takes pairs)"
            )
        return conversation

    def count(self, conversation: Conversation) -> list[int]:
        """Counts the tiles of each image."""
        settings = self._settings(conversation)
        return [
            count_tiles(*image.size, settings, conversation.max_tiles)
            for image in conversation.images
        ]

    def cut(self, image, conversation: Conversation) -> np.ndarray:
        """Cuts an image of the conversation into tiles u8[n, S, S, 3]."""
        return cut_tiles(image, self._settings(conversation), conversation.max_tiles)

    def encode(self, conversation: Conversation, tiles: list[int]) -> tuple[Encoded, int]:
        """Encodes within a row by `config.overlong`; returns it and the number of images kept."""
        limits = self.config.tokens_per_row, self.config.tiles_per_row
        return truncation.encode_within(
            conversation.messages, tiles, self.encode_all, *limits, self.config.overlong
        )

    def rejected(self, conversation: Conversation, chosen: Encoded) -> Encoded:
        """Encodes the rejected side of a pair. TooLong if both sides do not fit into a row."""
        encoded = self.encode_all(
            conversation.other_side(),
            [count // self.processor.tokens_per_tile for _, count in chosen.runs],
        )
        tokens = pair_length(chosen, encoded, self.config.share_question)
        if tokens > self.config.tokens_per_row:
            sizes = [("tokens", tokens, self.config.tokens_per_row)]
            raise truncation.TooLong(
                truncation.too_long_message(
                    "a pair",
                    sizes,
                    "both its answers are in one row; or set data.overlong to drop",
                )
            )
        return encoded

    def encode_all(self, messages, tiles) -> Encoded:
        """Encodes a conversation of any length."""
        return encode_chat(
            messages, tiles, self.tokenizer, self.processor, add_generation_prompt=False
        )

    def _settings(self, conversation: Conversation) -> ProcessorConfig:
        return self.frame_processor if conversation.is_video else self.processor
