"""Answers as the JSON objects of OpenAI's chat completions."""

import dataclasses
import secrets
import time
from collections.abc import Sequence

from internvl3_jax.serve.choice import Choice, Delta


@dataclasses.dataclass(frozen=True)
class Reply:
    """Fields that all objects of one response repeat."""

    model: str
    id: str = dataclasses.field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    def _object(self, kind: str, choices: list[dict]) -> dict:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def completion(
        self, choices: Sequence[Choice], usage: dict, scores: Sequence[dict] | None = None
    ) -> dict:
        """Returns the whole response.

        Args:
          scores: what the critic says about each answer.
        """
        written = [_choice(index, choice) for index, choice in enumerate(choices)]
        for choice, own in zip(written, scores or (), strict=scores is not None):
            choice["critic"] = own
        return self._object("chat.completion", written) | {"usage": usage}

    def first(self, index: int) -> dict:
        """Returns the chunk that an answer begins with."""
        return self._chunk(index, {"role": "assistant", "content": ""}, None, None)

    def chunk(self, index: int, delta: Delta) -> dict:
        """Returns the chunk of a piece."""
        added = {}
        if delta.reasoning:
            added["reasoning_content"] = delta.reasoning
        if delta.content:
            added["content"] = delta.content
        return self._chunk(index, added, _logprobs(delta.logprobs), delta.finish)

    def usage_chunk(self, usage: dict) -> dict:
        """Returns the chunk after all answers."""
        return self._object("chat.completion.chunk", []) | {"usage": usage}

    def _chunk(self, index: int, delta: dict, logprobs: dict | None, finish: str | None) -> dict:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return self._object("chat.completion.chunk", [choice])


def usage(prompt_tokens: int, cached_tokens: int, choices: Sequence[Choice]) -> dict:
    """Returns the number of tokens. The prompt counts once, however many answers there are."""
    completion = sum(choice.num_tokens for choice in choices)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": prompt_tokens + completion,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


def _choice(index: int, choice: Choice) -> dict:
    message = {"role": "assistant", "content": choice.text.content, "refusal": None}
    if choice.text.reasoning is not None:
        message["reasoning_content"] = choice.text.reasoning
    return {
        "index": index,
        "message": message,
        "logprobs": _logprobs(choice.logprobs),
        "finish_reason": choice.finish,
    }


def _logprobs(entries: list[dict] | None) -> dict | None:
    return None if entries is None else {"content": entries, "refusal": None}
