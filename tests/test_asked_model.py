"""The model that evaluation kits ask, without a kit: threads share a batch, and nobody waits for
ever.
"""

import pytest

from internvl3_jax import Chat, load
from internvl3_jax.evaluate.asking import Question
from internvl3_jax.evaluate.kits.asked_model import AskedModel
from tests.support import tiny_checkpoint

OPTIONS = {"max_new_tokens": 6}


@pytest.fixture(scope="module")
def model():
    return AskedModel(str(tiny_checkpoint.directory()), batch_size=2, compilation_cache="")


def question(number: int) -> Question:
    images = [tiny_checkpoint.make_image(16, 16, number)] if number % 2 else []
    return Question("<image>\n" * len(images) + f"What is {number}?", images, f"row {number}")


def test_questions_of_several_threads_get_the_answers_of_a_chat(model):
    chat = Chat(load(tiny_checkpoint.directory()))
    found = model.answer_all(lambda n: model.answer(question(n), OPTIONS)["text"], range(6))
    pairs = [(question(n).text, question(n).images) for n in range(6)]
    assert found == [answer.text for answer in chat.answer_many(pairs, **OPTIONS)]


def test_a_question_that_cannot_be_asked_fails_alone(model):
    def ask(number):
        asked = Question("What?", ["missing.png"], "row 1") if number == 1 else question(number)
        try:
            return model.answer(asked, OPTIONS)["text"]
        except (ValueError, OSError) as error:
            return str(error)

    whole, broken, other = model.answer_all(ask, range(3))
    assert "row 1" in broken and "missing.png" in broken
    assert whole == model.answer(question(0), OPTIONS)["text"]
    assert other == model.answer(question(2), OPTIONS)["text"]


def test_an_engine_that_cannot_be_made_or_fails_is_told(model, monkeypatch):
    """As for want of memory. The next question gets a new engine."""
    with monkeypatch.context() as patch:

        def fail(*_):
            raise MemoryError("no memory for the cache")

        patch.setattr(model.chat.engines, "with_rows", fail)
        with pytest.raises(MemoryError, match="no memory for the cache"):
            model.answer(question(0), OPTIONS)
    engine = model.chat.engines.with_rows(2)
    with monkeypatch.context() as patch:
        patch.setattr(engine._device, "decode", fail)
        with pytest.raises(MemoryError, match="no memory for the cache"):
            model.answer(question(0), OPTIONS)
    assert model.answer(question(0), OPTIONS)["text"]
