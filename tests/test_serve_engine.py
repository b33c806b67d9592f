"""The server with the real engine: adapters as models, and requests that fail within the engine."""

import concurrent.futures
import dataclasses
import threading

import jax
import jax.numpy as jnp
import pytest

from internvl3_jax import Chat, load
from internvl3_jax.checkpoints.adapters import Adapter
from internvl3_jax.inference.engine.engine import Engine
from internvl3_jax.model import lora
from internvl3_jax.serve import grammar
from tests.support import lora_setup, tiny_checkpoint
from tests.support.live_server import parts, serving, user

LIMIT = 6
IMAGE = tiny_checkpoint.make_image(16, 16, 2)


@pytest.fixture(scope="module")
def checkpoint():
    scaled = {
        name: Adapter(lora.scaled(lora_setup.adapted(seed=seed)["lora"], lora_setup.SETTINGS))
        for seed, name in ((2, "one"), (4, "two"))
    }
    return dataclasses.replace(load(tiny_checkpoint.directory()), adapters=scaled)


@pytest.fixture(scope="module")
def live(checkpoint):
    engine = Engine.of(checkpoint, rows=4, max_length=256)
    with serving(engine, checkpoint=checkpoint, name="base") as started:
        yield started


def ask(live, **fields):
    return live.post({"messages": user(parts("Hi", IMAGE)), "max_tokens": LIMIT} | fields)


def text_of(response) -> str:
    assert response.status == 200, response.data
    return response.json["choices"][0]["message"]["content"]


def test_adapters_are_models(live, checkpoint):
    """Each answers as with `Chat`, also when they run in one batch."""
    models = live.get("/v1/models").json["data"]
    assert [(model["id"], model["parent"]) for model in models] == [
        ("base", None),
        ("one", "base"),
        ("two", "base"),
    ]
    chat = Chat(checkpoint, max_new_tokens=LIMIT)
    expected = {}
    for name in ("base", "one", "two"):
        chat.use(None if name == "base" else name)
        expected[name] = chat("Hi", [IMAGE])
    assert len(set(expected.values())) == 3
    names = list(expected) * 4
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda name: ask(live, model=name), names))
    assert [text_of(answer) for answer in answers] == [expected[name] for name in names]
    assert {answer.json["model"] for answer in answers} == set(expected)


def test_a_grammar_that_fails_fails_alone(live, monkeypatch):
    """Whatever a constraint raises in the engine's thread ends its own request."""
    allowed = grammar.GrammarConstraint.allowed

    def failing(constraint):
        in_engine = threading.current_thread().name == "engine"
        if in_engine and constraint._field == "guided_regex":
            raise ValueError("guided_regex: too complex; simplify it")
        return allowed(constraint)

    monkeypatch.setattr(grammar.GrammarConstraint, "allowed", failing)
    settings = [{"guided_regex": "a+"}, {"guided_choice": ["b"]}, {}] * 4
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda fields: ask(live, **fields), settings))
    for fields, answer in zip(settings, answers, strict=True):
        if "guided_regex" in fields:
            assert (answer.status, answer.error["code"]) == (422, "generation_failed")
            assert "simplify it" in answer.error["message"]
        elif "guided_choice" in fields:
            assert text_of(answer) == "b"
        else:
            assert text_of(answer)
    assert live.get("/health").status == 200


def test_parameters_that_are_not_finite(checkpoint):
    """The request gets an error, and the server continues."""
    params = jax.tree.map(lambda leaf: leaf, checkpoint.params)
    head = params["language"]["norm"]
    params["language"] = params["language"] | {
        "norm": jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), head)
    }
    broken = dataclasses.replace(checkpoint, params=params, adapters={})
    engine = Engine.of(broken, rows=2, max_length=256)
    with serving(engine, checkpoint=broken, name="base") as live:
        for _ in range(2):
            answer = ask(live)
            assert answer.status in (422, 500) and answer.error["message"]
        assert live.get("/health").status == 200
