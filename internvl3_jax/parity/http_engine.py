"""A server with OpenAI's interface as an engine. Needs numpy alone.

It gives the answer, the number of prompt tokens, and log-probabilities of the first token. A case
with frames or with a V2PE step of its own has no place in OpenAI's interface and is left out, but
`internvl3_jax.serve` has fields for both.
"""

import base64
import json
import pathlib
import urllib.error
import urllib.request

import numpy as np

from internvl3_jax.parity.folder import Case, PackError

_SECONDS = 600


class HttpEngine:
    """Asks a server.

    Args:
      url: of the interface, such as http://localhost:8000/v1.
      name: of the model; None: the first that the server lists.
      is_ours: whether the server is internvl3_jax.serve.
    """

    def __init__(self, url: str, name: str | None = None, is_ours: bool = False):
        self.url, self.is_ours = url.rstrip("/"), is_ours
        self.name = name or self._first_model()

    def _first_model(self) -> str:
        listed = self._call("/models").get("data") or []
        if not listed:
            raise PackError(f"{self.url}/models lists no model; name one with --served_name")
        return listed[0]["id"]

    def run(self, root: pathlib.Path, case: Case) -> dict | None:
        """Returns the stages of a case, or None for one that the interface cannot express."""
        request = case.request
        if (request.frames or request.delta is not None) and not self.is_ours:
            return None
        # A frame is an image of one tile, whose place the text says.
        names = [f"Frame-{number + 1}: <image>\n" for number in range(len(request.frames))]
        limit = {"max_tiles": 1} if request.frames else {}
        parts = [
            {"type": "image_url", "image_url": {"url": _data_url(root / path)} | limit}
            for path in (*request.images, *request.frames)
        ]
        text = {"type": "text", "text": "".join(names) + request.question}
        body = ({} if request.delta is None else {"delta": request.delta}) | {
            "model": self.name,
            "messages": [{"role": "user", "content": [*parts, text]}],
            "max_tokens": request.max_new_tokens,
            "temperature": 0,
            "logprobs": True,
            "top_logprobs": len(case.top),
        }
        reply = self._call("/chat/completions", body)
        choice = reply["choices"][0]
        stages = {"answer": choice["message"]["content"] or ""}
        if reply.get("usage"):
            stages["prompt_tokens"] = np.asarray(reply["usage"]["prompt_tokens"])
        content = (choice.get("logprobs") or {}).get("content")
        if content:
            stages["logprobs"] = _logprobs(content[0].get("top_logprobs") or [], len(case.top))
        return {name: value for name, value in stages.items() if value is not None}

    def _call(self, path: str, body: dict | None = None) -> dict:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        try:
            request = urllib.request.Request(self.url + path, data, headers)
            with urllib.request.urlopen(request, timeout=_SECONDS) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as error:
            detail = error.read(500).decode(errors="replace")
            raise PackError(f"{self.url}{path}: status {error.code}: {detail}") from error
        except (OSError, ValueError) as error:
            raise PackError(f"{self.url}{path}: {error}; is it a server's /v1?") from error


def _logprobs(rows: list[dict], count: int) -> np.ndarray | None:
    """Returns the largest log-probabilities in order; tokens may be spelled in several ways."""
    values = sorted((row["logprob"] for row in rows), reverse=True)[:count]
    return np.asarray(values, np.float64) if len(values) == count else None


def _data_url(path: pathlib.Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
