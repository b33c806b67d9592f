"""Compares a model in fewer bits with the same model in full, token by token.

    python -m internvl3_jax.inference.quality CHECKPOINT --weights int8
    python -m internvl3_jax.inference.quality CHECKPOINT --weights fp8 --requests requests.jsonl
    python -m internvl3_jax.inference.quality CHECKPOINT --weights int8 --cache int8
    python -m internvl3_jax.inference.quality CONVERTED --reference ORIGINAL

The model in full answers each prompt greedily. Then both models read the prompt and this answer
(teacher forcing), and their distributions of each next token are compared:

    mean KL     sum over the vocabulary of p log(p / q), p being of the model in full, in nats
    agreement   how often both have the same most likely token

Prompts are those of --requests (lines as for infer.py), or drawn ones: four images and four
questions in all combinations. Exit status 0: within --max_kl and --min_agreement; 1: not, or an
error; 2: the command line is wrong.

V vocabulary, n tokens of an answer.
"""

import argparse
import dataclasses
import gc
import sys
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jaxtyping import Float32, Int32

from internvl3_jax.checkpoints.checkpoint import Checkpoint, load
from internvl3_jax.data.batch import Prompt
from internvl3_jax.inference import programs
from internvl3_jax.inference.chat import Chat
from internvl3_jax.inference.generator import Generator
from internvl3_jax.inference.prompt_batch import bucket
from internvl3_jax.inference.prompt_cache import extend_prompt
from internvl3_jax.inference.requests import read_requests
from internvl3_jax.io import command_line
from internvl3_jax.model.ops.quantize import FORMATS
from internvl3_jax.positions import rope_scaling

MAX_KL, MIN_AGREEMENT = 0.02, 0.95
MAX_PROMPTS, MAX_NEW_TOKENS = 64, 32  # every token takes 4 V bytes of the host's memory
QUESTIONS = (
    "Describe the image.",
    "What is the main color of this image?",
    "Read all text and numbers in the image.",
    "How many shapes are there, and where are they?",
)


@dataclasses.dataclass(frozen=True)
class Reference:
    """A greedy answer of the model in full.

    Attributes:
      prompt: what was asked.
      answer: token ids, the stop token included.
      log_probs: of each token of the answer, over the vocabulary.
    """

    prompt: Prompt
    answer: list[int]
    log_probs: Float32[np.ndarray, "n V"]


@dataclasses.dataclass(frozen=True)
class Quality:
    """Distance of a quantized model from the unquantized one.

    Attributes:
      prompts: number of prompts.
      tokens: number of tokens compared.
      mean_kl: nats per token; NaN if the model gives NaN.
      agreement: fraction of tokens with the same most likely token.
    """

    prompts: int
    tokens: int
    mean_kl: float
    agreement: float

    def passes(self, max_kl: float = MAX_KL, min_agreement: float = MIN_AGREEMENT) -> bool:
        """Returns whether it is within both thresholds; NaN is not."""
        return self.mean_kl <= max_kl and self.agreement >= min_agreement

    def table(self, max_kl: float = MAX_KL, min_agreement: float = MIN_AGREEMENT) -> str:
        """Returns the numbers and thresholds as a table for the terminal."""
        good, close = self.agreement >= min_agreement, self.mean_kl <= max_kl
        rows = [
            ("", "measured", "threshold", ""),
            ("mean KL, nats", f"{self.mean_kl:.5f}", f"<= {max_kl:g}", _verdict(close)),
            (
                "agreement",
                f"{100 * self.agreement:.2f} %",
                f">= {100 * min_agreement:g} %",
                _verdict(good),
            ),
        ]
        lines = [f"  {name:<14}{value:>10}  {bound:>10}  {end}" for name, value, bound, end in rows]
        count = f"  {self.tokens} tokens of {self.prompts} answers"
        return "\n".join([count, *(line.rstrip() for line in lines)])


def _verdict(good: bool) -> str:
    return "ok" if good else "FAILS"


# --- measuring -----------------------------------------------------------------------------------


def reference_answers(
    checkpoint: Checkpoint,
    requests: Sequence[dict] | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> list[Reference]:
    """Answers prompts greedily, one by one.

    Args:
      checkpoint: the model in full.
      requests: of `read_requests`; None: `drawn_requests`.
      max_new_tokens: longest answer.

    Raises:
      ValueError: a request cannot be asked; the message names it.
    """
    chat = Chat(checkpoint, max_new_tokens=max_new_tokens)
    references = []
    for request in drawn_requests() if requests is None else requests:
        prompt = chat.prepare(request["prompt"], request["image"], where=request["where"])
        (answer,) = chat.answer_many([prompt])
        log_probs = answer_log_probs(chat.generator, prompt, answer.token_ids, chat.processor.delta)
        references.append(Reference(prompt, answer.token_ids, log_probs))
    return references


def compare(
    checkpoint: Checkpoint, references: Sequence[Reference], cache: str | None = None
) -> Quality:
    """Returns how far a checkpoint, with a `cache` of `Chat`, is from what gave the answers."""
    generator = Chat(checkpoint, cache=cache).generator
    kl, same = [], []
    for reference in references:
        full = reference.log_probs
        delta = checkpoint.processor.delta
        few = answer_log_probs(generator, reference.prompt, reference.answer, delta)
        kl.append((np.exp(full) * (full - few)).sum(axis=-1, dtype=np.float64))
        same.append(full.argmax(axis=-1) == few.argmax(axis=-1))
    kl, same = np.concatenate(kl), np.concatenate(same)
    return Quality(len(references), len(kl), float(kl.mean()), float(same.mean()))


def answer_log_probs(
    generator: Generator, prompt: Prompt, answer: Sequence[int], delta: int
) -> Float32[np.ndarray, "n V"]:
    """Returns the log-probabilities of each token of an answer, given those before it.

    The prompt runs into the cache, and the answer reads it from there, as in generation.

    Args:
      delta: V2PE step of the images.
    """
    language = generator.config.language
    scaling = rope_scaling(language, [delta])
    keep, ids = len(prompt.tokens), np.arange(language.vocab_size, dtype=np.int32)
    slots = bucket(bucket(keep) + bucket(len(answer)))
    cache = generator.cache_with_room(1, slots)
    hidden, cache = generator.hidden_states([prompt], 0, cache, scaling)
    parts = [_log_probs(generator, hidden, np.asarray([keep - 1], np.int32), ids)]
    if len(answer) > 1:
        following = extend_prompt(prompt, answer[:-1])
        hidden, _ = generator.hidden_states([following], keep, cache, scaling)
        parts.append(_log_probs(generator, hidden, np.arange(len(answer) - 1, dtype=np.int32), ids))
    return np.concatenate(parts)


def _log_probs(generator: Generator, hidden, indices: Int32[np.ndarray, " n"], ids):
    """Returns f32[n,V] after the tokens at `indices`; few lengths, so that few are compiled."""
    padded = np.zeros((1, 1 << (len(indices) - 1).bit_length()), np.int32)
    padded[0, : len(indices)] = indices
    with generator.mesh_context():
        logs = programs.label_log_probabilities(
            generator.model, generator.params, hidden, padded, ids
        )
    return np.asarray(logs)[0, : len(indices)]


def drawn_requests() -> list[dict]:
    """Returns requests with images of shapes and gradients, the same in every call."""
    rng = np.random.default_rng(0)
    requests = []
    for height, width in ((224, 224), (300, 600), (600, 300), (450, 450)):
        image = np.linspace(rng.integers(0, 256, 3), rng.integers(0, 256, 3), width)
        image = np.broadcast_to(image, (height, width, 3)).astype(np.uint8)
        for _ in range(6):
            top, left = rng.integers(0, height), rng.integers(0, width)
            size = rng.integers(20, 120)
            image = image.copy()
            image[top : top + size, left : left + size] = rng.integers(0, 256, 3)
        for question in QUESTIONS:
            where = f"drawn prompt {len(requests) + 1}"
            requests.append({"prompt": question, "image": [image], "where": where})
    return requests


def measure(
    open_few: Callable[[], Checkpoint],
    open_full: Callable[[], Checkpoint],
    requests: Sequence[dict] | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    cache: str | None = None,
) -> Quality:
    """Loads two checkpoints, one after the other, and compares them.

    Args:
      open_few: loads what is compared.
      open_full: loads the model in full.
      requests: of `read_requests`; None: `drawn_requests`.
      max_new_tokens: longest answer.
      cache: as of `Chat`, of what is compared.

    Raises:
      ValueError: as of `load`, or the model in full is quantized, too.
    """
    full = open_full()
    if full.weights:
        raise ValueError(
            f"{full.directory} holds {full.weights} weights, so it is not the model in full; name "
            "the checkpoint that it was converted from with --reference"
        )
    references = reference_answers(full, requests, max_new_tokens)
    del full
    gc.collect()
    return compare(open_few(), references, cache)


def default_dtype() -> str | None:
    """Returns the dtype in which both are loaded: float32 on a CPU, elsewhere as stored (None)."""
    return "float32" if jax.default_backend() == "cpu" else None


# --- the program ---------------------------------------------------------------------------------


def add_thresholds(parser: argparse._ActionsContainer) -> None:
    """Adds --max_kl and --min_agreement."""
    parser.add_argument(
        "--max_kl", type=float, default=MAX_KL, help="largest mean KL, in nats (%(default)s)"
    )
    parser.add_argument(
        "--min_agreement",
        type=float,
        default=MIN_AGREEMENT,
        help="smallest fraction of equal most likely tokens (%(default)s)",
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line.Parser("quality", description=__doc__)
    parser.add_argument("checkpoint", help="checkpoint, run, released directory or hub id")
    parser.add_argument("--weights", choices=FORMATS, help="format to quantize CHECKPOINT to")
    parser.add_argument("--quantize_tower", action="store_true", help="as of infer.py")
    parser.add_argument("--cache", choices=("int8",), help="keys and values in 8 bits")
    parser.add_argument("--reference", help="the model in full, if CHECKPOINT is quantized itself")
    parser.add_argument("--requests", help="JSONL file of questions, as for infer.py")
    parser.add_argument(
        "--max_prompts",
        type=int,
        default=MAX_PROMPTS,
        help="of --requests, the first (%(default)s)",
    )
    parser.add_argument(
        "--max_new_tokens", type=int, default=MAX_NEW_TOKENS, help="longest answer (%(default)s)"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="as of infer.py"
    )
    add_thresholds(parser)
    options = parser.parse_args(arguments)
    if options.quantize_tower and not options.weights:
        parser.error("--quantize_tower is about --weights; give that, too, such as int8")
    if not (options.weights or options.cache or options.reference):
        parser.error(
            "nothing to compare: give --weights or --cache, or --reference for a CHECKPOINT that "
            "is quantized"
        )
    if options.max_prompts < 1 or options.max_new_tokens < 1:
        parser.error("--max_prompts and --max_new_tokens must be 1 or more")
    return options


def run(options: argparse.Namespace) -> int:
    requests = read_requests(options.requests)[: options.max_prompts] if options.requests else None
    for request in requests or ():
        if request["video"] or request["document"]:
            raise ValueError(f"{request['where']}: only images are compared; leave this line out")
    reference, dtype = options.reference or options.checkpoint, options.dtype or default_dtype()
    weights = {"weights": options.weights, "quantize_tower": options.quantize_tower}
    quality = measure(
        lambda: load(options.checkpoint, dtype=dtype, **weights),
        lambda: load(reference, dtype=dtype),
        requests,
        options.max_new_tokens,
        options.cache,
    )
    thresholds = options.max_kl, options.min_agreement
    fewer = [f"{options.weights} weights"] * bool(options.weights)
    fewer += [f"{options.cache} cache"] * bool(options.cache)
    few = f" with {' and '.join(fewer)}" if fewer else ""
    print(f"{options.checkpoint}{few} against {reference} in full")
    print(quality.table(*thresholds))
    return 0 if quality.passes(*thresholds) else 1


def main(arguments: Sequence[str] | None = None) -> int:
    return command_line.call(lambda: run(parse(arguments)), ImportError)


if __name__ == "__main__":
    sys.exit(main())
