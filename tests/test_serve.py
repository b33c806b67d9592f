"""The server answers as `Chat` does, to the `openai` client, with the shipped digits model."""

import json
import pathlib
import re

import openai
import pytest

from examples.experiment import read_jsonl
from internvl3_jax import Chat, load
from internvl3_jax.inference.engine.engine import Engine
from internvl3_jax.serve.media import Sources
from tests.support.live_server import data_url, parts, serving, user

MODEL = pathlib.Path(__file__).resolve().parents[1] / "examples" / "tiny_digits"
QUESTIONS = read_jsonl(MODEL / "questions.jsonl")
LONGEST = 48


@pytest.fixture(scope="module")
def checkpoint():
    return load(MODEL)


@pytest.fixture(scope="module")
def chat(checkpoint):
    return Chat(checkpoint, max_new_tokens=LONGEST)


@pytest.fixture(scope="module")
def live(checkpoint):
    engine = Engine.of(checkpoint, rows=4, max_length=512)
    sources = Sources(roots=(MODEL,))
    with serving(engine, checkpoint=checkpoint, name="digits", sources=sources) as started:
        yield started


@pytest.fixture(scope="module")
def client(live):
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as opened:
        yield opened


def shown(question: dict) -> list[dict]:
    """A question of questions.jsonl as messages."""
    images = question["image"] if isinstance(question["image"], list) else [question["image"]]
    content = [{"type": "image_url", "image_url": {"url": image}} for image in images]
    return user([*content, {"type": "text", "text": question["prompt"]}])


def paths(question: dict) -> list[pathlib.Path]:
    images = question["image"] if isinstance(question["image"], list) else [question["image"]]
    return [MODEL / image for image in images]


READ = QUESTIONS[2]  # of five different digits


def ask(client, question: dict = READ, **fields):
    fields = {"model": "digits", "max_tokens": LONGEST, "messages": shown(question)} | fields
    return client.chat.completions.create(**fields)


def test_models(client):
    (model,) = client.models.list().data
    assert (model.id, model.owned_by) == ("digits", "internvl3_jax")
    assert client.models.retrieve("digits").id == "digits"


def test_answers_are_those_of_chat(client, chat):
    expected = chat.answer_many(
        [(question["prompt"], paths(question)) for question in QUESTIONS], temperature=0.0
    )
    for question, answer in zip(QUESTIONS, expected, strict=True):
        whole = ask(client, question, temperature=0)
        (choice,) = whole.choices
        assert choice.message.content == answer.text, question
        assert choice.message.role == "assistant"
        assert choice.finish_reason == answer.finish
        assert whole.usage.prompt_tokens == answer.prompt_tokens
        assert whole.usage.completion_tokens == len(answer.token_ids)
        assert whole.usage.total_tokens == answer.prompt_tokens + len(answer.token_ids)
        pieces = list(ask(client, question, stream=True, stream_options={"include_usage": True}))
        text = "".join(piece.choices[0].delta.content or "" for piece in pieces[:-1])
        assert text == answer.text
        assert pieces[-2].choices[0].finish_reason == answer.finish
        assert (pieces[-1].choices, pieces[-1].usage.prompt_tokens) == ([], answer.prompt_tokens)
        assert len({piece.id for piece in pieces}) == 1


def test_a_conversation_is_that_of_chat(client, chat):
    chat.reset()
    messages = shown(READ)
    for question in ("Read the number.", "Count the digits.", "Where is the 9?"):
        if messages[-1]["role"] == "assistant":
            messages.append({"role": "user", "content": question})
        expected = chat(question, paths(READ) if len(messages) == 1 else ())
        answer = client.chat.completions.create(
            model="digits", messages=messages, max_tokens=LONGEST, temperature=0
        )
        assert answer.choices[0].message.content == expected
        if len(messages) > 1:  # what the engine has already of the earlier turns
            cached = answer.usage.prompt_tokens_details.cached_tokens
            assert 0 < cached < answer.usage.prompt_tokens
        messages.append({"role": "assistant", "content": expected})


def test_options_of_images(client, chat):
    """Tiles, thumbnails, V2PE steps and the system message are those of `Chat`."""
    from tests.support.tiny_checkpoint import make_image

    images = [make_image(96, 32, 1), make_image(64, 64, 2)]
    changes = [
        {},
        {"max_tiles": 2},
        {"max_total_tiles": 2},
        {"tiles": "shared", "max_tiles": 4},
        {"delta": "1/4"},
        {"delta": ["1/4", "1/16"]},
        {"system": "You read numbers."},
    ]
    for change in changes:
        expected = chat.answer_many([("Compare.", images)], temperature=0.0, **change)[0]
        messages = user(parts("Compare.", *images))
        extra = dict(change)
        if system := extra.pop("system", None):
            messages = [{"role": "system", "content": system}, *messages]
        answer = ask(client, messages=messages, temperature=0, extra_body=extra)
        assert answer.usage.prompt_tokens == expected.prompt_tokens, change
        assert answer.choices[0].message.content == expected.text, change
    # detail low is one tile.
    one = chat.answer_many([("Compare.", images)], temperature=0.0, max_tiles=1)[0]
    content = parts("Compare.", *images)
    for part in content[:-1]:
        part["image_url"]["detail"] = "low"
    answer = ask(client, messages=user(content), temperature=0)
    assert answer.usage.prompt_tokens == one.prompt_tokens
    assert answer.choices[0].message.content == one.text


def test_ends(client):
    text = ask(client, temperature=0).choices[0].message.content
    assert len(text) > 3
    stopped = ask(client, temperature=0, stop=["never", text[2]]).choices[0]
    assert (stopped.message.content, stopped.finish_reason) == (text[:2], "stop")
    cut = ask(client, temperature=0, max_tokens=2)
    assert (cut.choices[0].message.content, cut.choices[0].finish_reason) == (text[:2], "length")
    assert cut.usage.completion_tokens == 2
    assert ask(client, temperature=0, max_completion_tokens=2, max_tokens=None).usage == cut.usage


def test_seeds(client):
    fields = {"temperature": 3.0, "max_tokens": 12}
    several = ask(client, n=3, seed=7, **fields)
    texts = [choice.message.content for choice in several.choices]
    assert [choice.index for choice in several.choices] == [0, 1, 2] and len(set(texts)) > 1
    alone = [ask(client, seed=7 + k, **fields).choices[0].message.content for k in range(3)]
    assert alone == texts
    streamed = ["", "", ""]
    for piece in ask(client, n=3, seed=7, stream=True, **fields):
        streamed[piece.choices[0].index] += piece.choices[0].delta.content or ""
    assert streamed == texts
    # Without a seed, answers differ.
    free = {ask(client, **fields).choices[0].message.content for _ in range(6)}
    assert len(free) > 1


def test_log_probabilities(client):
    answer = ask(client, temperature=0, logprobs=True, top_logprobs=3)
    (choice,) = answer.choices
    entries = choice.logprobs.content
    assert "".join(entry.token for entry in entries) == choice.message.content
    assert b"".join(bytes(entry.bytes) for entry in entries).decode() == choice.message.content
    for entry in entries:
        values = [top.logprob for top in entry.top_logprobs]
        assert values == sorted(values, reverse=True) and len(values) == 3
        assert entry.top_logprobs[0].token == entry.token
        assert entry.logprob == values[0] <= 0
    streamed = [
        entry
        for piece in ask(client, temperature=0, logprobs=True, top_logprobs=3, stream=True)
        if piece.choices[0].logprobs
        for entry in piece.choices[0].logprobs.content
    ]
    assert [entry.token for entry in streamed] == [entry.token for entry in entries]
    assert ask(client, temperature=0).choices[0].logprobs is None


def test_biases(client, checkpoint):
    text = ask(client, temperature=0).choices[0].message.content
    first = checkpoint.tokenizer.token_id(text[0])
    other = ask(client, temperature=0, logit_bias={str(first): -100}).choices[0].message.content
    assert text[0] not in other
    forced = ask(client, temperature=0, max_tokens=5, logit_bias={str(first): 100})
    assert forced.choices[0].message.content == text[0] * 5


SCHEMA = {
    "type": "object",
    "properties": {
        "digits": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
        "n": {"type": "integer", "minimum": 0, "maximum": 9},
    },
    "required": ["digits", "n"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("seed", range(4))
def test_json(client, seed):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
    answer = ask(client, temperature=2.0, seed=seed, max_tokens=300, response_format=form)
    (choice,) = answer.choices
    assert choice.finish_reason == "stop"
    value = json.loads(choice.message.content)
    assert value.keys() == {"digits", "n"} and 0 <= value["n"] <= 9
    assert len(value["digits"]) <= 2 and set(value["digits"]) <= {"a", "b"}
    guided = ask(
        client, temperature=2.0, seed=seed, max_tokens=300, extra_body={"guided_json": SCHEMA}
    )
    assert guided.choices[0].message.content == choice.message.content


def test_grammars(client):
    def answer(**extra) -> str:
        return ask(client, temperature=0, extra_body=extra).choices[0].message.content

    assert re.fullmatch("[0-9]{3}", answer(guided_regex="[0-9]{3}"))
    assert answer(guided_choice=["yes", "no, it is not (really)"]) in (
        "yes",
        "no, it is not (really)",
    )
    assert answer(structured_outputs={"choice": ["only"]}) == "only"
    assert answer(structured_outputs={"regex": "ab*c"})[0] == "a"
    assert answer(guided_grammar='start: "x" ("y" | "z")') in ("xy", "xz")
    form = {"type": "json_object"}
    found = ask(client, temperature=0, max_tokens=200, response_format=form).choices[0]
    if found.finish_reason == "stop":
        assert isinstance(json.loads(found.message.content), dict)
    # A choice in a stream, several at once.
    pieces = ask(
        client, stream=True, n=2, temperature=1.0, extra_body={"guided_choice": ["a", "b"]}
    )
    texts = ["", ""]
    for piece in pieces:
        texts[piece.choices[0].index] += piece.choices[0].delta.content or ""
    assert set(texts) <= {"a", "b"}


def test_files_and_data(client):
    """The same image by path, address, and in the request."""
    from PIL import Image

    whole = ask(client, temperature=0).choices[0].message.content
    path = paths(READ)[0]
    with Image.open(path) as image:
        data = data_url(image)
    relative = READ["image"][0]
    for url in (str(path), path.as_uri(), relative, f"./{relative}", data):
        answer = ask(client, {"image": url, "prompt": READ["prompt"]}, temperature=0)
        assert answer.choices[0].message.content == whole, url


def test_a_refusal_is_an_error_of_the_client(client):
    with pytest.raises(openai.BadRequestError, match="did you mean 'temperature'") as caught:
        ask(client, extra_body={"temprature": 1})
    assert caught.value.param == "temprature"
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt'"):
        ask(client, model="gpt")
    with pytest.raises(openai.BadRequestError, match="leaves room for"):
        ask(client, max_tokens=10_000)
    with pytest.raises(openai.BadRequestError, match="leaves room for 0"):
        ask(client, messages=user("Hi " * 600))


def test_harmless_fields(client):
    extra = {"skip_special_tokens": True, "length_penalty": 1.0, "use_beam_search": False}
    answer = ask(
        client,
        temperature=0,
        user="me",
        store=False,
        metadata={"a": "b"},
        service_tier="auto",
        parallel_tool_calls=False,
        tools=[],
        tool_choice="none",
        modalities=["text"],
        reasoning_effort="low",
        frequency_penalty=0.0,
        presence_penalty=0.0,
        top_p=1.0,
        extra_body=extra,
    )
    assert (
        answer.choices[0].message.content == ask(client, temperature=0).choices[0].message.content
    )


def test_metrics(live, client):
    ask(client, temperature=0)
    text = live.get("/metrics").data.decode()
    values = {
        line.split(" ")[0]: float(line.split(" ")[1])
        for line in text.splitlines()
        if not line.startswith("#")
    }
    assert values["internvl3_running"] == values["internvl3_waiting"] == 0
    assert values["internvl3_prompt_tokens_total"] > values["internvl3_reused_tokens_total"] > 0
    assert values["internvl3_new_tokens_total"] > 0
    assert values['internvl3_requests_total{status="200"}'] > 0
    assert values["internvl3_first_token_seconds_count"] > 0
    assert values["internvl3_token_seconds_count"] > 0
    assert live.service.budget.held == 0
