"""critic.py and data/steps.py: the conversation of VisualPRM, and scores that are those of a plain
forward pass over it.
"""

import dataclasses
import functools
import hashlib

import jax
import numpy as np
import pytest
import torch

from examples.tiny_digits.recipe import tokenizer as tiny_tokenizer
from internvl3_jax.checkpoints.checkpoint import Checkpoint, load
from internvl3_jax.config import UNITS, ProcessorConfig
from internvl3_jax.data import critic_format
from internvl3_jax.data.batch import Prompt, cut_images, join_tiles
from internvl3_jax.data.text.chat_template import ChatError, encode_chat
from internvl3_jax.data.text.tokenizer import Tokenizer
from internvl3_jax.inference.generator import ContextError, Generator
from internvl3_jax.model.internvl import InternVL
from internvl3_jax.positions import build_positions
from internvl3_jax.reward import critic as critic_module
from internvl3_jax.reward.critic import Critic, label_log_probabilities
from tests.support.internlm2_reference import Reference, converted
from tests.support.parity import pixels
from tests.support.tiny_checkpoint import CONFIG, PROCESSOR, directory, make_image

pytestmark = pytest.mark.optimized

checkpoint = functools.cache(lambda: load(directory()))
QUESTION = "What is the sum?"
SOLUTIONS = [
    "1, 2\n\n1 + 2 = 3\n\nAnswer: 3",
    "7",
    "1, 3\n\n1 + 3 = 5\n\n5 + 0 = 5\n\n5 = 5\n\nAnswer: 5",
    "2\n\nAnswer: 2",
]


# --- steps and conversation ----------------------------------------------------------------------


def test_system_message_is_the_published_one():
    digest = hashlib.sha256(critic_format.SYSTEM.encode()).hexdigest()
    assert (
        digest == "18279fe8e6c5f76aebb619b266e665b89b2d0b1cb181b6aa3fded44d24b8fa1e"
        and len(critic_format.SYSTEM) == 945
    )


@pytest.mark.parametrize(
    ("solution", "max_steps", "expected"),
    [
        ("a\n\nb\n\nc", None, ["a", "b", "c"]),
        ("a\nb", None, ["a\nb"]),
        ("a\n\n\n\nb\n\n", None, ["a", "b"]),
        ("", None, [""]),
        ("a\n\nb\n\nc\n\nd\n\ne", 5, ["a", "b", "c", "d", "e"]),
        # chunks of ceil(5 / 4): three, not four
        ("a\n\nb\n\nc\n\nd\n\ne", 4, ["a\n\nb", "c\n\nd", "e"]),
        ("a\n\nb\n\nc\n\nd\n\ne", 2, ["a\n\nb\n\nc", "d\n\ne"]),
        ("a\n\nb", 1, ["a\n\nb"]),
    ],
)
def test_steps(solution, max_steps, expected):
    assert critic_format.split_steps(solution, max_steps) == expected


def test_conversation():
    messages = critic_format.critic_messages(
        "Q?", ["first", "then <image>"], ["+", "-"], system="judge"
    )
    assert messages == [
        {"role": "system", "content": "judge"},
        {"role": "user", "content": "### Question:\nQ?\n\n### Solution Process:\nfirst"},
        {"role": "assistant", "content": "+"},
        {"role": "user", "content": "then <image>", "images": 0},
        {"role": "assistant", "content": "-"},
    ]
    assert [
        m["content"]
        for m in critic_format.critic_messages("Q?", ["a", "b"])
        if m["role"] == "assistant"
    ] == ["+", "+"]
    assert critic_format.critic_messages("<image>\nQ?", ["an <image>"])[0]["images"] == 1


def test_the_system_message_as_the_public_trainer_made_it():
    assert (
        critic_format.SYSTEMS["visualprm_trained"] == "<image>\n" + critic_format.SYSTEM
        and critic_format.SYSTEMS["visualprm"] == critic_format.SYSTEM
    )


# --- scores --------------------------------------------------------------------------------------


def plain_scores(
    opened: Checkpoint, question: str, images: list, solution_steps: list[str], system=None
) -> np.ndarray:
    """Log-probabilities over the vocabulary of + and - [S,2] from one forward pass in the training
    layout, found by decoding.
    """
    tiles = cut_images(images, opened.processor)
    messages = critic_format.critic_messages(question, solution_steps, system=system)
    encoded = encode_chat(
        messages,
        [len(t) for t in tiles],
        opened.tokenizer,
        opened.processor,
        add_generation_prompt=False,
    )
    positions = build_positions(
        len(encoded.tokens), encoded.runs, [opened.processor.delta] * len(tiles)
    )
    row = {"tokens": encoded.tokens, "positions": positions, "segments": np.ones_like(positions)}
    # one compiled program for all
    batch = {name: np.pad(value, (0, 320 - len(value)))[None] for name, value in row.items()}
    joined = join_tiles(tiles, opened.processor.image_size)
    batch["tiles"] = np.pad(joined, ((0, 6 - len(joined)), *[(0, 0)] * 3))[None]
    logits = forward(
        opened.model, opened.params, batch, "none" if opened.processor.delta != UNITS else None
    )[0]
    header = opened.tokenizer.encode("<|im_start|>assistant\n")
    ids = encoded.tokens.tolist()
    places = [i + len(header) - 1 for i in range(len(ids)) if ids[i : i + len(header)] == header]
    assert len(places) == len(solution_steps)
    return np.asarray(jax.nn.log_softmax(logits[np.asarray(places)]))[
        :, [opened.tokenizer.token_id(label) for label in "+-"]
    ]


@functools.partial(jax.jit, static_argnums=(0, 3))
def forward(model, params, batch, scaling):
    return model.apply({"params": params}, batch, scaling=scaling)


@functools.cache
def tiny_critic(**options) -> Critic:
    return Critic(checkpoint(), **options)


@pytest.mark.parametrize(
    "images",
    [[], [make_image(40, 20)], [make_image(20, 20), make_image(16, 48)]],
    ids=["text", "one", "two"],
)
def test_scores_are_those_of_a_forward_pass_for_each_solution(images):
    tags = {0: "", 1: "<image>\n", 2: "Image-1: <image>\nImage-2: <image>\n"}[len(images)]
    found = tiny_critic().score(QUESTION, images, SOLUTIONS)
    assert [scores.steps for scores in found] == [
        critic_format.split_steps(solution) for solution in SOLUTIONS
    ]
    for solution, scores in zip(SOLUTIONS, found, strict=True):
        logs = plain_scores(
            checkpoint(), tags + QUESTION, images, critic_format.split_steps(solution)
        )
        expected = np.exp(logs[:, 0]) / np.exp(logs).sum(axis=1)
        np.testing.assert_allclose(scores.scores, expected, rtol=1e-4)
        assert scores.score == pytest.approx(np.mean(scores.scores))
    assert len({scores.score for scores in found}) == len(SOLUTIONS)


def test_a_solution_does_not_see_its_neighbors():
    together = tiny_critic().score(QUESTION, [make_image(20, 20)], SOLUTIONS)
    alone = [
        tiny_critic().score(QUESTION, [make_image(20, 20)], [solution])[0] for solution in SOLUTIONS
    ]
    split = tiny_critic(batch_size=2).score(
        QUESTION, [make_image(20, 20)], [*SOLUTIONS, SOLUTIONS[0]]
    )
    assert split[0] is split[-1]
    for one, other, third in zip(together, alone, split, strict=False):
        np.testing.assert_allclose(one.scores, other.scores, rtol=1e-4)
        np.testing.assert_allclose(one.scores, third.scores, rtol=1e-4)


def test_whole_vocabulary_system_message_and_merging():
    options = {"among": "vocabulary", "system": "Judge.", "max_steps": 2}
    (scores,) = tiny_critic(**options).score(QUESTION, [make_image(20, 20)], SOLUTIONS[2:3])
    assert scores.steps == ["1, 3\n\n1 + 3 = 5\n\n5 + 0 = 5", "5 = 5\n\nAnswer: 5"]
    logs = plain_scores(
        checkpoint(), "<image>\n" + QUESTION, [make_image(20, 20)], scores.steps, system="Judge."
    )
    np.testing.assert_allclose(scores.scores, np.exp(logs[:, 0]), rtol=1e-4)


@pytest.mark.parametrize(
    ("aggregate", "reduce"),
    [("min", np.min), ("max", np.max), ("product", np.prod), ("mean", np.mean)],
)
def test_aggregates(aggregate, reduce):
    for scores in tiny_critic(aggregate=aggregate).score(QUESTION, [], SOLUTIONS):
        assert scores.score == pytest.approx(reduce(scores.scores))


def test_images_and_question_are_run_once(monkeypatch):
    """8 solutions: the image's tiles and the question go through the model once, whatever the
    number of solutions.
    """
    encoded, run = [], []
    generate, step = critic_module.Generator.features, critic_module.programs.hidden_states

    def features(self, prompts, length, keep):
        runs = [
            (start, tiles)
            for p in prompts
            for (start, _), tiles in zip(p.runs, p.tiles, strict=True)
        ]
        encoded.append(sum(len(tiles) for start, tiles in runs if start >= keep))
        return generate(self, prompts, length, keep)

    def stepped(model, params, tokens, *rest):
        run.append(tokens.shape)
        return step(model, params, tokens, *rest)

    monkeypatch.setattr(critic_module.Generator, "features", features)
    monkeypatch.setattr(critic_module.programs, "hidden_states", stepped)
    tiny_critic().score(QUESTION, [make_image(40, 20)], [f"{n}\n\nAnswer: {n}" for n in range(8)])
    assert sum(encoded) == 3  # two tiles and the thumbnail
    assert run == [(1, 64), (8, 64)]


def test_the_answering_model_can_be_its_own_critic():
    generator = Generator(CONFIG, checkpoint().params)
    own = Critic(checkpoint(), generator)
    assert own.generator is generator
    one, other = (c.score(QUESTION, [make_image(20, 20)], SOLUTIONS) for c in (own, tiny_critic()))
    assert [scores.scores for scores in one] == [scores.scores for scores in other]


def test_v2pe_critic():
    opened = dataclasses.replace(checkpoint(), processor=dataclasses.replace(PROCESSOR, delta=64))
    (scores,) = Critic(opened).score(QUESTION, [make_image(40, 20)], SOLUTIONS[:1])
    logs = plain_scores(opened, "<image>\n" + QUESTION, [make_image(40, 20)], scores.steps)
    np.testing.assert_allclose(
        scores.scores, np.exp(logs[:, 0]) / np.exp(logs).sum(axis=1), rtol=1e-4
    )


def test_beyond_the_trained_length_nothing_is_shared():
    """Dynamic NTK: the frequencies depend on the length of each row, so each is run whole; and
    shorter rows of the batch keep theirs.
    """
    language = dataclasses.replace(
        CONFIG.language, rope_scaling="dynamic", rope_factor=4.0, max_position=100
    )
    config = dataclasses.replace(CONFIG, language=language)
    opened = dataclasses.replace(checkpoint(), config=config, model=InternVL(config))
    for solution, scores in zip(
        SOLUTIONS, Critic(opened).score(QUESTION, [make_image(40, 20)], SOLUTIONS), strict=True
    ):
        logs = plain_scores(
            opened,
            "<image>\n" + QUESTION,
            [make_image(40, 20)],
            critic_format.split_steps(solution),
        )
        np.testing.assert_allclose(
            scores.scores, np.exp(logs[:, 0]) / np.exp(logs).sum(axis=1), rtol=1e-4
        )


def test_visualprm_architecture_against_torch():
    """InternLM2 decoder, P(+) against P(-) at the header's last token, by the reference's formula."""
    reference = Reference(vocab_size=463)
    reference.body.config.image_token_id = 453
    config, params = converted(reference, 453)
    tokenizer = Tokenizer.from_files(tiny_tokenizer.build())
    opened = Checkpoint(
        InternVL(config),
        config,
        params,
        ProcessorConfig(16, 4, system_message="Judge."),
        tokenizer,
        None,
    )
    image = make_image(40, 20)
    found = Critic(opened).score(QUESTION, [image], SOLUTIONS)
    (tiles,) = cut_images([image], opened.processor)
    image_text = "<img>" + "<IMG_CONTEXT>" * 4 * len(tiles) + "</img>"
    for solution, scores in zip(SOLUTIONS, found, strict=True):
        text = "<|im_start|>system\nJudge.<|im_end|>\n"
        for number, step in enumerate(solution.split("\n\n")):
            step = (
                f"### Question:\n{image_text}\n{QUESTION}\n\n### Solution Process:\n{step}"
                if number == 0
                else step
            )
            text += f"<|im_start|>user\n{step}<|im_end|>\n<|im_start|>assistant\n"
            # As version "soft" of the reference: the conversation so far, the next token after the
            # header.
            logits = reference(torch.tensor([tokenizer.encode(text)]), pixels(tiles, config))[0, -1]
            expected = (
                logits[[tokenizer.token_id("+"), tokenizer.token_id("-")]].softmax(dim=0)[0].item()
            )
            assert scores.scores[number] == pytest.approx(expected, rel=1e-4)
            text += "+<|im_end|>\n"


# --- what cannot be judged -----------------------------------------------------------------------


def test_errors():
    for options in ({"aggregate": "median"}, {"among": "all"}, {"max_steps": 0}, {"batch_size": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} is"):
            Critic(checkpoint(), **options)
    with pytest.raises(ChatError, match="question 7: 2 images, but 1 <image> tags"):
        tiny_critic().score("<image>", [make_image(20, 20)] * 2, ["1"], "question 7")
    with pytest.raises(
        ContextError, match="question 8, read by the critic: .* the model knows 2,048"
    ):
        tiny_critic().score(QUESTION, [], ["1 + 1\n\n" * 400], "question 8")
    with pytest.raises(ChatError, match="solutions must be a list"):
        tiny_critic().score(QUESTION, [], "Answer: 6")


def test_places_may_have_a_token_only_in_common():
    """Prompts that differ from the start: nothing is shared, and every row is right."""
    rng = np.random.default_rng(0)
    prompts = [
        Prompt(
            rng.integers(0, 440, n).astype(np.int32), np.arange(n, dtype=np.int32) * UNITS, [], []
        )
        for n in (9, 30)
    ]
    logs = label_log_probabilities(
        tiny_critic().generator, prompts, [[3, 8], [20]], (5, 6, 7), "none"
    )
    for prompt, places, found in zip(prompts, [[3, 8], [20]], logs, strict=True):
        batch = {
            "tokens": prompt.tokens,
            "positions": prompt.positions,
            "segments": np.ones_like(prompt.tokens),
        }
        batch = {name: value[None] for name, value in batch.items()} | {
            "tiles": np.zeros((1, 0, 16, 16, 3), np.uint8)
        }
        logits = forward(checkpoint().model, checkpoint().params, batch, None)[0]
        np.testing.assert_allclose(
            found, jax.nn.log_softmax(logits)[np.asarray(places), 5:8], rtol=1e-4, atol=1e-4
        )
