"""The parts of one turn of a conversation: messages, and images cut into tiles."""

import numpy as np

from internvl3_jax.config import ProcessorConfig
from internvl3_jax.data.batch import cut_images
from internvl3_jax.data.media.images import ImageError
from internvl3_jax.data.text.chat_template import ChatError
from internvl3_jax.inference.given_images import open_images
from internvl3_jax.inference.options import Options, resolve_system, units


def image_tiles(
    images, processor: ProcessorConfig, options: Options, where: str = ""
) -> tuple[list[np.ndarray], list[int]]:
    """Returns the tiles u8[n,S,S,3] and the V2PE units of each image of one turn.

    Args:
      images: as of `Chat`.
      where: what errors call the question.

    Raises:
      ImageError: an image cannot be read.
      ChatError: there are neither one delta nor as many as images.
    """
    try:
        opened = open_images(images, processor, options)
    except ImageError as error:
        raise ImageError(f"{where}: {error}" if where else str(error)) from error
    deltas = [processor.delta] if options.delta is None else units(options.delta)
    if len(deltas) == 1:
        deltas = deltas * len(opened)
    if len(deltas) != len(opened):
        raise ChatError(
            f"{where + ': ' if where else ''}{len(deltas)} deltas for {len(opened)} images; give "
            "one, or one per image"
        )
    limits = {"tiles": options.tiles, "max_total_tiles": options.max_total_tiles}
    return cut_images(opened, processor, options.max_tiles, **limits), deltas


def user_message(text: str) -> dict:
    """Returns a question as a message."""
    return {"role": "user", "content": text}


def system_messages(options: Options) -> list[dict]:
    """Returns the system message of the options; none for that of the checkpoint."""
    system = resolve_system(options.system, options.thinking)
    return [] if system is None else [{"role": "system", "content": system}]
