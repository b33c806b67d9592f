"""Invalid settings and flags, and damaged drop lists."""

import random
from collections.abc import Iterator

from tools.fuzz import programs
from tools.fuzz.case import Case, Kind
from tools.fuzz.kinds_requests import line_text, nothing
from tools.fuzz.mutate import edit_bytes, flip_changes, place_changes

DROP = "data/drop.tsv"
# Each line: a field, then values that are invalid for it.
WRONG_SETTINGS = r"""
steps 0 -1 1.5 x 1e9
checkpoint.every 0 -1 x
logging.every 0 -1
host_check_every 0 -1
checkpoint.keep 0 -1
micro_batches 0 -1 3 x
param_dtype x int32 float99
compute_dtype x int8
loss_chunk 0 -5
scan_unroll 0 -1
remat_vision x
remat_language x
attention_vision x
attention_language x
seed -1 x
init_from nowhere/at/all /dev/zero
eval.source gone.json /dev/zero
eval.every -1 x
checkpoint.keep_every -1
data.rows 0 -1 2.5 x 1e12
data.shards 0 3 -1
data.tokens_per_row 0 -1 7 x
data.tiles_per_row 0 -1 x
data.packing_buffer 0 -1
data.workers -1 x
data.deltas () ('0',) ('-1',) ('x',) ('1/3',) ('2',) (1,)
data.source gone.json /dev/zero data/text.jsonl
data.tokenizer nowhere
data.source_weights x
data.text_fraction 2.0 nan
data.on_bad_sample x
data.overlong x
data.loss_reduction x
data.min_frames -1 99
data.max_frames -1
data.samples 0 -1
data.exclude_file gone.tsv /dev/zero
data.ref_logps_file gone.jsonl
data.pairs True x
optimizer.name x sgd
optimizer.learning_rate -1.0 nan inf x
optimizer.schedule cosinus
optimizer.warmup_steps -1 1.5
optimizer.beta1 2.0 -1.0 nan 1.0
optimizer.beta2 2.0 -0.5 nan
optimizer.clip_norm -1.0 nan
optimizer.weight_decay -1.0 nan
optimizer.freeze ('nothing',) ('(',) ('.*',) ('(a+)+$',)
optimizer.moment_dtype x
optimizer.vision_lr_scale -1.0 nan
optimizer.vision_layer_decay -1.0 nan 5.0
optimizer.decay_fraction 2.0 -1.0
optimizer.final_lr_fraction -1.0 nan
loss.kind x mpo
loss.beta -1.0
lora.rank -1 4 x
mesh.fsdp 0 7 -2
mesh.tensor 0 3 -1
mesh.context 0 -1
mesh.data 0 5
model.vision.num_heads 0 5 -1
model.vision.patch_size 0 5
model.vision.hidden_size 0 -8
model.vision.drop_path 2.0 -1.0 nan
model.vision.norm_eps -1.0 nan
model.language.num_kv_heads 0 3
model.language.vocab_size 0 -1 10
model.language.rope_theta 0.0 -1.0 nan
model.language.num_layers 0 -1
model.language.head_dim 7 0
model.image_token_id -1 99999
model.downsample 0 3
model.ps_version v9
processor.stop_tokens ('<none>',) (5,)
processor.max_tiles 0 -1
processor.min_tiles 0 99
processor.template x
processor.image_size 17 0
processor.tokens_per_tile 5 0
nothing 1
data.rowz 3
optimiser.learning_rate 1.0
steps.x 1
"""


def _table(text: str) -> dict[str, list[str]]:
    """Splits lines of a name and its values."""
    return {name: values for name, *values in (line.split() for line in text.strip().splitlines())}


def training_cases(rng: random.Random) -> Iterator[Case]:
    """Yields invalid overrides of a configuration that trains."""
    kind = "training"
    # A run with other settings may succeed: only its message is judged. So may one that saves only
    # its last step.
    fine = {
        ("checkpoint.keep_every", "-1"),
        ("lora.rank", "4"),
        ("seed", "-1"),
        ("optimizer.vision_layer_decay", "5.0"),
        ("eval.every", "-1"),
        ("data.tokens_per_row", "7"),
    }
    fine |= {
        ("data.source", ""),
        ("data.max_frames", "-1"),
        ("data.min_frames", "99"),
        ("data.min_frames", "-1"),
        ("loss.beta", "-1.0"),
        ("data.deltas", "('2',)"),
        ("optimizer.decay_fraction", "2.0"),
        ("data.ref_logps_file", "gone.jsonl"),
        ("mesh.fsdp", "-2"),
    }
    more = {"init_from": ["\x1b[2J"], "data.source": [""]}
    for field, values in _table(WRONG_SETTINGS).items():
        for value in (*values, *more.get(field, ())):
            expected = "either" if (field, value) in fine else "refuse"
            words = (field.split(".")[-1], field.split(".")[0] + ".") if "." in field else (field,)
            yield Case(
                kind, f"{field}={value!r}", expected, nothing, words, (f"--config.{field}={value}",)
            )
    for name, content in {
        "without get_config": "x = 1",
        "of another type": "def get_config():\n    return {'steps': 1}",
        "empty": "",
        "binary": "\x00\x01",
        "that returns nothing": "def get_config():\n    pass",
    }.items():
        spoil = edit_bytes("tiny.py", lambda data, content=content: content.encode())
        yield Case(
            kind,
            f"a configuration file {name}",
            "refuse",
            spoil,
            ("tiny.py", "get_config", "config"),
        )
    yield from (
        Case(kind, name, expected, spoil, ("tiny.py", "config"))
        for name, expected, spoil in place_changes("tiny.py")
        if name.endswith((" missing", " a directory"))
    )
    yield Case(kind, "no configuration", "refuse", nothing, ("--config",), ("--config=",))
    yield Case(
        kind,
        "a configuration that is not there",
        "refuse",
        nothing,
        ("gone.py",),
        ("--config=gone.py",),
    )
    yield Case(kind, "a word too many", "refuse", nothing, ("word",), ("word",))
    yield Case(kind, "an unknown flag", "refuse", nothing, ("wrkdir",), ("--wrkdir=x",))


def drop_cases(rng: random.Random) -> Iterator[Case]:
    kind, names = "drop list", ("drop.tsv",)
    for text in (
        "seen",
        "seen\t99\tx",
        "seen\t-1\tx",
        "seen\tx\ty",
        "nobody\t1\tx",
        "seen\t1.5",
        "\t\t",
        "seen 1 x",
        "seen\t\u0663\tx",
        "seen\t" + "9" * 5000,
        "\x00",
        "\udcff",
        "\x1b[2J\t1\tx",
    ):
        expected = "either" if "\u0663" in text else "refuse"
        yield Case(kind, f"line is {text[:20]!r}", expected, line_text(DROP, 1, text), names)
    for name, expected, spoil in (*place_changes(DROP), *flip_changes(DROP, rng, 4, "either")):
        yield Case(kind, name, expected, spoil, names)
    yield Case(
        kind,
        "UTF-16",
        "either",
        edit_bytes(DROP, lambda data: data.decode().encode("utf-16")),
        names,
    )


# Each line: a flag, then values that are invalid for it.
WRONG_FLAGS = r"""
batch_size 0 -1 x 1.5
max_new_tokens 0 -5 x 99999999
temperature -1 nan inf x 1e-38
top_p -1 2 nan 0 x
top_k -1 x
seed -1 x 99999999999999999999
delta 0 -1 x 1/0 3 1/3 nan
max_tiles 0 -1 x
dtype x int8
devices 0 99 x
fsdp 0 7
checkpoint nowhere /dev/zero conv/config.json ../.. no/such/hub/id
adapter nowhere a= = conv a=conv
use nobody
image gone.png /dev/zero conv conv/config.json
best_of 0 -1 x 2
max_steps 0 2
critic nowhere
aggregate x
requests gone.jsonl ask/requests.jsonl
output x.jsonl
prompt
nothing 1
bach_size 2
"""


def flag_cases(rng: random.Random) -> Iterator[Case]:
    """Yields invalid flags of infer.py."""
    more = {
        "checkpoint": ["", "x" * 5000, "a\0b", "\x1b[2J"],
        "image": ["\x1b[2J.png"],
        "prompt": ["x" * 20_000],
    }
    fine = {
        ("output", "x.jsonl"),
        ("prompt", "x" * 20_000),
        ("max_new_tokens", "99999999"),
        ("seed", "99999999999999999999"),
        ("temperature", "1e-38"),
        ("top_p", "0"),
        ("delta", "1/3"),
    }
    for flag, values in _table(WRONG_FLAGS).items():
        for value in (*values, *more.get(flag, ())):
            words = (
                flag,
                *([value.replace("\x1b", "\\x1b")] if len(value) > 3 else []),
                "prompt" if flag in ("requests", "delta") else flag,
            )
            if value == "a\0b":
                words = (*words, "a\\x00b")
            yield Case(
                "flags",
                f"{flag}={value[:30]!r}",
                "either" if (flag, value) in fine else "refuse",
                nothing,
                words,
                (f"--{flag}={value}",),
            )


def drop(arguments: tuple[str, ...]) -> None:
    few = ("--config.data.min_frames=2", "--config.data.max_frames=4")
    programs.train(
        (
            "--config.data.source=data/meta.json",
            f"--config.data.exclude_file={DROP}",
            *few,
            *arguments,
        )
    )


KINDS = [
    Kind(
        "training",
        ("tiny.py",),
        programs.train,
        training_cases,
        untouched=("run/config.json", "run/checkpoints"),
        seconds=180,
    ),
    Kind(
        "drop list",
        ("data", "tiny.py"),
        drop,
        drop_cases,
        untouched=("run/config.json",),
        seconds=180,
    ),
    Kind("flags", ("conv", "ask"), programs.ask, flag_cases),
]
