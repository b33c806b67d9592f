"""Checks requests before they enter the queue."""

from collections.abc import Collection

from internvl3_jax.inference.engine.request import MAX_STOP_IDS, MAX_TOP_LOGPROBS, Request
from internvl3_jax.inference.flash import uses_router
from internvl3_jax.inference.generation_config import GenerationConfig
from internvl3_jax.inference.generator import ContextError, Generator
from internvl3_jax.inference.sampling import Sampling


def check_request(
    request: Request,
    generator: Generator,
    adapters: Collection[str | None],
    max_length: int | None,
) -> None:
    """Checks a request.

    Args:
      adapters: names of the loaded ones, and None for the base.
      max_length: of a prompt with its answer, for which there is memory; None is no limit.

    Raises:
      ContextError: the prompt and its answer are too long.
      ValueError: a field is out of range.
    """
    prompt = request.prompt
    checks = [
        (len(prompt.tokens) > 0, "the prompt has no tokens"),
        (request.max_new_tokens > 0, f"max_new_tokens is {request.max_new_tokens}, below 1"),
        (
            len(request.stop_ids) <= MAX_STOP_IDS,
            f"{len(request.stop_ids)} stop ids; there may be {MAX_STOP_IDS}",
        ),
        (
            (request.top_logprobs or 0) in range(MAX_TOP_LOGPROBS + 1),
            f"top_logprobs is {request.top_logprobs}; it must be from 0 to {MAX_TOP_LOGPROBS}",
        ),
        (
            request.adapter in adapters,
            f"there is no adapter {request.adapter!r}; loaded are: "
            f"{', '.join(filter(None, adapters)) or 'none'}",
        ),
    ]
    vocabulary = generator.config.language.vocab_size
    checks += [
        (0 <= token < vocabulary, f"logit_bias has the id {token}; there are {vocabulary} ids")
        for token in request.sampling.logit_bias
    ]
    for holds, text in checks:
        if not holds:
            raise ValueError(text)
    uses_router(request.flash, generator.config)
    config = GenerationConfig(request.max_new_tokens, Sampling(), (0,), request.scaling)
    generator.check_context_length(prompt, config)
    length = len(prompt.tokens) + request.max_new_tokens
    if max_length is not None and length > max_length:
        raise ContextError(
            f"the prompt of {len(prompt.tokens):,} tokens and {request.max_new_tokens:,} new "
            f"ones are {length:,}; there is room for {max_length:,}. Use fewer images, a "
            "lower max_tiles, a lower max_new_tokens, or an engine with a larger max_length"
        )
