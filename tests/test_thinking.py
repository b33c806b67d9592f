"""A tiny InternVL3.5 from its released layout: conversion, chat, infer.py, and thinking mode."""

import dataclasses
import itertools
import json

import pytest

from internvl3_jax import Chat, load
from internvl3_jax.checkpoints.hf.assemble import ConversionError
from internvl3_jax.data.text.reasoning import THINKING_SYSTEM, split_reasoning
from internvl3_jax.inference import asked
from internvl3_jax.inference.answerer import as_json
from internvl3_jax.inference.answering import totals
from internvl3_jax.inference.engine.request import Request
from internvl3_jax.inference.terminal_answers import TerminalAnswers
from internvl3_jax.model import lora
from internvl3_jax.reward.answer_matching import final_answer
from internvl3_jax.reward.best_of_n import best_of_n
from internvl3_jax.reward.critic import StepScores
from tests.support import qwen3_checkpoint
from tests.support.engine import OneAfterAnother
from tests.support.infer_flags import fail
from tests.support.released import convert, params_of, same_tensors, stored_tensors
from tests.support.tiny_checkpoint import make_image


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    return qwen3_checkpoint.write(tmp_path_factory.mktemp("qwen3") / "released")


@pytest.fixture(scope="module")
def converted(released):
    convert(released, released.parent / "ours", verify=True)
    return released.parent / "ours"


@pytest.fixture(scope="module")
def thinker(converted):
    """A chat in thinking mode."""
    return Chat(load(converted, dtype="float32"), max_new_tokens=12, thinking=True)


def script(chat, monkeypatch, *texts, stop=True):
    """Makes the model say these texts, one per answer, with a stop token after them, or cut off."""
    stops = [chat.tokenizer.token_id("<|im_end|>")] if stop else []
    rows = [chat.tokenizer.encode(text) + stops for text in texts]
    left, vocabulary = itertools.cycle(rows), chat.generator.config.language.vocab_size

    def constrained(*arguments, **options):
        ids = next(left)
        request = Request(*arguments, **options, constraint=OneAfterAnother(ids, vocabulary))
        return request if stop else dataclasses.replace(request, max_new_tokens=len(ids))

    monkeypatch.setattr(asked, "Request", constrained)


# --- the released files --------------------------------------------------------------------------


def test_a_released_directory_converts_both_ways(released, converted, tmp_path):
    """The id of the image token is the tokenizer's, and all of it comes back bit for bit."""
    checkpoint = load(converted)
    assert checkpoint.config.image_token_id == 455
    assert checkpoint.config.language.family == "qwen3"
    convert(converted, tmp_path / "hf", to="hf", verify=True)
    convert(tmp_path / "hf", tmp_path / "internvl", to="internvl", verify=True)
    same_tensors(stored_tensors(released), stored_tensors(tmp_path / "internvl"))
    same_tensors(params_of(tmp_path / "hf"), params_of(converted))
    values = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert values["image_token_id"] == 455 and values["tie_word_embeddings"] is False
    assert values["text_config"]["head_dim"] == 6


def test_files_that_contradict_each_other_are_named(released, tmp_path):
    convert(released, tmp_path / "hf", to="hf")
    (tmp_path / "hf" / "internvl3_jax.json").unlink()
    config = tmp_path / "hf" / "config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | {"image_token_id": 453}))
    with pytest.raises(ValueError, match="image_token_id is 453; the tokenizer has .* at 455"):
        load(tmp_path / "hf")
    config.write_text(json.dumps(values | {"tie_word_embeddings": True}))
    with pytest.raises(ConversionError, match="ties the head to the embedding, but .* differs"):
        load(tmp_path / "hf")
    text = values["text_config"] | {"head_dim": 8}
    config.write_text(json.dumps(values | {"text_config": text}))
    with pytest.raises(
        ConversionError, match=r"q_proj.weight \(192, 128\), config.json asks for \(256, 128\)"
    ):
        load(tmp_path / "hf")


def test_think_is_one_token_in_any_text(thinker):
    tokenizer = thinker.tokenizer
    ids = tokenizer.encode("<think>a</think>", special=False)
    assert ids[0] == 451 and ids[-1] == 452 and len(ids) == 3
    assert tokenizer.decode(ids) == "<think>a</think>"


def test_weights_and_cache_of_fewer_bits(converted):
    """int8 kernels give the tokens of the same kernels unpacked. The norms of q and k stay."""
    few = load(converted, dtype="float32", weights="int8")
    unpacked = dataclasses.replace(few, params=lora.merged(few.params))
    requests = [("How many?", [make_image(40, 16, 1)]), ("Why?", [])]
    found, expected = (
        [answer.token_ids for answer in Chat(opened, max_new_tokens=8).answer_many(requests)]
        for opened in (few, unpacked)
    )
    assert found == expected
    small = Chat(few, cache="int8", max_new_tokens=8).answer_many(requests)
    # The prompt attends to its keys as they were.
    assert [answer.token_ids[0] for answer in small] == [ids[0] for ids in expected]


# --- the text ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "thinking", "expected"),
    [
        ("<think>\nSo.\n</think>\n\n4", False, ("So.", "4", False)),
        (" <think>a</think>b</think>c", False, ("a", "b</think>c", False)),
        ("<think>\n\n</think>\n\n4", False, ("", "4", False)),
        ("<think>\nSo it", True, ("So it", "", True)),
        ("So.\n</think>\n4", True, ("So.", "4", False)),
        ("The tag </think>.", False, (None, "The tag </think>.", False)),
        ("4", True, (None, "4", False)),
        ("", True, (None, "", False)),
    ],
)
def test_reasoning_is_split_from_the_answer(text, thinking, expected):
    assert split_reasoning(text, thinking) == expected


def test_the_matching_of_answers_reads_no_reasoning():
    text = "<think>\\boxed{3}? no. <answer>5</answer></think>\nThe answer is 4."
    assert final_answer(text) == "4"
    assert final_answer("<think>\\boxed{3}, so") is None


# --- answers -------------------------------------------------------------------------------------


def test_the_prompt_asks_for_reasoning(thinker):
    prompt = thinker.tokenizer.decode(thinker.prepare("How many?").tokens, skip_special=False)
    assert prompt.startswith(f"<|im_start|>system\n{THINKING_SYSTEM}<|im_end|>\n<|im_start|>user\n")
    own = thinker.prepare("How many?", system="Think first.")
    assert "system\nThink first.<" in thinker.tokenizer.decode(own.tokens, skip_special=False)
    plain = thinker.prepare("How many?", thinking=False).tokens
    assert THINKING_SYSTEM not in thinker.tokenizer.decode(plain, skip_special=False)


def test_the_temperature_is_that_of_the_mode_unless_it_is_said(thinker):
    def temperature(**changes):
        options = thinker.options.with_changes(changes)
        return options.generation_config((0,), "none").sampling.temperature

    assert (temperature(), temperature(thinking=False)) == (0.6, 0.0)
    assert (temperature(temperature=0.0), temperature(temperature=1.0)) == (0.0, 1.0)
    with pytest.raises(ValueError, match="thinking is 1; it must be True or False"):
        thinker("Why?", thinking=1)


def test_a_sampled_answer_with_images(thinker):
    """Two turns with weights as they are, which repeat with the seed."""
    thinker.reset()
    images = [make_image(40, 16, 1), make_image(16, 16, 2)]
    first = thinker("What differs?", images, seed=1)
    second = thinker("And now?", seed=1)
    assert thinker.last.reused_tokens > 0 and thinker.last.reasoning is None
    thinker.reset()
    assert (thinker("What differs?", images, seed=1), thinker("And now?", seed=1)) == (
        first,
        second,
    )


def test_an_answer_has_its_reasoning_apart(thinker, monkeypatch):
    """The conversation continues with the answer alone, from what the cache holds of it."""
    thinker.reset()
    script(thinker, monkeypatch, "<think>\n1 + 1\n</think>\n\n2")
    pieces = list(thinker.stream("How many?", max_new_tokens=64))
    assert "".join(pieces) == "<think>\n1 + 1\n</think>\n\n2"
    last = thinker.last
    assert (last.text, last.reasoning, last.finish) == ("2", "1 + 1", "stop")
    assert thinker.messages[-1] == {"role": "assistant", "content": "2"}
    assert (as_json(last)["text"], as_json(last)["reasoning"]) == ("2", "1 + 1")
    script(thinker, monkeypatch, "3")
    assert thinker("And now?") == "3" and thinker.last.reasoning is None
    assert "reasoning" not in as_json(thinker.last) and thinker.last.reused_tokens > 0


def test_reasoning_that_is_cut_off_is_no_answer(thinker, monkeypatch, capsys):
    thinker.reset()
    script(thinker, monkeypatch, "<think>\n1 + 1 =", stop=False)
    with pytest.raises(ValueError, match="the reasoning ended after .* raise max_new_tokens"):
        thinker("How many?")
    last = thinker.last
    assert (last.text, last.reasoning, last.finish) == ("", "1 + 1 =", "reasoning")
    assert thinker.messages == []
    TerminalAnswers(json=True).ask(thinker, "How many?", [])
    out, err = capsys.readouterr()
    assert (json.loads(out)["text"], json.loads(out)["finish"]) == ("", "reasoning")
    assert "without an answer; --max_new_tokens allows more" in err
    rows = [as_json(last), {"text": "2", "token_ids": [1], "finish": "stop"}]
    assert "; 1 have reasoning that was cut off and no answer" in totals(rows, 1.0)
    assert totals([{"token_ids": [1, 2, 3]}], 3.0, compile_seconds=1.5) == (
        "1 answers, 3 new tokens in 3.000 s, of which compilation took 1.500 s; 2.0 tokens/s"
    )


class FakeCritic:
    """Prefers the longest text, and keeps what it was shown."""

    def score(self, question, images, solutions, where):
        self.seen = solutions
        return [StepScores([text], [len(text) / 9], len(text) / 9) for text in solutions]


def test_best_of_n_judges_the_answers_alone(thinker, monkeypatch):
    texts = [
        "<think>7, long long long",
        "<think>8?</think>\n7",
        "<think>9</think>\n\\boxed{8}",
        "7",
    ]
    script(thinker, monkeypatch, *texts)
    critic = FakeCritic()
    choice = best_of_n(thinker, critic, "How many?", n=4, max_new_tokens=64)
    assert critic.seen == ["7", "\\boxed{8}", "7"]
    assert (choice.best, choice.text) == (2, "\\boxed{8}")
    fields = choice.as_json()["candidates"]
    assert [field["finish"] for field in fields] == ["reasoning", "stop", "stop", "stop"]
    assert [field["score"] is None for field in fields] == [True, False, False, False]
    choice = best_of_n(thinker, None, "How many?", n=4, max_new_tokens=64)
    assert [candidate.votes for candidate in choice.candidates] == [0, 2, 1, 2]
    assert (choice.best, choice.candidates[1].reasoning) == (1, "8?")
    script(thinker, monkeypatch, "<think>1", "<think>2")
    choice = best_of_n(thinker, critic, "How many?", n=2, max_new_tokens=64)
    assert (choice.text, choice.candidates[choice.best].finish) == ("", "reasoning")


# --- infer.py ------------------------------------------------------------------------------------


def test_the_program_on_a_converted_model(ask, converted, tmp_path):
    """The settings beside the answers say how the model was asked, and bind a second run."""
    make_image(40, 16, 1).save(tmp_path / "wide.png")
    (tmp_path / "requests.jsonl").write_text('{"prompt": "How many?", "image": "wide.png"}\n')
    values = {
        "checkpoint": str(converted),
        "requests": str(tmp_path / "requests.jsonl"),
        "output": str(tmp_path / "answers.jsonl"),
    }
    ask(thinking=True, **values)
    sidecar = json.loads((tmp_path / "answers.jsonl.settings.json").read_text())["settings"]
    assert (sidecar["thinking"], sidecar["temperature"]) == (True, 0.6)
    assert sidecar["system"] == THINKING_SYSTEM
    message = fail(ask, **values)
    assert "thinking is True in the file, False now" in message and "\n" not in message
    answer = json.loads(ask(checkpoint=str(converted), prompt="How many?", json=True).out)
    assert answer["finish"] in ("stop", "length") and "reasoning" not in answer
