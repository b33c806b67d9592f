"""Where images come from: files below allowed folders, addresses of allowed hosts, data URLs; and
how the parts of a message become a text with places.
"""

import base64
import contextlib
import http.server
import os
import threading
import time

import pytest

from internvl3_jax.serve.errors import ApiError
from internvl3_jax.serve.fetch import Fetcher
from internvl3_jax.serve.files import read_below
from internvl3_jax.serve.limits import Limits
from internvl3_jax.serve.media import Sources, decode_data_url
from internvl3_jax.serve.messages import read_messages

# --- messages ------------------------------------------------------------------------------------

IMAGE = {"type": "image_url", "image_url": {"url": "x"}}


def text(value: str) -> dict:
    return {"type": "text", "text": value}


@pytest.mark.parametrize(
    "content, expected",
    [
        ("Hi", "Hi"),
        ([text("Hi"), text("there")], "Hi\nthere"),
        ([IMAGE, text("Hi")], "<image>\nHi"),
        ([text("Hi"), IMAGE], "<image>\nHi"),
        ([IMAGE, IMAGE, text("Hi")], "Image-1: <image>\nImage-2: <image>\nHi"),
        ([IMAGE], "<image>\n"),
        ([text("a"), IMAGE, text("b")], "a\n<image>\nb"),
        ([text("a"), IMAGE, text("b"), IMAGE], "a\n<image>\nb\n<image>"),
        ([text("First: <image> what?"), IMAGE], "First: <image> what?"),
        ([IMAGE, text("<image> is a tag")], "<image> is a tag"),
    ],
)
def test_places_of_images(content, expected):
    (turn,) = read_messages([{"role": "user", "content": content}], Limits())
    assert turn.message["content"] == expected
    images = 0 if isinstance(content, str) else content.count(IMAGE)
    assert len(turn.images) == images
    assert turn.message["content"].count("<image>") >= images


def test_tags_without_images_are_text():
    """A tag of a turn without images does not take the image of a later one."""
    turns = read_messages(
        [
            {"role": "user", "content": "What does <image> mean in HTML?"},
            {"role": "assistant", "content": "Nothing: it is <img>."},
            {"role": "user", "content": [IMAGE, text("And here?")]},
        ],
        Limits(),
    )
    assert turns[0].message["images"] == 0
    assert turns[2].message["content"] == "<image>\nAnd here?"


def test_roles():
    messages = [
        {"role": "developer", "content": [text("a"), text("b")]},
        {"role": "user", "content": "Hi", "name": "me"},
        {"role": "assistant", "content": "x", "reasoning_content": "y", "refusal": None},
        {"role": "user", "content": "Hi"},
    ]
    turns = read_messages(messages, Limits())
    assert [turn.message["role"] for turn in turns] == ["system", "user", "assistant", "user"]
    assert turns[0].message["content"] == "a\nb"


# --- files ---------------------------------------------------------------------------------------


def test_files_below(place):
    root = (place / "root").resolve()
    inside = (root / "a.png").read_bytes()
    for url in ("a.png", "./a.png", "sub/../a.png", str(root / "a.png"), f"file://{root}/a.png"):
        assert read_below(url, [root], 1 << 20) == inside, url
    (root / "with space.png").write_bytes(inside)
    assert read_below(f"file://{root}/with%20space.png", [root], 1 << 20) == inside
    # Relative ones start at each folder.
    assert read_below("c.png", [root, (place / "else").resolve()], 1 << 20)


@pytest.mark.parametrize(
    "url, status",
    [
        ("../secret.png", 403),
        ("sub/../../secret.png", 403),
        ("/etc/passwd", 403),
        ("file:///etc/passwd", 403),
        ("file://%2e%2e/secret.png", 400),
        ("..%2fsecret.png", 404),
        ("{place}/root2/a.png", 403),
        ("{place}/root/../secret.png", 403),
        ("link/c.png", 400),
        ("sub/link.png", 400),
        ("nothing.png", 404),
        ("sub", 400),
        (".", 403),
        ("", 400),
        ("a.png/b", 400),
        ("pipe", 400),
        ("large", 413),
        ("a" * 5000, 400),
    ],
)
def test_files_elsewhere(place, url, status):
    """No path leads out of the folder, and no link."""
    root = (place / "root").resolve()
    (root / "sub/link.png").symlink_to(place / "secret.png")
    os.mkfifo(root / "pipe")
    (root / "large").write_bytes(bytes(5000))
    with pytest.raises(ApiError) as caught:
        read_below(url.format(place=place), [root], 4000)
    assert caught.value.status == status, caught.value.message


def test_no_files_by_default(place):
    with pytest.raises(ApiError, match="--allow_files") as caught:
        Sources().read(str(place / "root/a.png"), "messages[0]")
    assert (caught.value.status, caught.value.param) == (403, "messages[0]")


# --- data URLs -----------------------------------------------------------------------------------


def test_data_urls():
    data = bytes(range(256))
    encoded = base64.b64encode(data).decode()
    for url in (
        f"data:image/png;base64,{encoded}",
        f"data:;base64,{encoded}",
        f"data:image/svg+xml;charset=utf-8;BASE64,{encoded}",
        f"data:image/png;base64,{encoded[:100]}\n{encoded[100:]}",
        f"data:image/png;base64,{encoded.replace('/', '%2F').replace('+', '%2B')}",
    ):
        assert decode_data_url(url) == data


# --- addresses -----------------------------------------------------------------------------------


class Pages(http.server.BaseHTTPRequestHandler):
    """Some answers that a server may give."""

    def do_GET(self):
        getattr(self, self.path.strip("/").split("?")[0])()

    def log_message(self, *_):
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(body)

    def image(self):
        self.answer(200, b"image", Content_Length="5")

    def missing(self):
        self.answer(404)

    def short(self):
        self.answer(200, b"ima", Content_Length="5")

    def large(self):
        self.answer(200, bytes(5000))

    def moved(self):
        self.answer(302, Location="/image")

    def elsewhere(self):
        self.answer(302, Location="http://169.254.169.254/latest")

    def file(self):
        self.answer(302, Location="file:///etc/passwd")

    def circle(self):
        self.answer(302, Location="/circle")

    def slow(self):
        self.send_response(200)
        self.end_headers()
        with contextlib.suppress(OSError):
            for _ in range(200):
                self.wfile.write(b"x")
                time.sleep(0.1)


@pytest.fixture(scope="module")
def pages():
    """The host and port of a server in this process."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pages)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_fetching(pages):
    fetcher = Fetcher({pages}, max_bytes=4000, seconds=20.0, private=True)
    assert fetcher.fetch(f"http://{pages}/image") == b"image"
    assert fetcher.fetch(f"http://{pages}/image?a=b#c") == b"image"
    assert fetcher.fetch(f"http://{pages}/moved") == b"image"
    refused = {
        "missing": ("status 404", 400),
        "short": ("bytes are missing", 400),
        "large": ("more than 4,000 bytes", 413),
        "elsewhere": ("not on --allow_hosts", 403),
        "file": ("not on --allow_hosts", 403),
        "circle": ("redirects", 400),
    }
    for path, (message, status) in refused.items():
        with pytest.raises(ApiError, match=message) as caught:
            fetcher.fetch(f"http://{pages}/{path}")
        assert caught.value.status == status, path
    began = time.monotonic()
    with pytest.raises(ApiError, match="cannot be fetched"):
        Fetcher({pages}, seconds=0.5, private=True).fetch(f"http://{pages}/slow")
    assert time.monotonic() - began < 10


def test_addresses_that_are_not_allowed(pages):
    host = pages.split(":")[0]
    for url in (
        f"http://{host}/image",  # another port
        f"https://{pages}/image",
        f"http://user:secret@{pages}/image",
        "http://localhost/image",
        f"http://{pages}@evil.example/",
        f"http://evil.example/http://{pages}",
        f"http://{pages}.evil.example/",
        "http://[::1]/",
        "http:///image",
    ):
        with pytest.raises(ApiError) as caught:
            Fetcher({pages}, private=True).fetch(url)
        assert caught.value.status in (400, 403), url
        assert "secret" not in caught.value.message
    with pytest.raises(ApiError, match="--allow_private_hosts"):
        Fetcher({pages}).fetch(f"http://{pages}/image")
    with pytest.raises(ApiError, match="--allow_hosts"):
        Fetcher().fetch(f"http://{pages}/image")


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.1.2.3", "192.168.0.1", "169.254.169.254", "0.0.0.0", "100.64.0.1", "::1"]
    + ["fe80::1%eth0", "fd00::1", "::ffff:127.0.0.1", "224.0.0.1", "2002:7f00:1::"],
)
def test_private_addresses(monkeypatch, address):
    """A name on the list that leads to this network is not fetched."""
    import socket

    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 80))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    with pytest.raises(ApiError, match="which is private"):
        Fetcher({"images.example"}).fetch("http://images.example/a.png")
