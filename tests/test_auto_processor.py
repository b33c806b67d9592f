"""An exported model in transformers from end to end: AutoProcessor makes of messages and images
what Chat does, and answers are equal.

Needs torchvision, which does not go with the CPU build of PyTorch that the other tests use: `make
test-processor` sets up an environment of its own.
"""

import json
import pathlib

import numpy as np
import pytest

from convert.open import open_model
from convert.run import convert
from internvl3_jax import Chat, load
from internvl3_jax.config import UNITS
from internvl3_jax.data.batch import cut_images, make_prompt
from internvl3_jax.data.media.images import open_image
from internvl3_jax.data.media.tiles import cut_tiles
from internvl3_jax.data.text.media_tags import frame_lines, place_media

pytestmark = pytest.mark.torchvision
MODEL = pathlib.Path(__file__).resolve().parent.parent / "examples" / "tiny_digits"
QUESTIONS = [json.loads(line) for line in (MODEL / "questions.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(directory, AutoProcessor, model) of the shipped digits model in transformers' layout."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    directory = tmp_path_factory.mktemp("exported") / "hf"
    convert(open_model(MODEL), directory, to="hf")
    return (
        directory,
        AutoProcessor.from_pretrained(directory),
        AutoModelForImageTextToText.from_pretrained(directory).eval(),
    )


def their_inputs(processor, question):
    """The prompt's text with its images, as a user of transformers writes it."""
    images = [open_image(MODEL / path) for path in question["image"]]
    parts = []
    for number, text in enumerate(question["prompt"].split("<image>\n")):
        parts += [{"type": "image", "image": images[number - 1]}] if number else []
        parts += [{"type": "text", "text": text}] if text else []
    messages = [{"role": "user", "content": parts}]
    return processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


def normalized(checkpoint, tiles):
    """Tiles as the model sees them, channels first as transformers has them."""
    mean, std = np.float32(checkpoint.config.vision.mean), np.float32(checkpoint.config.vision.std)
    return ((np.concatenate(tiles).astype(np.float32) / 255 - mean) / std).transpose(0, 3, 1, 2)


@pytest.mark.parametrize(
    "question", QUESTIONS, ids=lambda question: f"{question['id']}-{question['task']}"
)
def test_ids_pixels_and_answers(exported, question):
    directory, processor, model = exported
    inputs = their_inputs(processor, question)
    checkpoint = load(MODEL)
    images = [open_image(MODEL / path) for path in question["image"]]
    tiles = cut_images(images, checkpoint.processor)
    messages = [{"role": "user", "content": question["prompt"]}]
    prompt = make_prompt(
        messages, tiles, checkpoint.tokenizer, checkpoint.processor, [UNITS] * len(tiles)
    )
    assert inputs["input_ids"][0].tolist() == prompt.tokens.tolist()

    ours, theirs = normalized(checkpoint, tiles), inputs["pixel_values"].numpy()
    assert theirs.shape == ours.shape
    # Another bicubic filter than Pillow's: a few levels of 255 apart where the image has edges.
    assert np.abs(theirs - ours).mean() < 0.02 and np.abs(theirs - ours).max() < 0.35

    out = model.generate(**inputs, max_new_tokens=96, do_sample=False)
    text = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=False)
    answer = Chat(checkpoint, max_new_tokens=96)(question["prompt"], images=images)
    assert text.split("<|im_end|>")[0].strip() == answer


def test_ids_and_pixels_of_videos(exported):
    """Two videos of frames that both sides are given: one tile each, "Frame1: " and so on."""
    _, processor, _ = exported
    checkpoint = load(MODEL)
    images = [open_image(MODEL / question["image"][0]) for question in QUESTIONS[:5]]
    videos = [
        [image.resize((96, 64)) for image in images[:3]],
        [image.resize((96, 64)) for image in images[2:5]],
    ]
    parts = [
        {"type": "video", "video": [np.asarray(image) for image in frames]} for frames in videos
    ]
    content = [parts[0], {"type": "text", "text": "And\n"}, parts[1]]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": [*content, {"type": "text", "text": "What moves?"}]}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    lines = [frame_lines(len(frames), "Frame{}: ") for frames in videos]
    text, _ = place_media("<video>\nAnd\n<video>\nWhat moves?", 0, lines, [])
    tiles = [cut_tiles(image, checkpoint.processor, 1) for frames in videos for image in frames]
    messages = [{"role": "user", "content": text}]
    prompt = make_prompt(
        messages, tiles, checkpoint.tokenizer, checkpoint.processor, [UNITS] * len(tiles)
    )
    assert inputs["input_ids"][0].tolist() == prompt.tokens.tolist()
    theirs, ours = inputs["pixel_values"].numpy(), normalized(checkpoint, tiles)
    assert theirs.shape == ours.shape
    assert np.abs(theirs - ours).mean() < 0.02 and np.abs(theirs - ours).max() < 0.35
