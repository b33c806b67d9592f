"""Reads images, videos and PDFs: data URLs, files below allowed folders, addresses of allowed hosts."""

import base64
import binascii
import dataclasses
import pathlib
import re
import urllib.parse

from internvl3_jax.io.terminal import excerpt
from internvl3_jax.serve.errors import ApiError
from internvl3_jax.serve.fetch import Fetcher
from internvl3_jax.serve.files import read_below

_DATA = re.compile(r"data:(?P<type>[\w.+/-]*)(?P<parameters>(;[^,;]*)*),", re.ASCII)
_SCHEME = re.compile(r"([a-zA-Z][\w+.-]*):", re.ASCII)
# Length of base64 without "data:...,": longer than paths, and of its letters alone.
_BARE = re.compile(r"[A-Za-z0-9+/_\-\s]{256,}={0,2}\s*")


@dataclasses.dataclass(frozen=True)
class Sources:
    """Sources that images may come from.

    Attributes:
      roots: folders whose files may be read, absolute and without links.
      fetcher: for addresses.
      max_bytes: of an image.
    """

    roots: tuple[pathlib.Path, ...] = ()
    fetcher: Fetcher = Fetcher()
    max_bytes: int = 32 << 20

    def read(self, url: str, name: str, kind: str = "image/png") -> bytes:
        """Returns the bytes of an image, a video or a document.

        Args:
          url: data URL, address or path.
          name: its field, for errors.
          kind: media type of an example.

        Raises:
          ApiError: it cannot be read, or is not allowed.
        """
        try:
            return self._read(url, kind)
        except ApiError as error:
            error.message, error.param = f"{name}: {error.message}", name
            raise

    def _read(self, url: str, kind: str) -> bytes:
        match = _SCHEME.match(url)
        scheme = match[1].lower() if match else "file"
        if scheme == "data":
            return decode_data_url(url, kind)
        if scheme in ("http", "https"):
            return self.fetcher.fetch(url)
        if scheme == "file":
            if _BARE.fullmatch(url):
                raise ApiError(
                    f"is base64 without its beginning; write data:{kind};base64, in front of it"
                )
            return read_below(url, self.roots, self.max_bytes)
        raise ApiError(
            f"{excerpt(url)} begins with {excerpt(scheme)}; expected data:, https:, http: or file:"
        )


def decode_data_url(url: str, kind: str = "image/png") -> bytes:
    """Returns the bytes of a data URL (RFC 2397) in base64.

    kind: media type of an example; the URL's must be of its group, such as image/.

    Raises:
      ApiError: it is no such data URL.
    """
    match = _DATA.match(url[:1000])
    if match is None:
        raise ApiError(f"is not a data URL; write data:{kind};base64, and the file in base64")
    given, group = match["type"].lower(), kind.split("/")[0]
    # A GIF is an image, or a video.
    fits = given.startswith(f"{group}/") or given in ("", "application/octet-stream")
    if not fits and not (group == "video" and given == "image/gif"):
        raise ApiError(f"is of the type {excerpt(given)}; expected one such as {kind}")
    if not match["parameters"].lower().endswith(";base64"):
        raise ApiError(f"is a data URL without base64; write data:{kind};base64,...")
    text = url[match.end() :]
    if "%" in text:
        text = urllib.parse.unquote(text)
    try:
        data = base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(f"is not base64 ({error}); encode the file's bytes") from error
    if not data:
        raise ApiError("is an empty file; encode the file's bytes")
    return data
