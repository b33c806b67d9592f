"""One answer while it comes: ids become text, reasoning, log-probabilities and a finish reason."""

import dataclasses
from collections.abc import Callable, Sequence

from internvl3_jax.data.text.tokenizer import Tokenizer
from internvl3_jax.inference.engine.request import Piece, TokenLogprob
from internvl3_jax.inference.text_stream import TextStreamer
from internvl3_jax.serve.answer_text import AnswerText


@dataclasses.dataclass(frozen=True)
class Delta:
    """The text and tokens that a piece adds to an answer.

    Attributes:
      logprobs: entries as OpenAI returns them; None if they were not asked for.
      finish: "stop" or "length" with the last one.
    """

    reasoning: str = ""
    content: str = ""
    logprobs: list[dict] | None = None
    finish: str | None = None

    @property
    def is_empty(self) -> bool:
        return not (self.reasoning or self.content or self.logprobs or self.finish)


class Choice:
    """An answer while it comes.

    Args:
      stop: texts that end it.
      stop_ids: ids that end it; they are not part of its text.
      token_bytes: bytes of an id, for log-probabilities; None if they were not asked for.

    Attributes:
      text: reasoning and content so far.
      num_tokens: so far, the stop token included.
      logprobs: all entries so far.
      finish: "stop" or "length" at the end.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str],
        stop_ids: Sequence[int],
        *,
        thinking: bool,
        token_bytes: Callable[[int], bytes] | None = None,
    ):
        self._streamer = TextStreamer(tokenizer, stop)
        self._stop_ids, self._token_bytes = stop_ids, token_bytes
        self.text = AnswerText(thinking)
        self.num_tokens = 0
        self.logprobs: list[dict] | None = None if token_bytes is None else []
        self.finish: str | None = None

    def take(self, piece: Piece) -> Delta:
        """Takes the next ids. At a stop text the answer is complete, whatever follows."""
        known = len(self._streamer.ids)
        stopped = bool(piece.ids) and piece.ids[-1] in self._stop_ids
        text = self._streamer.read(piece.ids[:-1] if stopped else piece.ids)
        used = len(self._streamer.ids) - known
        self.num_tokens += used + (stopped and not self._streamer.ended)
        if self._streamer.ended:
            self.finish = "stop"
        elif piece.finish is not None:
            self.finish = "stop" if stopped else piece.finish
            text += self._streamer.finish()
        reasoning, content = self.text.push(text, final=self.finish is not None)
        entries = self._entries(piece, used)
        return Delta(reasoning, content, entries, self.finish)

    def _entries(self, piece: Piece, used: int) -> list[dict] | None:
        """Returns the entries of the first `used` tokens."""
        if self.logprobs is None:
            return None
        entries = [
            self._entry(token, logprob)
            for token, logprob in zip(piece.ids[:used], piece.logprobs[:used], strict=True)
        ]
        self.logprobs += entries
        return entries

    def _entry(self, token: int, logprob: TokenLogprob) -> dict:
        top = [self._token(other, value) for other, value in logprob.top]
        return self._token(token, logprob.logprob) | {"top_logprobs": top}

    def _token(self, token: int, logprob: float) -> dict:
        data = self._token_bytes(token)
        # -9999 as OpenAI writes it: JSON has no infinity.
        value = max(float(logprob), -9999.0)
        return {"token": data.decode(errors="replace"), "logprob": value, "bytes": list(data)}
