"""Decodes the ids of an answer to text as they come, and watches for stop texts."""

from collections.abc import Sequence

from internvl3_jax.data.text.tokenizer import Tokenizer


class TextStreamer:
    """Decodes ids to text piece by piece; what may be the beginning of a stop text is held back.

    Attributes:
      ids: read so far, the one that completed a stop text included.
      text: certain so far, without the stop text.
      ended: whether a stop text has come.
    """

    def __init__(self, tokenizer: Tokenizer, stop: str | Sequence[str]):
        self.ids: list[int] = []
        self.text = ""
        self.ended = False
        self._held = ""
        self._stop = [text for text in ([stop] if isinstance(stop, str) else stop) if text]
        self._decoder = tokenizer.stream()

    def read(self, ids: Sequence[int]) -> str:
        """Takes ids, up to the end of a stop text; returns the text that has become certain."""
        known = len(self.text)
        for token in ids:
            if self.ended:
                break
            self.ids.append(token)
            self._held += self._decoder.step(token) or ""
            self._release()
        return self.text[known:]

    def finish(self) -> str:
        """Returns the text that was held back."""
        known = len(self.text)
        if not self.ended:
            self._held += self._decoder.flush() or ""
            self._release()
            self.text += self._held
        self._held = ""
        return self.text[known:]

    def _release(self) -> None:
        # A complete stop text: the answer ends before it.
        starts = [start for text in self._stop if (start := self._held.find(text)) >= 0]
        if starts:
            self.text, self._held = self.text + self._held[: min(starts)], ""
            self.ended = True
            return
        # The longest end that may be the beginning of a stop text stays.
        longest = max((len(text) - 1 for text in self._stop), default=0)
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(text.startswith(self._held[-size:]) for text in self._stop):
                self.text, self._held = self.text + self._held[:-size], self._held[-size:]
                return
        self.text, self._held = self.text + self._held, ""
