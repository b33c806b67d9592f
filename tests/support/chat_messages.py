"""Writes chat messages and encodes them with three tokens a tile."""

from internvl3_jax.config import ProcessorConfig
from internvl3_jax.data.text.chat_template import encode_chat

PROCESSOR = ProcessorConfig(tokens_per_tile=3)


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def encode(messages, tokenizer, tiles=(), processor=PROCESSOR, prompt=False, where=""):
    return encode_chat(
        messages, list(tiles), tokenizer, processor, add_generation_prompt=prompt, where=where
    )
