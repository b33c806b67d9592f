"""Reads the body of /v1/chat/completions."""

import dataclasses
import math
import secrets
from collections.abc import Mapping, Sequence

from internvl3_jax.config import TILE_RULES
from internvl3_jax.inference.engine.request import MAX_STOP_IDS, MAX_TOP_LOGPROBS, RowSampling
from internvl3_jax.inference.flash import MODES
from internvl3_jax.inference.options import MAX_TILES, Options, resolve_temperature
from internvl3_jax.inference.sampling import MIN_TEMPERATURE
from internvl3_jax.io.terminal import excerpt
from internvl3_jax.serve.body import Fields, invalid
from internvl3_jax.serve.errors import ApiError
from internvl3_jax.serve.grammar_fields import GrammarText, read_grammar
from internvl3_jax.serve.limits import Limits
from internvl3_jax.serve.messages import Turn, read_messages

MAX_STOPS, LONGEST_STOP = 16, 1024
MAX_BIASES = 1024
# Fields of OpenAI, vLLM, SGLang and LMDeploy that have no effect here.
IGNORED = (
    "user",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "store",
    "metadata",
    "service_tier",
    "verbosity",
    "reasoning_effort",
    "include_reasoning",
    "separate_reasoning",
    "parallel_tool_calls",
    "prediction",
    "priority",
    "request_id",
    "guided_decoding_backend",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "early_stopping",
    "cache_salt",
    "do_sample",
    "return_token_ids",
)
# Fields that are not supported, with the values that mean so.
NEUTRAL = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "ignore_eos": (False,),
    "min_tokens": (0,),
    "min_new_tokens": (0,),
    "echo": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "include_stop_str_in_output": (False,),
    "add_special_tokens": (False,),
    "truncate_prompt_tokens": (),
    "prompt_logprobs": (),
    "logits_processors": ([],),
    "documents": ([],),
    "chat_template": (),
    "videos": ([],),
    "regex": (),
    "ebnf": (),
}


@dataclasses.dataclass(frozen=True)
class ChatRequest:
    """A checked request.

    Attributes:
      model: name of the model or adapter; None is the base.
      turns: messages.
      options: of the images, stop texts and thinking. Its `max_new_tokens` and sampling are unused.
      deltas: V2PE steps, one or one per image of the conversation; None is the checkpoint's.
      sampling: of the first answer; the others have the following seeds.
      n: number of answers.
      num_best: how many of them are returned, chosen by the critic; None: all, in their order.
      max_new_tokens: None is the server's, as far as there is room.
      stop_ids: of further stop tokens.
      top_logprobs: None: no log-probabilities.
      grammar: what the answers must match.
    """

    model: str | None
    turns: Sequence[Turn]
    options: Options
    deltas: Sequence[str | float] | None
    sampling: RowSampling
    n: int = 1
    num_best: int | None = None
    max_new_tokens: int | None = None
    stop_ids: tuple[int, ...] = ()
    top_logprobs: int | None = None
    grammar: GrammarText | None = None
    stream: bool = False
    include_usage: bool = False


def read_chat_request(
    fields: Fields, limits: Limits, defaults: Options, vocab_size: int
) -> ChatRequest:
    """Reads and checks a body.

    Args:
      defaults: of the server.
      vocab_size: number of token ids.

    Raises:
      ApiError: it names the field that is wrong.
    """
    thinking = _read_thinking(fields, defaults.thinking)
    stream = fields.get("stream", bool, False)
    n, num_best = _read_n(fields, limits, stream)
    read = ChatRequest(
        model=fields.get("model", str, None),
        turns=read_messages(fields.get("messages", list), limits),
        options=_read_options(fields, defaults, thinking),
        deltas=_read_deltas(fields, defaults),
        sampling=_read_sampling(fields, resolve_temperature(None, thinking), vocab_size),
        n=n,
        num_best=num_best,
        max_new_tokens=_read_max_tokens(fields),
        stop_ids=_read_stop_ids(fields, vocab_size),
        top_logprobs=_read_logprobs(fields),
        grammar=read_grammar(fields),
        stream=stream,
        include_usage=_read_stream_options(fields, stream),
    )
    fields.finish(IGNORED, NEUTRAL)
    if num_best is not None and read.sampling.temperature < MIN_TEMPERATURE:
        raise ApiError(
            "best_of needs different answers; give a temperature above 0, such as 0.7",
            param="best_of",
        )
    if read.grammar is not None and thinking:
        raise ApiError(
            f"{read.grammar.field} and thinking do not go together: the reasoning would have to "
            "match, too. Leave one of them out",
            param=read.grammar.field,
        )
    return read


def _read_thinking(fields: Fields, default: bool) -> bool:
    """Returns `thinking`, or what vLLM's and SGLang's chat_template_kwargs say."""
    given = fields.get("thinking", bool, None)
    template = fields.object("chat_template_kwargs")
    if template is not None:
        for name in ("enable_thinking", "thinking"):
            value = template.get(name, bool, None)
            if value is not None and given not in (None, value):
                raise ApiError(
                    f"{template.name(name)} is {value}, and thinking is {given}; give one",
                    param=template.name(name),
                )
            given = value if given is None else given
        template.finish()
    return default if given is None else given


def _read_options(fields: Fields, defaults: Options, thinking: bool) -> Options:
    stop = fields.get("stop", (str, list), [])
    stops = [stop] if isinstance(stop, str) else stop
    if len(stops) > MAX_STOPS:
        raise ApiError(
            f"stop has {len(stops):,} texts; at most {MAX_STOPS} are taken", param="stop"
        )
    for index, text in enumerate(stops):
        if not isinstance(text, str) or not 0 < len(text) <= LONGEST_STOP:
            raise ApiError(
                f"stop[{index}] is {excerpt(text)}; expected a text of 1 to {LONGEST_STOP:,} "
                "characters",
                param="stop",
            )
    max_tiles = fields.get("max_tiles", int, None, low=1, high=MAX_TILES)
    processor = fields.object("mm_processor_kwargs")
    if processor is not None:  # vLLM's name
        patch = processor.get("max_dynamic_patch", int, None, low=1, high=MAX_TILES)
        processor.finish()
        max_tiles = patch if max_tiles is None else max_tiles
    changes = {
        "max_tiles": max_tiles,
        "max_total_tiles": fields.get("max_total_tiles", int, None, low=0, high=MAX_TILES),
        "tiles": fields.get("tiles", str, None, choices=TILE_RULES),
        "flash": fields.get("flash", str, None, choices=MODES),
    }
    changes = {name: value for name, value in changes.items() if value is not None}
    return dataclasses.replace(defaults, thinking=thinking, stop=tuple(stops), **changes)


def _read_deltas(fields: Fields, defaults: Options) -> list | None:
    given = fields.get("delta", (str, float, list), None)
    if given is None:
        return defaults.delta
    deltas = given if isinstance(given, list) else [given]
    try:
        Options(delta=deltas)
    except ValueError as error:
        raise ApiError(str(error), param="delta") from error
    if not deltas:
        raise ApiError("delta is an empty list; give one, or one per image", param="delta")
    return deltas


def _read_sampling(fields: Fields, temperature: float, vocab_size: int) -> RowSampling:
    names = ("top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
    given = {name: fields.get(name, float, None) for name in names}
    top_k = fields.get("top_k", int, 0)
    seed = fields.get("seed", int, None, low=-(2**63), high=2**64 - 1)
    try:
        return RowSampling(
            temperature=float(fields.get("temperature", float, temperature)),
            top_k=0 if top_k == -1 else top_k,  # vLLM writes -1
            seed=secrets.randbits(32) if seed is None else seed % 2**32,
            logit_bias=_read_biases(fields, vocab_size),
            **{name: float(value) for name, value in given.items() if value is not None},
        )
    except ValueError as error:
        raise invalid(error, (*names, "temperature", "top_k", "logit_bias")) from error


def _read_biases(fields: Fields, vocab_size: int) -> Mapping[int, float]:
    biases = {}
    given = fields.get("logit_bias", dict, {})
    if len(given) > MAX_BIASES:
        raise ApiError(
            f"logit_bias has {len(given):,} tokens; at most {MAX_BIASES:,} are taken",
            param="logit_bias",
        )
    for token, bias in given.items():
        if not token.isascii() or not token.isdigit() or not int(token[:12]) < vocab_size:
            raise ApiError(
                f"logit_bias has the key {excerpt(token)}; expected token ids from 0 to "
                f"{vocab_size - 1:,}",
                param="logit_bias",
            )
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not math.isfinite(bias):
            raise ApiError(
                f"logit_bias of token {token} is {excerpt(bias)}; expected a number",
                param="logit_bias",
            )
        biases[int(token)] = float(bias)
    return biases


def _read_n(fields: Fields, limits: Limits, stream: bool) -> tuple[int, int | None]:
    """Returns the number of answers, and how many of them are returned (`ChatRequest.num_best`)."""
    n = fields.get("n", int, 1, low=1, high=limits.answers)
    best_of = fields.get("best_of", int, None, low=1, high=limits.answers)
    if best_of is None or best_of == n:
        return n, None
    if best_of < n:
        raise ApiError(
            f"best_of is {best_of} and n is {n}; the n best are returned, so that best_of must not "
            "be less",
            param="best_of",
        )
    if stream:
        raise ApiError(
            "best_of is known only when all answers have ended; leave out stream", param="best_of"
        )
    return best_of, n


def _read_max_tokens(fields: Fields) -> int | None:
    """Returns max_completion_tokens or its old name, max_tokens."""
    names = ("max_completion_tokens", "max_tokens", "max_new_tokens")
    given = [(name, fields.get(name, int, None, low=1, high=2**31 - 1)) for name in names]
    given = [(name, value) for name, value in given if value is not None]
    if len({value for _, value in given}) > 1:
        raise ApiError(
            f"{given[0][0]} is {given[0][1]} and {given[1][0]} is {given[1][1]}; they mean the "
            "same: give one",
            param=given[1][0],
        )
    return given[0][1] if given else None


def _read_stop_ids(fields: Fields, vocab_size: int) -> tuple[int, ...]:
    ids = fields.get("stop_token_ids", list, [])
    for index, token in enumerate(ids):
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
            raise ApiError(
                f"stop_token_ids[{index}] is {excerpt(token)}; expected token ids from 0 to "
                f"{vocab_size - 1:,}",
                param="stop_token_ids",
            )
    if len(set(ids)) > MAX_STOP_IDS // 2:
        raise ApiError(
            f"stop_token_ids has {len(ids)} ids; at most {MAX_STOP_IDS // 2} are taken",
            param="stop_token_ids",
        )
    return tuple(dict.fromkeys(ids))


def _read_logprobs(fields: Fields) -> int | None:
    wanted = fields.get("logprobs", bool, False)
    top = fields.get("top_logprobs", int, None, low=0, high=MAX_TOP_LOGPROBS)
    if top and not wanted:
        raise ApiError("top_logprobs needs logprobs: true; give both", param="top_logprobs")
    return (top or 0) if wanted else None


def _read_stream_options(fields: Fields, stream: bool) -> bool:
    """Returns whether the stream ends with the usage."""
    options = fields.object("stream_options")
    if options is None:
        return False
    if not stream:
        raise ApiError("stream_options needs stream: true; give both", param="stream_options")
    include = options.get("include_usage", bool, False)
    options.finish(("include_obfuscation", "continuous_usage_stats"))
    return include
