"""Finds the rows of a JSON list of objects, as LLaVA and others store data, without parsing it.

Strings and brackets are tracked by numpy, a chunk at a time, so that a list of several gigabytes
needs no more memory than one row. What is inside of a row is checked when the row is read.
"""

from collections.abc import Callable

import numpy as np

from internvl3_jax.data.sources.files import FileError
from internvl3_jax.io.terminal import excerpt, one_line

BOM = b"\xef\xbb\xbf"
MAX_GAP = 1 << 20  # bytes between two rows
_STRUCTURE = np.zeros(256, np.int8)  # change of the depth at each byte
_STRUCTURE[[ord("["), ord("{")]] = 1
_STRUCTURE[[ord("]"), ord("}")]] = -1


def is_list(start: bytes) -> bool:
    """Returns whether a file that starts with these bytes holds a JSON list."""
    return start.removeprefix(BOM).lstrip().startswith(b"[")


class ListScanner:
    """Finds the objects of one list: `feed` takes the file's bytes in order, then `finish`.

    Both raise FileError if the file is not a list of objects, or is not complete.
    """

    def __init__(self, path: str, add_row: Callable[[int, bytes], None], max_row: int):
        """Starts before the first byte.

        Args:
          path: What errors call the file.
          add_row: Takes the position of a row and its bytes, which are empty beyond `max_row`.
          max_row: Bytes of a row that are kept.
        """
        self.path, self.add_row, self.max_row = one_line(path), add_row, max_row
        self.position = 0  # of the chunk in the file
        self.depth, self.in_string, self.backslashes = 0, False, 0
        self.pending = bytearray()  # since the last start or end of a row
        self.rows, self.start, self.end = 0, 0, 0
        self.is_in_row = False

    def feed(self, chunk: bytes) -> None:
        codes = np.frombuffer(chunk, np.uint8)
        places, depths = self._brackets(codes)
        opens = _STRUCTURE[codes[places]] > 0
        # A row begins where the depth becomes 2 and ends where it is 1 again.
        edges = (opens & (depths == 2)) | (~opens & (depths == 1))
        taken = 0
        for place in places[edges].tolist():
            stop = place if chunk[place] in b"{[" else place + 1
            self._keep(chunk[taken:stop])
            taken = stop
            if stop == place:
                self._begin(place, chunk[place])
            else:
                self._finish_row(place, chunk[place])
        self._keep(chunk[taken:])
        self.depth = int(depths[-1]) if len(depths) else self.depth
        self.position += len(chunk)

    def finish(self) -> int:
        """Returns the position after the last row."""
        rest = b"".join(bytes(self.pending).removeprefix(BOM).split())
        if self.is_in_row or self.depth or rest != (b"]" if self.rows else b"[]"):
            raise FileError(
                f"{self.path}: is not a complete JSON list of rows: after row {self.rows} it has "
                f"{excerpt(rest[:60].decode('utf-8', 'replace'))}; was it written or downloaded "
                f"completely?"
            )
        return self.end

    def _brackets(self, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Places of the brackets outside of strings, and the depth after each."""
        quotes = np.flatnonzero(codes == ord('"'))
        is_backslash = codes == ord("\\")
        if self.backslashes or is_backslash.any():
            # A quote after an odd number of backslashes is a character of its string.
            others = np.where(is_backslash, -1 - self.backslashes, np.arange(len(codes)))
            last_other = np.maximum.accumulate(others)
            before = np.concatenate([[self.backslashes], np.arange(len(codes)) - last_other])
            quotes = quotes[before[quotes] % 2 == 0]
            self.backslashes = int(before[-1])
        brackets = np.flatnonzero(_STRUCTURE[codes])
        outside = (np.searchsorted(quotes, brackets) + self.in_string) % 2 == 0
        self.in_string = bool((len(quotes) + self.in_string) % 2)
        places = brackets[outside]
        depths = self.depth + np.cumsum(_STRUCTURE[codes[places]], dtype=np.int64)
        return places, depths

    def _keep(self, data: bytes) -> None:
        if not self.is_in_row and len(self.pending) + len(data) > MAX_GAP:
            raise FileError(f"{self.path}: has more than {MAX_GAP:,} bytes between two rows")
        if len(self.pending) <= self.max_row:  # a row beyond the limit is an error when it is read
            self.pending += data

    def _begin(self, place: int, bracket: int) -> None:
        gap = bytes(self.pending).removeprefix(b"" if self.rows else BOM).strip()
        if gap != (b"," if self.rows else b"[") or bracket != ord("{"):
            raise FileError(
                f"{self.path}: item {self.rows + 1} of the list is not an object, or not separated "
                f"by one comma; expected [{{...}}, {{...}}]"
            )
        self.start, self.is_in_row = self.position + place, True
        self.pending.clear()

    def _finish_row(self, place: int, bracket: int) -> None:
        if bracket != ord("}"):
            raise FileError(f"{self.path}: item {self.rows + 1} of the list ends with ]")
        row = bytes(self.pending) if len(self.pending) <= self.max_row else b""
        self.add_row(self.start, row)
        self.rows, self.end = self.rows + 1, self.position + place + 1
        self.is_in_row = False
        self.pending.clear()
