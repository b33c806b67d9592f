"""One conversation of a source to a `Sample`: frames, tiles, ids, weights and positions, all drawn
from the sample's own rng.
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
from internvl3_jax.data.sources.internvl_jsonl import Conversation
from internvl3_jax.data.text.chat_template import Encoded, encode_chat
from internvl3_jax.data.text.tokenizer import Tokenizer
from internvl3_jax.positions import parse_delta, sample_deltas


class ExampleBuilder:
    """Makes samples of conversations. Threads may share it, and it can be sent to other processes."""

    def __init__(self, config: DataConfig, processor: ProcessorConfig, tokenizer: Tokenizer):
        if not 1 <= config.min_frames <= config.max_frames:
            raise ValueError(
                f"data.min_frames is {config.min_frames}; it must lie in 1..max_frames ({config.max_frames})"
            )
        for name, known in (("overlong", truncation.RULES), ("loss_reduction", AVERAGES)):
            if getattr(config, name) not in known:
                raise ValueError(
                    f"data.{name} is {getattr(config, name)!r}; it must be one of {', '.join(known)}"
                )
        if config.pairs and config.overlong == "truncate":
            raise ValueError(
                "data.overlong is truncate; of a pair both answers are needed whole: set it to error or drop"
            )
        check_tile_rule(config.tiles, "data.tiles")
        processor = dataclasses.replace(processor, tiles=config.tiles)
        self.config, self.processor, self.tokenizer = config, processor, tokenizer
        self.reference = ReferenceTable(config.ref_logps_file) if config.ref_logps_file else None
        self.deltas = [parse_delta(delta) for delta in config.deltas]
        self.frame_processor = dataclasses.replace(processor, use_thumbnail=False)

    def sample(self, source, row: int, rng: np.random.Generator) -> Sample:
        """The sample of a row of a source. ValueError or OSError if the row cannot be used."""
        conversation = self.read(source, row, rng)
        encoded, kept = self.encode(conversation, self.count(conversation))
        tiles = [self.cut(picture, conversation) for picture in conversation.pictures[:kept]]
        if conversation.augment:
            tiles = [recompress(part, rng) for part in tiles]
        deltas = sample_deltas(kept, rng, self.deltas)
        finish = finish_sample
        if self.config.pairs:
            finish = functools.partial(
                finish_pair, self.rejected(conversation, encoded), shared=self.config.share_question
            )
        sample = finish(encoded, tiles, deltas, self.processor, self.config.loss_reduction)
        return self.reference.added_to(sample) if self.reference else sample

    def read(self, source, row: int, rng: np.random.Generator) -> Conversation:
        fewest, most = self.config.min_frames, self.config.max_frames

        def choose(clip):
            return lambda footage: training_frames(footage, rng, fewest, most, clip)

        limits = {
            "max_pixels": self.config.max_image_pixels,
            "allow_truncated": self.config.allow_truncated,
        }
        conversation = source.conversation(row, choose, self.processor, limits)
        if self.config.pairs is (conversation.rejected is None):
            what = "no pair of answers" if self.config.pairs else "a pair of answers"
            raise PairError(
                f"the row is {what}, but data.pairs is {self.config.pairs} (pairs are for loss.kind mpo alone)"
            )
        return conversation

    def count(self, conversation: Conversation) -> list[int]:
        """Tiles of each picture."""
        settings = self._settings(conversation)
        return [
            count_tiles(*picture.size, settings, conversation.max_tiles)
            for picture in conversation.pictures
        ]

    def cut(self, picture, conversation: Conversation) -> np.ndarray:
        return cut_tiles(picture, self._settings(conversation), conversation.max_tiles)

    def encode(self, conversation: Conversation, tiles: list[int]) -> tuple[Encoded, int]:
        """(encoded, number of pictures kept), within a row by `config.overlong`."""
        limits = self.config.tokens_per_row, self.config.tiles_per_row
        return truncation.encode_within(
            conversation.messages, tiles, self.encode_all, *limits, self.config.overlong
        )

    def rejected(self, conversation: Conversation, chosen: Encoded) -> Encoded:
        """The other side of a pair. TooLong if the two are more than a row."""
        encoded = self.encode_all(
            conversation.other_side(),
            [count // self.processor.tokens_per_tile for _, count in chosen.runs],
        )
        tokens = pair_length(chosen, encoded, self.config.share_question)
        if tokens > self.config.tokens_per_row:
            sizes = [("tokens", tokens, self.config.tokens_per_row)]
            raise truncation.TooLong(
                truncation.complaint(
                    "a pair",
                    sizes,
                    "both its answers stand in one row; or set data.overlong to drop",
                )
            )
        return encoded

    def encode_all(self, messages, tiles) -> Encoded:
        return encode_chat(
            messages, tiles, self.tokenizer, self.processor, add_generation_prompt=False
        )

    def _settings(self, conversation: Conversation) -> ProcessorConfig:
        return self.frame_processor if conversation.is_video else self.processor
