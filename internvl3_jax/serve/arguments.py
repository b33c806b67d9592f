"""The command line of the server."""

import argparse
import ipaddress
import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence

from internvl3_jax.config import TILE_RULES
from internvl3_jax.io.command_line import Parser, expanded

KEY_VARIABLE = "INTERNVL3_API_KEY"
DESCRIPTION = """\
Answers requests of OpenAI's chat completions.

    python -m internvl3_jax.serve --checkpoint DIR
    curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
        -d '{"messages": [{"role": "user", "content": "Hello"}]}'

It listens on 127.0.0.1 alone, reads no files and fetches no addresses, unless the options below say
so. See docs/serving.md.
"""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the options; exits after help or a usage error."""
    parser = Parser("internvl3_jax.serve", description=DESCRIPTION)
    _add_model(parser.add_argument_group("Model"))
    _add_answers(parser.add_argument_group("Answers, where a request does not say otherwise"))
    _add_page(parser.add_argument_group("Page"))
    _add_network(parser.add_argument_group("Network"))
    _add_engine(parser.add_argument_group("Engine"))
    _add_limits(parser.add_argument_group("Limits"))
    _add_devices(parser.add_argument_group("Devices"))
    _add_checks(parser.add_argument_group("Checks"))
    options = parser.parse_args(arguments)
    options.api_key = _read_key(options, os.environ, parser)
    if not is_loopback(options.host) and options.api_key is None and not options.without_key:
        parser.error(
            f"--host {options.host} is open to other machines; give --api_key_file FILE (or "
            f"{KEY_VARIABLE}), or --without_key if whoever reaches it may use it"
        )
    if options.quantize_tower and not options.weights:
        parser.error("--quantize_tower is about --weights; give that, too, such as int8")
    if options.web_examples is not None and not options.web:
        parser.error("--web_examples is about --web; give that, too")
    if options.hosts and options.critic is not None:
        parser.error("--critic runs on one host; leave it or --hosts out")
    if options.coordinator and not options.hosts:
        parser.error("--coordinator is about --hosts; give that, too")
    if options.allow_private_hosts and not options.allow_hosts:
        parser.error("--allow_private_hosts is about --allow_hosts; give that, too")
    options.roots = [_root(path, parser) for path in options.allow_files]
    return options


def is_loopback(host: str) -> bool:
    """Returns whether a host is this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _read_key(
    options: argparse.Namespace, environment: Mapping[str, str], parser: Parser
) -> str | None:
    """Returns the API key of the file or the variable; None if there is neither."""
    if options.api_key_file is None:
        key, where = environment.get(KEY_VARIABLE), KEY_VARIABLE
    else:
        where = str(options.api_key_file)
        try:
            key = options.api_key_file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            parser.error(f"--api_key_file {where} cannot be read ({error})")
    if key is not None and not (key.isascii() and key.isprintable() and " " not in key and key):
        parser.error(f"{where} must hold a key of printable letters without spaces")
    return key


def _root(path: pathlib.Path, parser: Parser) -> pathlib.Path:
    if not path.is_dir():
        parser.error(f"--allow_files {path} is not a folder")
    return path.resolve()


# --- kinds of values -----------------------------------------------------------------------------


def _number(kind: type, low: float, high: float = math.inf) -> Callable[[str], float]:
    def read(text: str):
        value = kind(text)
        if not low <= value <= high:
            bounds = f"at least {low}" if high == math.inf else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"{text} must be {bounds}")
        return value

    read.__name__ = "whole number" if kind is int else "number"
    return read


_COUNT, _FROM_ZERO, _SECONDS = _number(int, 1), _number(int, 0), _number(float, 0.001)


# --- groups --------------------------------------------------------------------------------------


def _add_model(group) -> None:
    group.add_argument(
        "--checkpoint",
        required=True,
        help="checkpoint directory, training run, released safetensors directory or hub id",
    )
    group.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="LoRA run or PEFT directory that requests choose as the model NAME; may be repeated",
    )
    group.add_argument(
        "--model_name", help="what requests call the model; default: the name of its folder"
    )
    group.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of parameters and computation; default: float32 on a CPU, elsewhere as stored",
    )
    group.add_argument(
        "--weights",
        choices=("int8", "fp8", "nf4"),
        help="quantize the kernels of decoder layers and head while they are read",
    )
    group.add_argument(
        "--quantize_tower", action="store_true", help="with --weights, the vision tower, too"
    )
    group.add_argument("--cache", choices=("int8",), help="keep keys and values in 8 bits")


def _add_answers(group) -> None:
    group.add_argument(
        "--max_new_tokens", type=_COUNT, default=1024, help="longest answer (%(default)s)"
    )
    group.add_argument("--system", help="system message in place of the checkpoint's")
    group.add_argument(
        "--thinking", action="store_true", help="reason before each answer (InternVL3.5)"
    )
    group.add_argument("--max_tiles", type=_COUNT, help="tiles of an image, without thumbnails")
    group.add_argument(
        "--tiles", choices=TILE_RULES, help="whether --max_tiles is for each image or shared"
    )
    group.add_argument(
        "--max_total_tiles", type=_FROM_ZERO, help="tiles of the images of a message; 0: no limit"
    )
    group.add_argument("--delta", help="V2PE step of the images' tokens, such as 1/4")
    group.add_argument(
        "--allow_truncated", action="store_true", help="accept images whose end is missing"
    )
    group.add_argument(
        "--critic",
        metavar="DIR",
        help="checkpoint that chooses among the answers to a request with best_of; may be that of "
        "--checkpoint",
    )


def _add_page(group) -> None:
    group.add_argument(
        "--web", action="store_true", help="serve a page for people with a browser, at /"
    )
    group.add_argument(
        "--web_examples",
        type=expanded,
        metavar="FILE",
        help="with --web: JSONL file of questions (prompt, image) that the page offers",
    )


def _add_network(group) -> None:
    group.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    group.add_argument(
        "--port", type=_number(int, 0, 65535), default=8000, help="(%(default)s); 0: a free one"
    )
    group.add_argument(
        "--api_key_file",
        type=expanded,
        metavar="FILE",
        help=f"file with the key that requests must have; or the variable {KEY_VARIABLE}",
    )
    group.add_argument(
        "--without_key", action="store_true", help="open --host to other machines without a key"
    )
    group.add_argument(
        "--allow_files",
        action="append",
        default=[],
        type=expanded,
        metavar="DIR",
        help="folder whose images requests may name by path; may be repeated",
    )
    group.add_argument(
        "--allow_hosts",
        nargs="+",
        default=[],
        metavar="HOST",
        help="hosts, or HOST:PORT, whose images requests may name by http(s) address",
    )
    group.add_argument(
        "--allow_private_hosts",
        action="store_true",
        help="of --allow_hosts, also those with addresses of this machine and private networks",
    )
    group.add_argument(
        "--log_prompts", action="store_true", help="write the texts of requests to the log"
    )


def _add_engine(group) -> None:
    group.add_argument(
        "--rows", type=_COUNT, default=8, help="answers that decode together (%(default)s)"
    )
    group.add_argument(
        "--max_length",
        type=_number(int, 16),
        default=8192,
        help="longest prompt with its answer, in tokens (%(default)s)",
    )
    group.add_argument(
        "--image_cache_mb",
        type=_FROM_ZERO,
        default=1024,
        help="features of images that are kept (%(default)s)",
    )
    group.add_argument(
        "--no_warm_up",
        action="store_true",
        help="compile with the first requests, not before them",
    )


def _add_limits(group) -> None:
    numbers = (
        ("max_queue", _COUNT, 256, "waiting requests; further ones get status 429"),
        ("max_seconds", _SECONDS, 600.0, "for a request"),
        ("max_body_seconds", _SECONDS, 60.0, "until a body has arrived"),
        ("drain_seconds", _SECONDS, 60.0, "for running requests after SIGTERM"),
        ("max_step_seconds", _SECONDS, 600.0, "for a round of the engine; then /health says 503"),
        ("max_body_mb", _COUNT, 32, "of a body, and of an image"),
        ("max_held_mb", _COUNT, 4096, "bodies and tiles of all requests together"),
        ("max_messages", _COUNT, 256, "messages of a request"),
        ("max_images", _FROM_ZERO, 64, "images, videos and PDFs of a request"),
        ("max_frames", _COUNT, 64, "frames of a video"),
        ("max_pages", _COUNT, 32, "pages of a PDF"),
        ("max_request_tiles", _COUNT, 256, "tiles of a request, thumbnails included"),
        ("max_n", _COUNT, 16, "answers to a request"),
    )
    for name, kind, default, meaning in numbers:
        group.add_argument(
            f"--{name}", type=kind, default=default, metavar="N", help=f"{meaning} (%(default)g)"
        )
    group.add_argument(
        "--max_image_pixels",
        type=_FROM_ZERO,
        help="larger images are refused; 0: no limit; default: 89 million",
    )


def _add_devices(group) -> None:
    group.add_argument(
        "--devices", type=_COUNT, default=None, help="to shard the model over (tensor parallelism)"
    )
    group.add_argument("--fsdp", type=_COUNT, default=1, help="of --devices, as of infer.py")
    group.add_argument(
        "--hosts",
        action="store_true",
        help="use all devices of all hosts; each runs this command, and the first one serves",
    )
    group.add_argument(
        "--coordinator",
        default="",
        metavar="HOST:PORT",
        help="of process 0, with --hosts; not needed on Cloud TPU, SLURM, Open MPI, Kubernetes",
    )
    group.add_argument("--processes", type=int, default=-1, help="with --coordinator: their number")
    group.add_argument("--process", type=int, default=-1, help="with --coordinator: this one")
    group.add_argument(
        "--compilation_cache",
        default="~/.cache/internvl3_jax/xla",
        metavar="DIR",
        help="keeps compiled programs; empty: none",
    )


def _add_checks(group) -> None:
    group.add_argument(
        "--verify",
        choices=("full", "sizes", "none"),
        default="full",
        help="how a checkpoint's files are compared with what was written (%(default)s)",
    )
    group.add_argument("--accept_fingerprint", action="store_true", help="as of infer.py")
    group.add_argument("--allow_nonfinite", action="store_true", help="as of infer.py")
