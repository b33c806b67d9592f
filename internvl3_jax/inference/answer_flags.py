"""The flags of infer.py, which of them go together, and the options that they give `Chat`, `Critic`
and `best_of_many`.
"""

from absl import flags

from internvl3_jax.data import critic_format
from internvl3_jax.inference import media_flags
from internvl3_jax.io.command_line import UsageError

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(media_flags)

# --- the model ------------------------------------------------------------------------------------
flags.DEFINE_string(
    "checkpoint",
    None,
    "Checkpoint directory, training run, released safetensors directory or hub id.",
    required=True,
)
flags.DEFINE_multi_string(
    "adapter",
    [],
    "LoRA run or PEFT directory to put on the checkpoint; may be repeated, as NAME=DIR. The first "
    "is used.",
)
flags.DEFINE_string("use", None, "Name of the adapter to use in place of the first; empty: none.")
flags.DEFINE_enum(
    "dtype",
    None,
    ["float32", "bfloat16", "float16"],
    "Dtype of parameters and computation. Default: float32 on a CPU, elsewhere as stored.",
)
flags.DEFINE_enum(
    "weights",
    None,
    ["int8", "fp8", "nf4"],
    "Quantize the kernels of decoder layers and head while they are read; see docs/inference.md.",
)
flags.DEFINE_bool(
    "quantize_tower", False, "With --weights, quantize the vision tower and the projector, too."
)
flags.DEFINE_enum("cache", None, ["int8"], "Keep keys and values in 8 bits; see docs/inference.md.")
flags.DEFINE_string("system", None, "System message in place of the checkpoint's.")

# --- the question ---------------------------------------------------------------------------------
flags.DEFINE_string(
    "prompt",
    None,
    r"The question; \n is a line break, @FILE a file, - stdin. Without it and --requests a "
    "conversation starts.",
)
flags.DEFINE_multi_string(
    "image", [], "Image file; may be repeated. <image> in the prompt marks the places."
)
flags.DEFINE_bool(
    "json", False, "Print one JSON object per answer, on a line of its own, instead of the text."
)
flags.DEFINE_bool("stats", False, "Print times and token counts to stderr.")

# --- the answer -----------------------------------------------------------------------------------
flags.DEFINE_integer("max_new_tokens", 1024, "Longest answer, in tokens.", lower_bound=1)
flags.DEFINE_bool(
    "thinking",
    False,
    "Let the model reason before it answers (InternVL3.5): its system message for that, or "
    "--system, and temperature 0.6.",
)
flags.DEFINE_float(
    "temperature",
    None,
    "0 is greedy decoding. Default: 0, or 0.6 with --thinking.",
    lower_bound=0.0,
)
flags.DEFINE_float(
    "top_p", 1.0, "Sample from the likeliest tokens that together reach this probability."
)
flags.DEFINE_integer("top_k", 0, "Sample from the k likeliest tokens; 0 is all.", lower_bound=0)
flags.DEFINE_integer("seed", 0, "Seed of the sampling.", lower_bound=0)
flags.DEFINE_bool(
    "prompt_lookup",
    False,
    "Guess tokens from the prompt and the answer and check several at once: the same greedy answer "
    "in less time where it repeats what it read.",
)
flags.DEFINE_multi_string("stop", [], "Text that ends an answer; may be repeated.")

# --- images ---------------------------------------------------------------------------------------
IMAGE_FLAGS = ("max_tiles", "tiles", "max_total_tiles", "max_image_pixels", "allow_truncated")
flags.DEFINE_enum(
    "flash",
    None,
    ["off", "auto"],
    "auto: the router of an InternVL3.5-Flash model decides which tiles get a quarter of the "
    "tokens; off: none do. Default: auto where the model has a router.",
)
flags.DEFINE_integer(
    "max_tiles",
    None,
    "Largest number of tiles of an image, or of all with --tiles shared, without thumbnails.",
    lower_bound=1,
)
flags.DEFINE_enum(
    "tiles",
    None,
    ["per image", "shared"],
    "Whether --max_tiles is for each image or shared by all.",
)
flags.DEFINE_integer(
    "max_total_tiles",
    None,
    "Largest number of tiles of all images of a turn; 0: no limit.",
    lower_bound=0,
)
flags.DEFINE_multi_string(
    "delta", [], "V2PE step of the images' tokens, such as 1/4; once, or once per image."
)
flags.DEFINE_integer(
    "max_image_pixels",
    None,
    "Larger images are refused; 0: no limit. Default: 89 million.",
    lower_bound=0,
)
flags.DEFINE_bool("allow_truncated", False, "Accept truncated images; the missing part is gray.")

# --- many questions -------------------------------------------------------------------------------
flags.DEFINE_string("requests", None, "JSONL file of questions.")
flags.DEFINE_string("output", None, "Where the answers to --requests go (JSONL).")
flags.DEFINE_integer("batch_size", 8, "Answers written together with --requests.", lower_bound=1)
flags.DEFINE_enum(
    "on_error",
    "note",
    ["note", "stop"],
    "A request that cannot be answered: write the error in its place and continue, or stop.",
)
flags.DEFINE_bool("retry_errors", False, "Ask the requests again that have an error in --output.")

# --- best of N ------------------------------------------------------------------------------------
flags.DEFINE_integer(
    "best_of",
    None,
    "Number of answers to choose from, the first greedy, the others sampled; see "
    "docs/best_of_n.md.",
    lower_bound=1,
    upper_bound=1024,
)
flags.DEFINE_string(
    "critic", None, "Checkpoint of the critic that chooses; --checkpoint itself if it is its own."
)
flags.DEFINE_bool("majority", False, "Choose the most frequent final answer, without a critic.")
flags.DEFINE_enum(
    "aggregate",
    "mean",
    ["mean", "min", "max", "product"],
    "How the critic's scores of the steps are combined.",
)
flags.DEFINE_integer(
    "max_steps", None, "Largest number of steps to score; more are merged.", lower_bound=1
)
flags.DEFINE_string(
    "critic_system",
    None,
    "System message for the critic in place of its checkpoint's; visualprm: its data's; "
    "visualprm_trained: as its trainer showed it.",
)

# --- devices --------------------------------------------------------------------------------------
flags.DEFINE_integer(
    "devices",
    1,
    "Number of devices to shard the model over (tensor parallelism).",
    lower_bound=1,
)
flags.DEFINE_integer(
    "fsdp",
    1,
    "Number of --devices to shard the weights over by their width as well (FSDP); for more "
    "devices than key heads.",
)
flags.DEFINE_bool("hosts", False, "Use all devices of all hosts. Each host runs this command.")
flags.DEFINE_string(
    "compilation_cache",
    "~/.cache/internvl3_jax/xla",
    "Directory that keeps compiled programs; empty: none.",
)

# --- checks ---------------------------------------------------------------------------------------
flags.DEFINE_enum(
    "verify",
    "full",
    ["full", "sizes", "none"],
    "How a checkpoint's files are compared with what was written, before they are used.",
)
flags.DEFINE_bool(
    "accept_fingerprint",
    False,
    "Use a checkpoint whose files no longer agree with how it was made.",
)
flags.DEFINE_bool(
    "allow_nonfinite", False, "Open a checkpoint that has NaN or infinite parameters."
)

# Headings of -h and the flags below them.
SECTIONS = {
    "Model": [
        "checkpoint",
        "adapter",
        "use",
        "dtype",
        "weights",
        "quantize_tower",
        "cache",
        "system",
    ],
    "Question": ["prompt", "image", "json", "stats", *media_flags.BOX_NAMES],
    "Answer": [
        "max_new_tokens",
        "thinking",
        "temperature",
        "top_p",
        "top_k",
        "seed",
        "prompt_lookup",
        "stop",
    ],
    "Images": [
        "flash",
        "max_tiles",
        "tiles",
        "max_total_tiles",
        "delta",
        "max_image_pixels",
        "allow_truncated",
    ],
    "Videos and documents": list(media_flags.NAMES),
    "Many questions": ["requests", "output", "batch_size", "on_error", "retry_errors"],
    "Best of N": ["best_of", "critic", "majority", "aggregate", "max_steps", "critic_system"],
    "Devices": [
        "devices",
        "fsdp",
        "hosts",
        "coordinator",
        "processes",
        "process",
        "compilation_cache",
    ],
    "Checks": ["verify", "accept_fingerprint", "allow_nonfinite"],
}


def check_flags() -> None:
    """Raises UsageError for flags that do not go together."""
    if FLAGS.requests and (FLAGS.prompt is not None or FLAGS.image or not FLAGS.output):
        raise UsageError(
            "--requests needs --output, and takes prompts and images from the file alone"
        )
    if FLAGS.output and not FLAGS.requests:
        raise UsageError("--output is for the answers to --requests; give that, too")
    if FLAGS.requests and FLAGS.json:
        raise UsageError(
            "--json is about what is printed; the answers to --requests are JSON already"
        )
    if FLAGS.image and FLAGS.prompt is None:
        raise UsageError("--image needs --prompt; in a conversation write /image PATH")
    if FLAGS.retry_errors and (FLAGS.hosts or not FLAGS.requests):
        raise UsageError("--retry_errors is about --requests, on a single host")
    if FLAGS.quantize_tower and not FLAGS.weights:
        raise UsageError("--quantize_tower is about --weights; give that, too, such as int8")
    _check_best_of()
    media_flags.check()
    if FLAGS.hosts and FLAGS.prompt is None and not FLAGS.requests:
        raise UsageError("--hosts needs --prompt or --requests: a conversation is with one host")


def _check_best_of() -> None:
    if not FLAGS.best_of:
        if FLAGS.critic or FLAGS.majority:
            raise UsageError("--critic and --majority choose among --best_of N answers; give N")
    elif bool(FLAGS.critic) == FLAGS.majority:
        raise UsageError("--best_of needs --critic DIR or --majority, one of them, to choose by")
    critic_flags = [
        name
        for name in ("aggregate", "max_steps", "critic_system")
        if not FLAGS[name].using_default_value
    ]
    if critic_flags and not FLAGS.critic:
        raise UsageError(f"--{critic_flags[0]} is about a critic's scores; give --critic DIR")
    if FLAGS.best_of and not FLAGS.requests and FLAGS.prompt is None:
        raise UsageError(
            "--best_of needs --prompt or --requests; a conversation takes one answer at a time"
        )


def chat_options() -> dict:
    """Returns keyword arguments of `Chat`, with what thinking mode stands for spelled out."""
    from internvl3_jax.inference.options import resolve_system, resolve_temperature

    names = ("max_new_tokens", "top_p", "top_k", "seed", "prompt_lookup", "thinking")
    return {name: FLAGS[name].value for name in (*names, *IMAGE_FLAGS, "cache_gib")} | {
        "temperature": resolve_temperature(FLAGS.temperature, FLAGS.thinking),
        "system": resolve_system(FLAGS.system, FLAGS.thinking),
        "stop": tuple(FLAGS.stop),
        "flash": FLAGS.flash,
        "delta": tuple(FLAGS.delta) or None,
    }


def critic_options() -> dict:
    """Returns keyword arguments of `Critic`."""
    system = critic_format.SYSTEMS.get(FLAGS.critic_system, FLAGS.critic_system)
    images = {name: FLAGS[name].value for name in IMAGE_FLAGS}
    return {"aggregate": FLAGS.aggregate, "max_steps": FLAGS.max_steps, "system": system} | images


def best_of_options() -> dict:
    """Returns keyword arguments of `best_of_many`."""
    from internvl3_jax.inference.options import CANDIDATE_SAMPLING

    return {"n": FLAGS.best_of} | {
        name: FLAGS[name].value
        for name in CANDIDATE_SAMPLING
        if not FLAGS[name].using_default_value
    }


def asked_settings() -> dict:
    """Returns what the answers depend on, as far as the flags say it."""
    settings = chat_options() | media_flags.settings()
    # Answers of before these were options were made without them.
    settings |= {"cache": FLAGS.cache} if FLAGS.cache else {}
    settings = {name: value for name, value in settings.items() if name != "flash" or value}
    if FLAGS.best_of:
        settings |= {"best_of": best_of_options(), "majority": FLAGS.majority}
        settings |= (
            {f"critic.{name}": value for name, value in critic_options().items()}
            if FLAGS.critic
            else {}
        )
    return settings
