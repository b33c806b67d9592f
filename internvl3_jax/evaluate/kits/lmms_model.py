"""A chat model for lmms-eval, which must be installed.

Texts are those of lmms-eval's tasks. The rest is what InternVL was trained with: the system message,
and images before the text, numbered if there are several. The tile limit is that of the model card's
program for the benchmark.
"""

from collections.abc import Mapping, Sequence

from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.api.registry import register_model
from lmms_eval.protocol import ChatMessages

from internvl3_jax.data.text.chat_template import IMAGE_TAG
from internvl3_jax.evaluate import asking
from internvl3_jax.evaluate.frames import read_video
from internvl3_jax.evaluate.kits.asked_model import AskedModel
from internvl3_jax.evaluate.kits.lmms_manifest import MODEL
from internvl3_jax.evaluate.prompts import numbered

# Beginning of a task's name -> tiles of an image, where the card's program has not 6.
TILES = {
    **dict.fromkeys(("chartqa", "mmiu", "mmmu", "mmerealworld", "screenspot", "vcr_wiki"), 12),
    "docvqa": 18,
    **dict.fromkeys(("infovqa", "ocrbench"), 24),
}
_TILES, _TOTAL_TILES, _NEW_TOKENS = 6, 64, 1024


@register_model(MODEL)
class InternVL3JAX(lmms):
    """Answers all requests of a task in one running batch.

    Args:
      checkpoint, delta, max_tiles, max_new_tokens, batch_size, more: as of `AskedModel`. The tasks'
        own max_new_tokens is 1024 where they have none.
      num_frames: frames of a video, each one tile.
      device: of lmms-eval's command line; devices are chosen as in JAX_PLATFORMS.
    """

    is_simple = False

    def __init__(
        self, checkpoint: str, num_frames: int = 32, batch_size=8, device: str = "", **more
    ):
        super().__init__()
        self.model = AskedModel(checkpoint, batch_size=int(batch_size), **more)
        self.num_frames = num_frames

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Returns the answers to requests, in their order.

        Raises:
          ValueError, OSError: a question cannot be asked; the message names task and document.
        """
        return self.model.answer_all(self._answer, requests)

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("internvl3_jax generates answers; choose a generate_until task")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        raise NotImplementedError("internvl3_jax answers one question per document")

    def _answer(self, request: Instance) -> GenerationResult:
        context, to_messages, arguments, number, task, split = request.args
        name = f"{task}, document {number} of {split}"
        messages = ChatMessages(messages=to_messages(self.task_dict[task][split][number]))
        system, text = _texts(messages, name)
        images, videos, sounds = messages.extract_media()
        if sounds or len(videos) > 1 or (videos and images):
            raise ValueError(f"{name}: expected images, or one video, and no sound")
        options = _options(task, arguments) | ({} if system is None else {"system": system})
        options = self.model.options(options)
        if videos:
            images, _, _ = read_video(videos[0], "mvbench", self.num_frames)
            text = numbered("Frame", len(images), always=True, hyphen="") + text
            options["max_tiles"] = 1
        elif text.count(IMAGE_TAG) != len(images):  # else the text says where they are
            text = (numbered("Image", len(images)) if images else "") + text
        answer = self.model.answer(asking.Question(text, images, name), options)
        self.cache_hook.add_partial("generate_until", (context, arguments), answer["text"])
        counts = TokenCounts(answer["prompt_tokens"], answer["new_tokens"])
        return GenerationResult(answer["text"], counts)


def _texts(messages: ChatMessages, name: str) -> tuple[str | None, str]:
    """Returns the system message, if there is one, and the user's text."""
    roles = [message.role for message in messages.messages]
    if roles not in (["user"], ["system", "user"]):
        raise ValueError(f"{name}: has turns of {', '.join(roles)}; expected one of the user")
    found = [
        "".join(part.text for part in message.content if part.type == "text")
        for message in messages.messages
    ]
    return (None, *found) if len(found) == 1 else (found[0], found[1])


def _options(task: str, arguments: Mapping) -> dict:
    """Returns the options of `Chat` for a task of lmms-eval and its generation arguments."""
    tiles = next((tiles for start, tiles in TILES.items() if task.startswith(start)), _TILES)
    sampled = arguments.get("do_sample", True)
    return {
        "tiles": "per image",
        "max_total_tiles": _TOTAL_TILES,
        "max_tiles": tiles,
        "max_new_tokens": arguments.get("max_new_tokens", _NEW_TOKENS),
        "temperature": float(arguments.get("temperature") or 0) if sampled else 0.0,
        "top_p": float(arguments.get("top_p") or 1),
    }
