"""A model class for VLMEvalKit, which must be installed.

For a data set of images that the model card has from VLMEvalKit, rows are asked as for the card:
its prompt, tiles, stored images and longest answer. Other data sets are asked with the prompt of
the kit's data set, in the form of the kit's class for InternVL, whose own functions lay it out.
"""

import pathlib
from collections.abc import Mapping, Sequence

from vlmeval.dataset import DATASET_MODALITY
from vlmeval.smp import LMUDataRoot
from vlmeval.vlm.base import BaseModel
from vlmeval.vlm.internvl.utils import build_video_prompt, reorganize_prompt

from internvl3_jax.evaluate import asking
from internvl3_jax.evaluate.kits.asked_model import AskedModel
from internvl3_jax.evaluate.kits.card_rows import TABLES, CardRows
from internvl3_jax.evaluate.running import size_of
from internvl3_jax.evaluate.scorers.boxes import stored_point

_OTHER = {"tiles": "per image", "max_total_tiles": 64, "max_tiles": 6, "max_new_tokens": 4096}


class InternVL3JAX(BaseModel):
    """Answers the messages of VLMEvalKit.

    The kit calls classes with `is_api` from `--api-nproc` threads; their questions decode together.

    Args:
      checkpoint, delta, max_tiles, max_new_tokens, batch_size, more: as of `AskedModel`.
      reasoning: "on", "off", or "auto" as in the card's runs; USE_COT of the kit is not read.
    """

    INTERLEAVE = True
    VIDEO_LLM = False
    is_api = True

    def __init__(self, checkpoint: str, reasoning: str = "auto", **more):
        super().__init__()
        self.model = AskedModel(checkpoint, **more)
        size = size_of(self.model.checkpoint)
        root = pathlib.Path(LMUDataRoot())
        self._rows = CardRows(root, reasoning, size, self.model.delta)

    def use_custom_prompt(self, dataset: str) -> bool:
        return dataset in TABLES

    def build_prompt(self, line: Mapping, dataset: str) -> list[dict]:
        """Returns a message that names the row; `generate_inner` reads it."""
        index = line["index"]
        return [{"type": "text", "value": f"{dataset}, row {index}", "index": index}]

    def generate_inner(self, message: Sequence[Mapping], dataset: str | None = None) -> str:
        """Returns the answer to a message of `build_prompt` or of a data set of the kit.

        Raises:
          ValueError, OSError: the question cannot be asked.
        """
        if "index" in message[0]:
            variant = self._rows.variant(dataset)
            question = self._rows.question(dataset, message[0]["index"])
            answer = self.model.answer(question, self.model.options(variant.options()))["text"]
            return stored_point(answer) if variant.task.scorer == "screenspot" else answer
        return self.model.answer(*self._other(message, dataset))["text"]

    def _other(self, message: Sequence[Mapping], dataset: str | None):
        """Returns the question and options of a message whose data set is not the card's."""
        paths = [item["value"] for item in message if item["type"] == "image"]
        is_video = dataset is not None and DATASET_MODALITY(dataset) == "VIDEO"
        text = reorganize_prompt(message, len(paths), dataset=dataset)
        if is_video:
            text = build_video_prompt(text, dataset)
        options = self.model.options(_OTHER)
        question = asking.Question(text, paths, f"a question of {dataset}")
        return question, options | ({"max_tiles": 1} if is_video else {})
