r"""Encodes chat messages as token ids: template, image tokens, and which tokens are trained.

Template internvl2_5, used by all InternVL3 sizes:

    <|im_start|>system\n{system}<|im_end|>\n
    <|im_start|>user\n{question}<|im_end|>\n
    <|im_start|>assistant\n{answer}<|im_end|>\n

without the line breaks between these lines. Each message is one block and is tokenized by itself,
so that a newline at the end of a block never merges with the start of the next. The content is not
stripped. With n images, the first n <image> in user messages become

    <img> <IMG_CONTEXT> x tokens_per_tile * tiles </img>

as in InternVL's code; further ones, and all of a conversation without images, are text, as in a
question about SVG. Nothing else in a message becomes a control token, however it is spelled (see
tokenizer.py).

Trained tokens are those of each assistant block except its header `<|im_start|>assistant\n` and the
newline after <|im_end|>. As in InternVL's code, the header has the number of tokens that it has
alone, even if an answer that starts with a newline merges with it.

Follows `preprocess_internvl2_5` (internvl/train/dataset.py) and conversation.py of the InternVL
repository.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from internvl3_jax.config import ProcessorConfig
from internvl3_jax.data.text.tokenizer import Tokenizer
from internvl3_jax.io.terminal import excerpt

# Template name -> system text that the models were trained with and that "default" stands for.
TEMPLATES = {
    "internvl2_5": (
        "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
    )
}
IMAGE_TAG = "<image>"
ROLES = ("system", "user", "assistant")
OFFICIAL_ROLES = {"system": "system", "human": "user", "gpt": "assistant"}

# {"role": one of ROLES, "content": text}. The optional key "images" of a user message is an upper
# bound of the number of its <image> that are places of images. `insert_missing_tags` adds it to
# messages with more tags, so that images of later turns do not take their places.
Message = dict[str, str | int]


class ChatError(ValueError):
    """A conversation that cannot be encoded. The message has its place, error and remedy."""


@dataclasses.dataclass
class Encoded:
    """A conversation of T tokens.

    Attributes:
      tokens: i32[T].
      loss_mask: bool[T], True where the token is a trained target.
      runs: For each image, the index of its first <IMG_CONTEXT> and the number of them.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    runs: list[tuple[int, int]]


def encode_chat(
    messages: Sequence[Message],
    tiles_per_image: Sequence[int],
    tokenizer: Tokenizer,
    processor: ProcessorConfig,
    *,
    add_generation_prompt: bool,
    where: str = "",
) -> Encoded:
    r"""Encodes a conversation.

    Args:
      messages: User and assistant in turn, user first; a system message may come before them and
        replaces the processor's.
      tiles_per_image: Number of tiles of each image, thumbnail included, in the order of the
        <image> in the user messages.
      add_generation_prompt: Whether to end with `<|im_start|>assistant\n`, for the model to answer;
        the last message must then be the user's.
      where: Names the conversation in errors, such as "train.jsonl line 7".

    Raises:
      ChatError: The messages, roles or <image> tags do not fit.
      TokenizerError: The tokenizer lacks a token of the template.
    """
    if processor.template not in TEMPLATES:
        raise ChatError(
            f"{_at(where)}template {processor.template!r} is unknown; supported: "
            f"{', '.join(TEMPLATES)}"
        )
    _check_form(messages, where)
    _check_turns(messages, add_generation_prompt, where)
    _check_images(messages, tiles_per_image, where)
    writer = _Writer(tokenizer, processor.tokens_per_tile)
    system = (
        TEMPLATES[processor.template]
        if processor.system_message == "default"
        else processor.system_message
    )
    if messages[0]["role"] != "system" and system is not None:
        writer.block("system", [system])
    images = iter(tiles_per_image)
    for message, places in zip(messages, count_places(messages, len(tiles_per_image)), strict=True):
        if message["role"] == "user":
            first, *rest = message["content"].split(IMAGE_TAG, places)
            writer.block("user", [first] + [part for text in rest for part in (next(images), text)])
        else:
            writer.block(message["role"], [message["content"]])
    if add_generation_prompt:
        writer.header("assistant")
    return Encoded(np.array(writer.tokens, np.int32), np.array(writer.trained, bool), writer.runs)


class _Writer:
    """Appends blocks to the lists of an Encoded."""

    def __init__(self, tokenizer: Tokenizer, tokens_per_tile: int):
        names = ("<|im_start|>", "<|im_end|>", "<img>", "<IMG_CONTEXT>", "</img>")
        tokenizer.require(*names)
        self.im_start, self.im_end, self.img, self.context, self.img_end = map(
            tokenizer.token_id, names
        )
        self.tokenizer = tokenizer
        self.tokens_per_tile = tokens_per_tile
        self.tokens = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        self.trained = [False] * len(self.tokens)
        self.runs = []

    def append(self, tokens: list[int], trained: bool = False) -> None:
        self.tokens += tokens
        self.trained += [trained] * len(tokens)

    def text(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, special=False) if text else []

    def header(self, role: str) -> None:
        self.append([self.im_start, *self.text(f"{role}\n")])

    def block(self, role: str, parts: list[str | int]) -> None:
        """Appends a message of the parts text, an image's number of tiles, text, ..., text.

        The header's newline and the text after it are encoded as one piece, since they are between
        the same two special tokens.
        """
        trained = role == "assistant"
        first, *rest = parts
        opening = [self.im_start, *self.text(f"{role}\n{first}")]
        header = 1 + len(self.text(f"{role}\n"))
        self.append(opening[:header])
        self.append(opening[header:], trained)
        for part in rest:
            if isinstance(part, str):
                self.append(self.text(part))
            else:
                self.image(part)
        self.append([self.im_end], trained)
        self.append(self.text("\n"))

    def image(self, tiles: int) -> None:
        count = int(tiles) * self.tokens_per_tile
        self.runs.append((len(self.tokens) + 1, count))
        self.append([self.img, *[self.context] * count, self.img_end])


def insert_missing_tags(
    messages: Sequence[Message], n_images: int, where: str = ""
) -> list[Message]:
    r"""Puts <image> tags in front of the first user message if no user message has any.

    One image: `<image>\n`. Several: `Image-1: <image>\nImage-2: <image>\n` and so on. The texts of
    a conversation with tags, or without images, are kept; `encode_chat` checks the number of tags.
    Messages with more tags than images get the key "images".
    """
    _check_form(messages, where)
    users = [index for index, message in enumerate(messages) if message["role"] == "user"]
    if not n_images or not users or _count_tags(messages):
        places = zip(messages, count_places(messages, n_images), strict=True)
        return [
            {**message, "images": count}
            if message["role"] == "user" and count < _count_tags([message])
            else message
            for message, count in places
        ]
    if n_images == 1:
        tags = f"{IMAGE_TAG}\n"
    else:
        tags = "".join(f"Image-{number}: {IMAGE_TAG}\n" for number in range(1, n_images + 1))
    first = messages[users[0]]
    return [
        *messages[: users[0]],
        {**first, "content": tags + first["content"]},
        *messages[users[0] + 1 :],
    ]


def count_places(messages: Sequence[Message], n_images: int) -> list[int]:
    """Counts the <image> of each message that are places of images: the first n_images of users."""
    places = []
    for message in messages:
        tags = _count_tags([message])
        places.append(min(tags, n_images, message.get("images", tags)))
        n_images -= places[-1]
    return places


def _at(where: str) -> str:
    return f"{where}: " if where else ""


def _count_tags(messages: Sequence[Message]) -> int:
    return sum(
        message["content"].count(IMAGE_TAG) for message in messages if message["role"] == "user"
    )


def _check_form(messages: Sequence[Message], where: str) -> None:
    """Raises ChatError unless each message has a known role and a text."""
    at = _at(where)
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise ChatError(
                f"{at}message {number} is {excerpt(message)}; expected "
                f'{{"role": ..., "content": ...}}'
            )
        if message["role"] not in ROLES:
            raise ChatError(
                f"{at}message {number} has role {excerpt(message['role'])}; expected "
                f"{', '.join(ROLES)}"
            )
        if not isinstance(message["content"], str):
            kind = type(message["content"]).__name__
            raise ChatError(
                f"{at}message {number} has content of type {kind}; expected text, with {IMAGE_TAG} "
                f"for an image"
            )


def _check_turns(messages: Sequence[Message], add_generation_prompt: bool, where: str) -> None:
    """Raises ChatError unless the roles are [system,] user, assistant, user, ..."""
    at = _at(where)
    start = 1 if messages and messages[0]["role"] == "system" else 0
    if len(messages) == start:
        raise ChatError(f"{at}the conversation has no user message; give at least one")
    for number, message in enumerate(messages[start:], start + 1):
        expected = ("user", "assistant")[(number - start - 1) % 2]
        if message["role"] == "system":
            raise ChatError(f"{at}message {number} is a system message; only the first may be one")
        if message["role"] != expected:
            raise ChatError(
                f"{at}message {number} is the {message['role']}'s where the {expected}'s was "
                f"expected; user and assistant must take turns, user first: join neighbors of one "
                f"role, or add the missing message"
            )
    if add_generation_prompt and messages[-1]["role"] != "user":
        raise ChatError(
            f"{at}the last message is the assistant's, so there is nothing to answer; end with a "
            f"user message"
        )


def _check_images(messages: Sequence[Message], tiles_per_image: Sequence[int], where: str) -> None:
    tags = sum(count_places(messages, len(tiles_per_image)))
    if tags < len(tiles_per_image):
        raise ChatError(
            f"{_at(where)}{len(tiles_per_image)} images, but {tags} {IMAGE_TAG} tags in the user "
            f"messages; each image needs one tag where it belongs"
        )
    for number, tiles in enumerate(tiles_per_image, 1):
        if tiles < 1:
            raise ChatError(
                f"{_at(where)}image {number} has {tiles} tiles; every image needs at least one"
            )
