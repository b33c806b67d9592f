"""Several answers from one prefill, and the choice among them by a critic or by the majority."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internvl3_jax import Chat, Critic, load
from internvl3_jax.inference.engine.engine import Engine
from internvl3_jax.inference.generation_config import GenerationConfig
from internvl3_jax.inference.sampling import Sampling, sample
from internvl3_jax.reward.best_of_n import best_of_many, best_of_n, count_votes
from tests.support import tiny_checkpoint
from tests.support.infer_flags import fail
from tests.support.tiny_checkpoint import make_image

LIMIT = 12
WIDE, SMALL = make_image(40, 16, 1), make_image(16, 16, 2)
REQUESTS = [
    ("What is it?", [WIDE]),
    ("Read the number.", [SMALL]),
    ("How many digits are there?", []),
]


@functools.cache
def chat() -> Chat:
    return Chat(load(tiny_checkpoint.directory()), max_new_tokens=LIMIT)


@functools.cache
def critic() -> Critic:
    return Critic(load(tiny_checkpoint.directory()), chat().generator)


# --- candidates ----------------------------------------------------------------------------------


def test_candidates_are_what_each_would_be_alone():
    """The first is the plain greedy answer; the others are those of ordinary batches with the same
    seeds.
    """
    found = chat().candidates(REQUESTS, 3, greedy_first=True, temperature=0.9, seed=5)
    greedy = chat().answer_many(REQUESTS)
    drawn = [chat().answer_many(REQUESTS, temperature=0.9, seed=5 + number) for number in (1, 2)]
    for row, answers in enumerate(found):
        assert [a.token_ids for a in answers] == [a[row].token_ids for a in (greedy, *drawn)]
        assert answers[0].text == greedy[row].text and answers[2].tiles == greedy[row].tiles
        assert len({tuple(answer.token_ids) for answer in answers}) == 3


def test_more_candidates_begin_with_the_fewer():
    few, many = (chat().candidates(REQUESTS[:1], n, temperature=0.9)[0] for n in (2, 4))
    assert [answer.token_ids for answer in few] == [answer.token_ids for answer in many[:2]]


def test_a_question_is_run_once_for_all_its_candidates():
    engine = chat().engines.with_rows(8)
    before = engine.stats
    answers = chat().candidates(REQUESTS[:2], 4, temperature=1.0)
    after, lengths = engine.stats, [found[0].prompt_tokens for found in answers]
    run = (after.prompt_tokens - after.reused_tokens) - (
        before.prompt_tokens - before.reused_tokens
    )
    assert 0 < run <= sum(lengths)
    assert after.prompt_tokens - before.prompt_tokens == 4 * sum(lengths)
    assert after.image_misses - before.image_misses <= 2


def test_beginnings_with_images_and_positions(monkeypatch):
    """The prompt with a beginning of its answer is the prompt and the beginning's ids, one position
    further each.
    """
    prompts = []
    submit = Engine.submit

    def note(self, request, *rest):
        prompts.append(request.prompt)
        return submit(self, request, *rest)

    monkeypatch.setattr(Engine, "submit", note)
    chat().candidates(REQUESTS, 1, answer_prefixes=["", "1 > 2", "Image-1:"])
    chat().candidates(REQUESTS, 1)
    for begun, plain, text in zip(prompts[:3], prompts[3:], ["", "1 > 2", "Image-1:"], strict=True):
        ids = chat().tokenizer.encode(text)
        assert begun.tokens.tolist() == plain.tokens.tolist() + ids and begun.runs == plain.runs
        assert (np.diff(begun.positions[len(plain.tokens) - 1 :]) == 256).all()


def test_greedy_rows_of_a_drawn_batch():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(6, 50)), jnp.float32)
    keys = jax.vmap(jax.random.key)(np.arange(6, dtype=np.uint32))
    mixed = sample(logits, keys, Sampling(temperature=2.0, greedy_every=3))
    drawn, greedy = sample(logits, keys, Sampling(temperature=2.0)), logits.argmax(axis=1)
    assert mixed.tolist() == [greedy[0], drawn[1], drawn[2], greedy[3], drawn[4], drawn[5]]


def test_errors_of_candidates():
    with pytest.raises(ValueError, match="n is 0"):
        chat().candidates(REQUESTS, 0)
    with pytest.raises(ValueError, match="3 seeds for 2 prompts"):
        chat().generator.start([None, None], GenerationConfig(1, Sampling(), (0, 0, 0), "none"))


# --- the choice ----------------------------------------------------------------------------------


def test_votes():
    assert count_votes(["7", "7.0", None, "8", "14/2", "(B)", "B. seven"]) == [3, 3, 0, 1, 3, 2, 2]
    assert count_votes([None, None]) == [0, 0]


class FakeCritic:
    """Scores by a table from text to step scores."""

    def score(self, question, images, solutions, where):
        from internvl3_jax.reward.critic import StepScores

        return [StepScores([text], [len(text) / 100], len(text) / 100) for text in solutions]


def test_the_critic_decides_and_the_majority_without_one(monkeypatch):
    from internvl3_jax.inference.chat import Answer

    texts = ["\\boxed{1}", "longest: \\boxed{2}", "x \\boxed{3}", "y \\boxed{3.0}"]
    answers = [Answer(text, [1, 2], 9, [1], 1.0, 0.5) for text in texts]
    asked = {}
    monkeypatch.setattr(
        Chat,
        "candidates",
        lambda self, requests, n, **options: asked.update(options, n=n) or [answers],
    )
    choice = best_of_n(chat(), FakeCritic(), "Q", n=4)
    assert (choice.best, choice.text, choice.new_tokens) == (1, texts[1], 8)
    expected = {"n": 4, "greedy_first": True, "temperature": 0.7, "top_p": 0.95}
    assert asked == expected | {"names": ["request 1"]}
    assert [candidate.votes for candidate in choice.candidates] == [1, 1, 2, 2]
    choice = best_of_n(chat(), None, "Q", n=4, temperature=1.0)
    assert choice.best == 2 and asked["temperature"] == 1.0 and choice.candidates[0].score is None
    assert choice.table().splitlines()[2] == "* 2: 2 votes for '3'"


def test_choice_with_the_model_as_its_own_critic():
    choices = best_of_many(chat(), critic(), REQUESTS, 4, seed=3)
    answers = chat().candidates(REQUESTS, 4, greedy_first=True, temperature=0.7, top_p=0.95, seed=3)
    for choice, (question, images), found in zip(choices, REQUESTS, answers, strict=True):
        assert [candidate.text for candidate in choice.candidates] == [
            answer.text for answer in found
        ]
        scores = [
            scores.score
            for scores in critic().score(question, images, [answer.text for answer in found])
        ]
        np.testing.assert_allclose(
            [candidate.score for candidate in choice.candidates], scores, rtol=1e-5
        )
        assert choice.best == int(np.argmax(scores))


# --- infer.py ------------------------------------------------------------------------------------


def test_one_question_on_the_command_line(ask):
    own = str(tiny_checkpoint.directory())
    out, err = ask(prompt="Read it.", best_of=3, critic=own, json=True, stats=True)
    fields = json.loads(out)
    assert (
        fields["text"] == fields["candidates"][fields["best"]]["text"]
        and len(fields["candidates"]) == 3
    )
    assert (
        fields["candidates"][0]["text"] == json.loads(ask(prompt="Read it.", json=True)[0])["text"]
    )
    scores = [candidate["score"] for candidate in fields["candidates"]]
    assert scores[fields["best"]] == max(scores)
    assert [len(c["steps"]) == len(c["scores"]) > 0 for c in fields["candidates"]] == [True] * 3
    assert err.count("score 0.") == 3 and "* " in err
    assert ask(prompt="Read it.", best_of=3, majority=True)[0].strip()


def test_a_file_of_questions_resumes_where_it_stopped(ask, tmp_path):
    requests, output = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    requests.write_text(
        "".join(json.dumps({"id": n, "prompt": f"What is {n}?"}) + "\n" for n in "abc")
    )
    values = {"requests": str(requests), "output": str(output), "best_of": 2, "batch_size": 4}
    values["critic"] = str(tiny_checkpoint.directory())
    ask(**values)
    lines = output.read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["a", "b", "c"]
    assert all(len(json.loads(line)["candidates"]) == 2 for line in lines)
    output.write_text("\n".join(lines[:2]) + "\n")
    assert "holds 2 of 3" in ask(**values)[1]

    def kept(line):
        return {name: value for name, value in json.loads(line).items() if name != "seconds"}

    assert list(map(kept, output.read_text().splitlines())) == list(map(kept, lines))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"critic": "x", "prompt": "hi"}, "give N"),
        ({"majority": True, "prompt": "hi"}, "give N"),
        ({"best_of": 2, "prompt": "hi"}, "--critic DIR or --majority"),
        ({"best_of": 2, "prompt": "hi", "critic": "x", "majority": True}, "one of them"),
        ({"best_of": 2, "majority": True}, "--best_of needs --prompt or --requests"),
    ],
)
def test_flags_that_do_not_go_together(values, message, ask, capsys):
    with pytest.raises(SystemExit) as stopped:
        ask(**values)
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and message in err and err.count("\n") == 1


def test_a_critic_that_is_not_there(ask):
    assert "nowhere" in fail(ask, prompt="hi", best_of=2, critic="nowhere/critic")
