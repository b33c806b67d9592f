"""The server under load: many clients at once; and for minutes, with clients that leave, while the
server is killed and started again (`make test-serve`; SERVE_LOAD_SECONDS=600 for longer).
"""

import asyncio
import collections
import os
import random
import signal
import time

import openai
import pytest

from examples.experiment import read_jsonl
from internvl3_jax import Chat, load
from internvl3_jax.inference.engine.engine import Engine
from internvl3_jax.serve.media import Sources
from tests.support.live_server import serving, user
from tests.support.server_process import MODEL, ServerProcess

LONGEST = 48
SECONDS = float(os.environ.get("SERVE_LOAD_SECONDS", 180))
CLIENTS = 64


def messages(question: dict) -> list[dict]:
    content = [{"type": "image_url", "image_url": {"url": image}} for image in question["image"]]
    return user([*content, {"type": "text", "text": question["prompt"]}])


@pytest.fixture(scope="module")
def checkpoint():
    return load(MODEL)


@pytest.fixture(scope="module")
def questions(checkpoint):
    """(messages, the answer of `Chat`) of the shipped questions."""
    rows = read_jsonl(MODEL / "questions.jsonl")
    asked = [(row["prompt"], [MODEL / image for image in row["image"]]) for row in rows]
    answers = Chat(checkpoint, max_new_tokens=LONGEST).answer_many(asked, temperature=0.0)
    return [(messages(row), answer.text) for row, answer in zip(rows, answers, strict=True)]


async def ask(client: openai.AsyncOpenAI, asked: list[dict], *, stream: bool, leave: bool) -> str:
    """The answer; "" if the client leaves in the middle."""
    settings = {"model": "tiny_digits", "messages": asked, "max_tokens": LONGEST, "temperature": 0}
    if not stream:
        if leave:
            sending = asyncio.ensure_future(client.chat.completions.create(**settings))
            await asyncio.sleep(0.01)
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
            return ""
        return (await client.chat.completions.create(**settings)).choices[0].message.content
    text = ""
    async with await client.chat.completions.create(**settings, stream=True) as pieces:
        async for piece in pieces:
            if leave:
                return ""
            text += piece.choices[0].delta.content or ""
    return text


async def all_clients(url: str, questions, each: int) -> None:
    """Every client asks `each` questions; one of eight leaves instead."""
    options = {"base_url": f"{url}/v1", "api_key": "x", "max_retries": 0, "timeout": 120}
    async with openai.AsyncOpenAI(**options) as client:

        async def one(number: int) -> None:
            draw = random.Random(number)
            for _ in range(each):
                asked, expected = draw.choice(questions)
                leave = draw.random() < 0.125
                text = await ask(client, asked, stream=draw.random() < 0.5, leave=leave)
                assert text == ("" if leave else expected)

        await asyncio.gather(*map(one, range(CLIENTS)))


def test_many_clients(checkpoint, questions):
    """64 clients get the answers of `Chat`; nothing is left of them afterwards."""
    engine = Engine.of(checkpoint, rows=8, max_length=512)
    settings = {"name": "tiny_digits", "sources": Sources(roots=(MODEL,))}
    with serving(engine, checkpoint=checkpoint, **settings) as live:
        asyncio.run(all_clients(live.url, questions, each=3))
        deadline = time.monotonic() + 30
        while engine.stats.running or engine.stats.waiting or live.service.num_pending:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert live.service.budget.held == 0
    assert live.status == 0


# --- minutes -------------------------------------------------------------------------------------


class Load:
    """Clients that ask without end, and continue when the server is gone and back.

    Attributes:
      url: of the server, which may change.
      counts: what happened, by name.
      wrong: texts that are not those of `Chat`.
    """

    def __init__(self, questions):
        self.questions, self.url = questions, ""
        self.counts: collections.Counter[str] = collections.Counter()
        self.wrong: list[tuple[str, str]] = []
        self.ending = False

    async def run_client(self, number: int) -> None:
        draw = random.Random(number)
        while not self.ending:
            asked, expected = draw.choice(self.questions)
            stream, leave = draw.random() < 0.5, draw.random() < 0.1
            options = {"base_url": f"{self.url}/v1", "api_key": "x", "max_retries": 0}
            try:
                async with openai.AsyncOpenAI(**options, timeout=120) as client:
                    text = await ask(client, asked, stream=stream, leave=leave)
            except openai.APIConnectionError:
                self.counts["no connection"] += 1
                await asyncio.sleep(0.2)
            except openai.RateLimitError:
                self.counts["refused"] += 1
                await asyncio.sleep(0.5)
            except openai.InternalServerError:
                self.counts["draining"] += 1
                await asyncio.sleep(0.2)
            except openai.APIError:  # of a stream that was cut off
                self.counts["cut off"] += 1
            else:
                self.counts["left" if leave else "answered"] += 1
                if not leave and text != expected:
                    self.wrong.append((text, expected))


async def ask_once(url: str, questions) -> None:
    """Asks each question once, so that its programs are compiled."""
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="x", timeout=600) as client:
        for asked, expected in questions:
            assert await ask(client, asked, stream=False, leave=False) == expected


@pytest.mark.serve_load
def test_for_minutes(questions):
    """All answers are right, before and after each kill; memory does not grow without end."""
    flags = [f"--allow_files={MODEL}", "--max_queue=48"]
    load_ = Load(questions)
    sizes: list[tuple[int, int]] = []

    async def drive() -> None:
        clients: list[asyncio.Task] = []
        began, lives = time.monotonic(), 0
        while time.monotonic() - began < SECONDS or lives < 3:
            server = ServerProcess(flags)
            try:
                await asyncio.to_thread(server.wait_until_ready)
                await ask_once(server.url, questions)
                load_.url = server.url
                clients = clients or [
                    asyncio.create_task(load_.run_client(number)) for number in range(CLIENTS)
                ]
                before = load_.counts["answered"]
                await asyncio.sleep(max(5.0, SECONDS / 6))
                middle = server.resident_bytes()
                await asyncio.sleep(max(5.0, SECONDS / 6))
                sizes.append((middle, server.resident_bytes()))
                assert load_.counts["answered"] > before, server.log[-3000:]
                lives += 1
                number = signal.SIGTERM if lives % 2 else signal.SIGKILL
                status = await asyncio.to_thread(server.end, number)
                assert status == (0 if number == signal.SIGTERM else -signal.SIGKILL)
                assert "Traceback" not in server.log, server.log[-5000:]
            finally:
                server.close()
        load_.ending = True
        await asyncio.gather(*clients)

    asyncio.run(drive())
    print(dict(load_.counts), [f"{a >> 20} -> {b >> 20} MiB" for a, b in sizes])
    assert load_.wrong == []
    assert load_.counts["answered"] > 0
    # No growth beyond noise in the second half of any life.
    assert all(after - middle < 256 << 20 for middle, after in sizes), sizes
