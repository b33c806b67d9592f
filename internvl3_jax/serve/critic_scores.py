"""Scores several answers to one question by the server's critic (`--critic`)."""

import threading
from collections.abc import Sequence

from internvl3_jax.data.text.chat_template import ChatError
from internvl3_jax.inference.generator import ContextError
from internvl3_jax.serve.chat_request import ChatRequest
from internvl3_jax.serve.errors import ApiError
from internvl3_jax.serve.media import Sources
from internvl3_jax.serve.messages import Turn


class CriticScores:
    """Calls a critic for one request at a time, since each call takes memory of the device.

    Args:
      critic: of `internvl3_jax.Critic`.
      sources: where images may come from.
    """

    def __init__(self, critic, sources: Sources):
        self._critic, self._sources = critic, sources
        self._lock = threading.Lock()

    def score(self, asked: ChatRequest, texts: Sequence[str]) -> list[dict]:
        """Returns score, steps and the scores of the steps of each answer.

        Raises:
          ApiError: an answer is too long for the critic.
        """
        turn = the_question(asked)
        images = [self._sources.read(part.url, part.name) for part in turn.images]
        try:
            with self._lock:
                scored = self._critic.score(turn.message["content"], images, texts)
        except (ContextError, ChatError) as error:
            raise ApiError(f"the critic cannot score the answers: {error}") from error
        return [
            {"score": scores.score, "steps": scores.steps, "scores": scores.scores}
            for scores in scored
        ]


def the_question(asked: ChatRequest) -> Turn:
    """Returns the only question of a request.

    Raises:
      ApiError: the critic does not know conversations, videos and PDFs.
    """
    turns = [turn for turn in asked.turns if turn.message["role"] != "system"]
    if len(turns) != 1:
        raise ApiError(
            "the critic scores answers to one question; begin a new conversation for it",
            param="messages",
        )
    if not turns[0].has_images_alone:
        raise ApiError(
            "the critic does not see videos and PDFs; send frames or pages as images",
            param="messages",
        )
    return turns[0]
