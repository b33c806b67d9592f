"""Ids of an answer to its text, as they come."""

from collections.abc import Sequence

from internvl3_jax.data.text.tokenizer import Tokenizer


class TextStreamer:
    """Turns ids into text as they come, and watches for stop texts: what may be the beginning of
    one is held back.
    """

    def __init__(self, tokenizer: Tokenizer, stop: str | Sequence[str]):
        self.ids: list[int] = []
        self.text = ""
        self.ended = False
        self._held = ""
        self._stop = [text for text in ([stop] if isinstance(stop, str) else stop) if text]
        self._decoder = tokenizer.stream()

    def read(self, ids: Sequence[int]) -> str:
        """Takes ids up to the end of a stop text; returns the text that is certain by now."""
        before = len(self.text)
        for token in ids:
            if self.ended:
                break
            self.ids.append(token)
            self._held += self._decoder.step(token) or ""
            self._release()
        return self.text[before:]

    def finish(self) -> str:
        """The rest."""
        before = len(self.text)
        if not self.ended:
            self._held += self._decoder.flush() or ""
            self._release()
            self.text += self._held
        self._held = ""
        return self.text[before:]

    def _release(self) -> None:
        found = [place for text in self._stop if (place := self._held.find(text)) >= 0]
        if found:
            self.text, self._held = self.text + self._held[: min(found)], ""
            self.ended = True
            return
        longest = max((len(text) - 1 for text in self._stop), default=0)
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(text.startswith(self._held[-size:]) for text in self._stop):
                self.text, self._held = self.text + self._held[:-size], self._held[-size:]
                return
        self.text, self._held = self.text + self._held, ""
