"""Asks a multimodal model.

    python infer.py --checkpoint DIR_OR_HUB_ID --image cat.jpg --prompt "What is in the picture?"
    python infer.py --checkpoint DIR_OR_HUB_ID --image a.jpg --image b.jpg --prompt "Image-1: <image>\\nImage-2: <image>\\nWhat differs?"
    python infer.py --checkpoint DIR_OR_HUB_ID                                      # a conversation; /image PATH, /reset, /quit
    python infer.py --checkpoint BASE --adapter a=runs/a --adapter b=peft_dir --use b    # in a conversation also /adapter NAME
    python infer.py --checkpoint DIR_OR_HUB_ID --requests questions.jsonl --output answers.jsonl --batch_size 8
    python infer.py --checkpoint DIR --image cat.jpg --prompt "Think step by step ..." --best_of 8 --critic CRITIC_DIR
    python infer.py --checkpoint DIR --requests questions.jsonl --output answers.jsonl --best_of 8 --majority
    python infer.py --checkpoint DIR --hosts --fsdp 2 --requests ...              # the same command on every host

A line of --requests is {"prompt": TEXT, "image": PATH or [PATHS], "id": ANY}; image and id may be missing, and relative paths start at
the file's directory. Its answers go to --output in the order asked; lines already answered there are not asked again.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import sys

from absl import app, flags, logging

from internvl3_jax import host_flags

FLAGS = flags.FLAGS

flags.DEFINE_string(
    "checkpoint", None, "Checkpoint directory, training run, released safetensors directory or hub id.", required=True
)
flags.DEFINE_multi_string(
    "adapter", [], "LoRA run or PEFT directory to put on the checkpoint; may be repeated, as NAME=DIR. The first is used."
)
flags.DEFINE_string("use", None, "Name of the adapter to use in place of the first; empty: none.")
flags.DEFINE_multi_string("image", [], "Picture file; may be repeated. <image> in the prompt marks the places.")
flags.DEFINE_string("prompt", None, "The question. Without it and without --requests a conversation starts.")
flags.DEFINE_string("requests", None, "JSONL file of questions.")
flags.DEFINE_string("output", None, "Where the answers to --requests go (JSONL).")
flags.DEFINE_integer("batch_size", 8, "Answers written together with --requests.", lower_bound=1)
flags.DEFINE_integer("max_new_tokens", 1024, "Longest answer.", lower_bound=1)
flags.DEFINE_float("temperature", 0.0, "0 takes the likeliest token (greedy).", lower_bound=0.0)
flags.DEFINE_float("top_p", 1.0, "Draw from the likeliest tokens that together reach this probability.")
flags.DEFINE_integer("top_k", 0, "Draw from this many likeliest tokens; 0 is all.", lower_bound=0)
flags.DEFINE_integer("seed", 0, "Of the draws.", lower_bound=0)
flags.DEFINE_multi_string("stop", [], "Text that ends an answer; may be repeated.")
flags.DEFINE_multi_string("delta", [], "V2PE step of the pictures' tokens, such as 1/4; once, or once per picture.")
flags.DEFINE_integer("max_tiles", None, "Most tiles of all pictures together, thumbnails not counted.", lower_bound=1)
flags.DEFINE_string("system", None, "System message in place of the checkpoint's.")
flags.DEFINE_enum(
    "dtype",
    None,
    ["float32", "bfloat16", "float16"],
    "Of parameters and computation. Default: float32 on a CPU, as stored elsewhere.",
)
flags.DEFINE_integer(
    "devices",
    1,
    "Devices to split the model over, by heads and columns (tensor parallelism): for one too large for one.",
    lower_bound=1,
)
flags.DEFINE_integer(
    "fsdp", 1, "Of --devices, parts that the matrices are split into by their width besides: for more devices than key heads."
)
flags.DEFINE_bool(
    "hosts",
    False,
    "Over all devices of all hosts, each of which runs this command; --coordinator, --processes, --process as of train.py.",
)
flags.DEFINE_integer(
    "best_of", None, "Answers to choose from, the first greedy, the others drawn; see docs/best_of_n.md.", lower_bound=1
)
flags.DEFINE_string("critic", None, "Checkpoint of the critic that chooses; --checkpoint itself if it is its own.")
flags.DEFINE_bool("majority", False, "Choose the commonest final answer, without a critic.")
flags.DEFINE_enum("aggregate", "mean", ["mean", "min", "max", "product"], "What a critic's scores of the steps become.")
flags.DEFINE_integer("max_steps", None, "Steps are merged to at most so many before they are scored.", lower_bound=1)
flags.DEFINE_string(
    "critic_system", None, "System message for the critic in place of its checkpoint's; visualprm: its training's."
)
flags.DEFINE_bool("json", False, "Print one JSON object per answer, on a line of its own, in place of the text.")
flags.DEFINE_bool("stats", False, "Print times and token counts to stderr.")
flags.DEFINE_bool("accept_fingerprint", False, "Use a checkpoint whose files no longer agree with how it was made.")
flags.DEFINE_string("compilation_cache", "~/.cache/internvl3_jax/xla", "Directory that keeps compiled programs; empty: none.")


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"what is {argv[1]!r}? A question goes into --prompt")
    if FLAGS.requests and (FLAGS.prompt or FLAGS.image or not FLAGS.output):
        raise app.UsageError("--requests needs --output, and takes prompts and images from the file alone")
    if FLAGS.image and not FLAGS.prompt:
        raise app.UsageError("--image needs --prompt; in a conversation write /image PATH")
    check_best_of()
    if FLAGS.hosts and FLAGS.prompt is None and not FLAGS.requests:
        raise app.UsageError("--hosts needs --prompt or --requests: a conversation is with one host")
    logging.set_verbosity(logging.WARNING)  # orbax tells every step of every load
    if FLAGS.hosts:
        join_hosts()
    checkpoint = open_checkpoint(FLAGS.checkpoint, FLAGS.adapter)
    chat = open_chat(checkpoint)
    critic = open_critic(checkpoint, chat) if FLAGS.critic else None
    if FLAGS.requests:
        answer_file(chat, critic)
    elif FLAGS.best_of:
        ask_best(chat, critic, FLAGS.prompt, FLAGS.image)
    elif FLAGS.prompt is not None:
        ask(chat, FLAGS.prompt, FLAGS.image)
    else:
        converse(chat)


def join_hosts() -> None:
    """All hosts compute; the first alone says and writes anything."""
    import jax

    from internvl3_jax import distributed

    with contextlib.redirect_stdout(sys.stderr):
        distributed.initialize(*(flag.value for flag in (host_flags.COORDINATOR, host_flags.PROCESSES, host_flags.PROCESS)))
    if jax.process_index():
        sys.stdout = open(os.devnull, "w")


def check_best_of() -> None:
    if not FLAGS.best_of:
        if FLAGS.critic or FLAGS.majority:
            raise app.UsageError("--critic and --majority choose among --best_of N answers; give N")
    elif bool(FLAGS.critic) == FLAGS.majority:
        raise app.UsageError("--best_of needs --critic DIR or --majority, one of them, to choose by")
    of_critic = [name for name in ("aggregate", "max_steps", "critic_system") if not FLAGS[name].using_default_value]
    if of_critic and not FLAGS.critic:
        raise app.UsageError(f"--{of_critic[0]} is about a critic's scores; give --critic DIR")
    if not FLAGS.best_of:
        return
    if not FLAGS.requests and FLAGS.prompt is None:
        raise app.UsageError("--best_of needs --prompt or --requests; a conversation takes one answer at a time")


def open_checkpoint(path: str, adapters: list[str] = ()):
    """Loads a checkpoint, and adapters beside it, onto the device."""
    import jax

    from internvl3_jax import load

    if FLAGS.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(FLAGS.compilation_cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    # A CPU multiplies bfloat16 vectors several times more slowly than float32 ones.
    dtype = FLAGS.dtype or ("float32" if jax.default_backend() == "cpu" else None)
    where = {"mesh": make_mesh(), "adapters": named_adapters(adapters)}
    return load(path, dtype=dtype, accept_fingerprint=FLAGS.accept_fingerprint, **where)


def open_chat(checkpoint):
    from internvl3_jax import Chat

    options = {
        name: FLAGS[name].value for name in ("max_new_tokens", "temperature", "top_p", "top_k", "seed", "max_tiles", "system")
    }
    options |= {"stop": tuple(FLAGS.stop), "delta": tuple(FLAGS.delta) or None}
    chosen = next(iter(checkpoint.adapters), None) if FLAGS.use is None else FLAGS.use or None
    return Chat(checkpoint, chosen, **options)


def named_adapters(given: list[str]) -> dict[str, str]:
    """Name -> directory of "NAME=DIR" or of "DIR", whose last part is its name."""
    pairs = [text.split("=", 1) if "=" in text else (pathlib.Path(text).name, text) for text in given]
    names = [name for name, _ in pairs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two adapters are called {twice[0]!r}; name them: --adapter NAME=DIR")
    return dict(pairs)


def open_critic(checkpoint, chat):
    from internvl3_jax import Critic
    from internvl3_jax.data.steps import SYSTEM

    system = SYSTEM if FLAGS.critic_system == "visualprm" else FLAGS.critic_system
    options = {"aggregate": FLAGS.aggregate, "max_steps": FLAGS.max_steps, "max_tiles": FLAGS.max_tiles, "system": system}
    if FLAGS.critic == FLAGS.checkpoint:
        return Critic(checkpoint, chat.generator, **options)
    return Critic(open_checkpoint(FLAGS.critic), **options)


def make_mesh():
    """Of the first --devices devices, or of all with --hosts; None for one."""
    import jax

    from internvl3_jax import sharding
    from internvl3_jax.config import MeshConfig

    here = len(jax.devices())
    count = here if FLAGS.hosts and FLAGS["devices"].using_default_value else FLAGS.devices
    if count == 1:
        return None
    if count > here or (FLAGS.hosts and count < here):
        raise ValueError(
            f"--devices is {count}; there are {here}{', and all hosts take part' if FLAGS.hosts else ''}: {jax.devices()}"
        )
    if count % FLAGS.fsdp:
        raise ValueError(f"--fsdp is {FLAGS.fsdp}; it must divide the {count} devices")
    return sharding.make_mesh(MeshConfig(fsdp=FLAGS.fsdp, tensor=count // FLAGS.fsdp), jax.devices()[:count])


def ask(chat, question: str, images: list[str]) -> None:
    """Prints the answer as it comes, or its JSON at the end."""
    for piece in chat.stream(question, images):
        if not FLAGS.json:
            print(piece, end="", flush=True)
    print(json.dumps(as_json(chat.last), ensure_ascii=False) if FLAGS.json else "")
    if FLAGS.stats:
        print_stats(chat.last)


def choose(chat, critic, requests: list[tuple[str, list[str]]], first: int = 1) -> list:
    """The best of --best_of answers to each question."""
    from internvl3_jax.best_of_n import SAMPLING, best_of_many

    given = {name: FLAGS[name].value for name in SAMPLING if not FLAGS[name].using_default_value}
    return best_of_many(chat, critic, requests, FLAGS.best_of, first, **given)


def ask_best(chat, critic, question: str, images: list[str]) -> None:
    """Prints the chosen answer, or JSON with all candidates."""
    (choice,) = choose(chat, critic, [(question, images)])
    print(json.dumps(choice.as_json(), ensure_ascii=False) if FLAGS.json else choice.text)
    if FLAGS.stats:
        note(choice.table())


def as_json(answer) -> dict:
    fields = dataclasses.asdict(answer)
    return {name: fields[name] for name in ("text", "token_ids", "prompt_tokens", "tiles", "seconds")}


def print_stats(answer) -> None:
    per_token = f"{1000 * answer.seconds_per_token:.1f} ms per token" if answer.seconds_per_token else "one token"
    note(
        f"first token {answer.first_token_seconds:.3f} s, then {per_token}; {answer.prompt_tokens} prompt tokens "
        f"({answer.reused_tokens} reused), tiles {answer.tiles}, {len(answer.token_ids)} new tokens in {answer.seconds:.3f} s"
    )


def note(text: str) -> None:
    """Beside the answers, from the first host."""
    if is_first_host():
        print(text, file=sys.stderr)


def converse(chat) -> None:
    """Reads questions from the terminal until it ends."""
    images = []
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return
        command, _, argument = line.partition(" ")
        if command == "/quit":
            return
        if command == "/reset":
            chat.reset()
            images = []
        elif command == "/image":
            images.append(argument.strip())
        elif command == "/adapter":
            try:
                chat.use(argument.strip() or None)
            except ValueError as error:
                print(f"error: {error}", file=sys.stderr)
        elif line:
            try:
                ask(chat, line, images)
            except ValueError as error:  # a wrong picture or an overlong question ends the turn, not the conversation
                print(f"error: {error}", file=sys.stderr)
            images = []


def answer_file(chat, critic) -> None:
    """Answers --requests in batches. Each batch is appended to --output as a whole, so a stopped run goes on where it was."""
    from rich.progress import track

    from internvl3_jax.requests import count_answers, read_requests

    requests = read_requests(pathlib.Path(FLAGS.requests))
    output = pathlib.Path(FLAGS.output)
    answered = of_first_host(lambda: count_answers(output, requests))
    if answered:
        note(f"{output} holds {answered} of {len(requests)} answers; going on with the rest")
    size = max(1, FLAGS.batch_size // (FLAGS.best_of or 1))  # questions; --batch_size answers are written together
    batches = range(answered, len(requests), size)
    with (output if is_first_host() else pathlib.Path(os.devnull)).open("a", encoding="utf-8") as file:
        for start in track(batches, description="answering", disable=not (sys.stderr.isatty() and is_first_host())):
            batch = requests[start : start + size]
            questions = [(request["prompt"], request["image"]) for request in batch]
            if FLAGS.best_of:
                answers = choose(chat, critic, questions, start + 1)
                fields = [answer.as_json() for answer in answers]
            else:
                answers = chat.answer_many(questions, first=start + 1)
                fields = [as_json(answer) for answer in answers]
            asked = [{"id": request["id"], "prompt": request["prompt"]} for request in batch]
            lines = [json.dumps(known | found, ensure_ascii=False) for known, found in zip(asked, fields, strict=True)]
            file.write("".join(f"{line}\n" for line in lines))
            file.flush()
            if FLAGS.stats and FLAGS.best_of:
                note(answers[0].table())
            elif FLAGS.stats:
                print_stats(answers[0])
    note(f"{len(requests) - answered} answers written to {output}")


def is_first_host() -> bool:
    import jax

    return jax.process_index() == 0


def of_first_host(count) -> int:
    """What it counts there, on every host."""
    import numpy as np
    from jax.experimental import multihost_utils

    if not FLAGS.hosts:
        return count()
    return int(multihost_utils.broadcast_one_to_all(np.int32(count() if is_first_host() else 0)))


def run(argv):
    from internvl3_jax import distributed

    with distributed.together():
        try:
            main(argv)
        # What the user can mend is one line; anything else is our fault and keeps its traceback.
        except (ValueError, OSError) as error:
            sys.exit(f"error: {error}")


if __name__ == "__main__":
    app.run(run)
