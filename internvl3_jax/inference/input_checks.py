"""Checks of infer.py's inputs before a model is loaded."""

import os
import pathlib
import sys

from internvl3_jax.data.media.given import Limits
from internvl3_jax.data.media.images import open_image
from internvl3_jax.data.media.inputs import OpenedDocument, OpenedVideo
from internvl3_jax.data.text.media_tags import TAGS
from internvl3_jax.inference import answer_flags, loading, media_flags, prompts
from internvl3_jax.inference.options import Options, resolve_temperature
from internvl3_jax.inference.output_path import check_output_path
from internvl3_jax.inference.requests import check_requests, read_requests, tag_remarks
from internvl3_jax.io.checkpoint_paths import check_exists
from internvl3_jax.io.terminal import printable


def check_inputs(flags) -> tuple[list[dict] | None, str | None]:
    """Checks whatever can be checked without a model; expands ~ in flags.image.

    Returns:
      (the requests of --requests, the text of --prompt), None where the flag is not given

    Raises:
      ValueError: naming the flag, file or line that is wrong.
    """
    Options(**answer_flags.chat_options())
    _remark_sampling(flags)
    _check_directories(flags)
    flags.image = [os.path.expanduser(image) for image in flags.image]
    for image in flags.image:
        open_image(image, max_pixels=flags.max_image_pixels, allow_truncated=flags.allow_truncated)
    if flags.draw:
        inputs = [*flags.image, *flags.video, *flags.pdf]
        check_output_path(pathlib.Path(os.path.expanduser(flags.draw)), inputs, "--draw")
    _, videos, documents = media_flags.inputs()
    limits = Limits(max_pixels=flags.max_image_pixels, allow_truncated=flags.allow_truncated)
    for video in videos:
        OpenedVideo(video, limits)
    for document in documents:
        OpenedDocument(document, limits)
    prompt = None if flags.prompt is None else prompts.read_prompt(flags.prompt)
    if prompt is not None:
        counts = len(flags.image), len(videos), len(documents)
        _check_prompt(prompt, counts, len(flags.delta))
    if not flags.requests:
        return None, prompt
    requests = read_requests(flags.requests, *media_flags.of_requests())
    check_requests(requests, flags.on_error)
    if remark := tag_remarks(requests):
        _note(remark)
    return requests, prompt


def _check_directories(flags) -> None:
    adapters = loading.named_adapters(flags.adapter)
    if flags.use and flags.use not in adapters:
        known = ", ".join(adapters) or "none is given"
        raise ValueError(f"--use is {flags.use!r}; there is no such --adapter: {known}")
    for path in [*adapters.values(), *([flags.critic] if flags.critic else [])]:
        check_exists(path)
    loading.check_cache(flags.compilation_cache)


def _remark_sampling(flags) -> None:
    """Says that top_p and top_k have no effect on greedy decoding."""
    unused = [name for name in ("top_p", "top_k") if not flags[name].using_default_value]
    temperature = resolve_temperature(flags.temperature, flags.thinking)
    if unused and not temperature and not flags.best_of:
        _note(f"--{unused[0]} has no effect at temperature 0, which is greedy decoding")


def _check_prompt(prompt: str, counts: tuple[int, int, int], num_deltas: int) -> None:
    """Compares the prompt's tags and the deltas with the images, videos and documents."""
    for (kind, tag), count in zip(TAGS.items(), counts, strict=True):
        if 0 < (tags := prompt.count(tag)) < count:
            raise ValueError(
                f"{count} {kind}s, but {tags} {tag} tags in --prompt; write one for each, or none"
            )
    if num_deltas > 1 and num_deltas != sum(counts):
        raise ValueError(
            f"{num_deltas} deltas for {sum(counts)} images; give one, or one per image"
        )
    if remark := prompts.tag_remark(prompt, *counts):
        _note(f"--prompt: {remark}")


def _note(remark: str) -> None:
    # Not `answering.note`, which asks jax for the number of this host: jax must not be initialized
    # before the hosts have joined.
    print(printable(f"note: {remark}"), file=sys.stderr)
