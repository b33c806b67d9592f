"""Collectives of a compiled program, read from its text: how often each runs and what it moves.

The text is that of `compiled.as_text()`. An instruction in the body of a loop runs as often as the
loop does. The number of iterations is read from the compiler's note ("known_trip_count") or, where
there is none, from the bound in the loop's condition, counting from 0.
"""

import collections
import dataclasses
import math
import re

KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
_BITS = {"pred": 8, "token": 0}  # the names of other types contain theirs
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"(?:^|[\s)}\]])([a-z][a-z0-9\-]*)\(")
_CALLED = re.compile(
    r"(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
_ARRAY = re.compile(r"\b(pred|token|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collectives:
    """All collectives of one kind over one set of axes, of one device in one run of the program.

    Attributes:
      kind: One of KINDS.
      group: Devices that take part in each.
      axes: Axes of the mesh, if the text names them.
      count: How many run.
      bytes: Bytes that the device receives.
      unknown: Some are in a loop whose number of iterations is unknown; it counts as one.
    """

    kind: str
    group: int
    axes: tuple[str, ...]
    count: int
    bytes: int
    unknown: bool


@dataclasses.dataclass(frozen=True)
class Instruction:
    """An instruction of the text: `name = shape opcode rest`; `rest` starts with "("."""

    name: str
    shape: str
    opcode: str
    rest: str


def collectives(text: str, devices: int) -> list[Collectives]:
    """Returns the collectives of a program for `devices` devices, those that move most first."""
    computations, entry = parse_computations(text)
    totals = collections.defaultdict(lambda: [0, 0, False])
    # An asynchronous collective may be several instructions with the same channel; count one.
    seen = set()
    for name, (times, known, loop) in _runs(computations, entry).items():
        for instruction in computations[name]:
            kind = instruction.opcode.removesuffix("-start")
            if kind not in KINDS:
                continue
            channel = re.search(r"channel_id=(\d+)", instruction.rest)
            # All collectives of jax's shard_map have channel 1.
            is_own = channel and channel[1] != "1"
            key = (kind, channel[1], loop) if is_own else (kind, instruction.name)
            if key in seen:
                continue
            seen.add(key)
            group, axes = _group(instruction.rest, devices)
            total = totals[kind, group, axes]
            total[0] += times
            total[1] += times * _received(instruction, kind, group)
            total[2] |= not known
    rows = [Collectives(*key, *values) for key, values in totals.items()]
    return sorted(rows, key=lambda row: -row.bytes)


def parse_computations(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """Returns the instructions of each computation by name, and the name of the entry.

    Raises:
      ValueError: The text has no entry.
    """
    computations, entry, current = {}, "", None
    for line in text.splitlines():
        # A computation is a header, indented instructions, and a closing brace.
        if header := _HEADER.match(line):
            current = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif line == "}":
            current = None
        elif current is not None and (match := _INSTRUCTION.match(line)):
            if opcode := _opcode(match[2]):
                current.append(
                    Instruction(
                        match[1], match[2][: opcode.start(1)], opcode[1], match[2][opcode.end(1) :]
                    )
                )
    if not entry:
        raise ValueError("the program's text has no ENTRY; pass that of compiled.as_text()")
    return computations, entry


def _opcode(text: str) -> re.Match | None:
    """Finds the opcode in "TYPE opcode(...", after the type's layouts such as {1,0:T(8,128)}."""
    return next(
        (
            match
            for match in _OPCODE.finditer(text)
            if text[: match.start(1)].count("{") == text[: match.start(1)].count("}")
        ),
        None,
    )


def _runs(computations, entry: str) -> dict[str, tuple[int, bool, str]]:
    """Returns for each computation (how often it runs, whether that is known, its loop's body)."""
    # Follow the calls from the entry, multiplying by the iterations of each loop.
    runs = {entry: (1, True, entry)}
    pending = [entry]
    while pending:
        caller = pending.pop()
        times, known, loop = runs[caller]
        for instruction in computations[caller]:
            is_loop = instruction.opcode == "while"
            rounds = iterations(instruction, computations) if is_loop else 1
            for role, called in called_by(instruction):
                reached = (
                    times * (rounds or 1),
                    known and rounds is not None,
                    called if role == "body" else loop,
                )
                if called in computations and (called not in runs or runs[called][0] < reached[0]):
                    runs[called] = reached
                    pending.append(called)
    return runs


def called_by(instruction: Instruction) -> list[tuple[str, str]]:
    """Returns (role, computation); roles are "body", "condition", "branch", "calls" and others."""
    rest = instruction.rest
    branches = re.search(r"branch_computations=\{([^}]*)\}", rest)
    named = (
        [("branch", name.strip().lstrip("%")) for name in branches[1].split(",")]
        if branches
        else []
    )
    return named + _CALLED.findall(rest)


def iterations(loop: Instruction, computations) -> int | None:
    """Returns the number of iterations of a loop, or None if the text does not tell."""
    if noted := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
        return int(noted[1])
    called = dict(called_by(loop))
    condition, body = (
        {x.name: x for x in computations.get(called.get(role), [])}
        for role in ("condition", "body")
    )
    if not condition or not body:
        return None
    # The root of the condition is compare(counter, bound). That of the body is the tuple with the
    # next value of the counter.
    test, carried = list(condition.values())[-1], list(body.values())[-1]
    if test.opcode != "compare" or "direction=LT" not in test.rest:
        return None
    counter, bound = (condition.get(name) for name in operands(test))
    index = (
        re.search(r"index=(\d+)", counter.rest)
        if counter and counter.opcode == "get-tuple-element"
        else None
    )
    updated = operands(carried)[int(index[1])] if index and carried.opcode == "tuple" else None
    steps = (
        [_constant(body.get(name)) for name in operands(body[updated])]
        if updated in body and body[updated].opcode == "add"
        else []
    )
    last, step = _constant(bound), next((step for step in steps if step), None)
    return None if last is None or step is None else -(-last // step)


def operands(instruction: Instruction) -> list[str]:
    """Returns the names of an instruction's operands."""
    return re.findall(r"%([\w.\-]+)", instruction.rest.partition("), ")[0])


def array_bytes(shape: str) -> list[int]:
    """Returns the bytes of each array of a shape such as "(f32[2,3]{1,0}, s32[])"."""
    return [_bytes(*array) for array in _ARRAY.findall(shape)]


def _constant(instruction: Instruction | None) -> int | None:
    value = (
        re.match(r"\((\d+)\)", instruction.rest)
        if instruction and instruction.opcode == "constant"
        else None
    )
    return int(value[1]) if value else None


def _group(rest: str, devices: int) -> tuple[int, tuple[str, ...]]:
    """Returns the devices in a group, and the axes of the mesh if the text names them."""
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] *\{([^}]*)\}", rest):
        sizes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        axes = tuple(re.findall(r"'(\w+)'", named[2]))
        return math.prod(sizes[axis] for axis in axes), tuple(
            axis for axis in axes if sizes[axis] > 1
        )
    if listed := re.search(r"replica_groups=\[(\d+),(\d+)\]", rest):
        return int(listed[2]), ()
    if spelled := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return spelled[1].count(",") + 1, ()
    return devices, ()


def _received(instruction: Instruction, kind: str, group: int) -> int:
    """Returns the bytes that reach a device, the fewest that the operation needs."""
    arrays = array_bytes(instruction.shape)
    others = (group - 1) / group
    if kind == "collective-permute":
        # The shape of a start is (operand, result, counters).
        return arrays[1] if instruction.opcode.endswith("-start") else sum(arrays)
    if instruction.opcode == "all-gather-start":
        arrays = arrays[len(arrays) // 2 :]
    if kind == "reduce-scatter":
        return round(
            sum(arrays[len(arrays) // 2 :] if instruction.opcode.endswith("-start") else arrays)
            * (group - 1)
        )
    return round(sum(arrays) * others * (2 if kind == "all-reduce" else 1))


def _bytes(kind: str, shape: str) -> int:
    return math.ceil(
        bits(kind) / 8 * math.prod(int(length) for length in shape.split(",") if length)
    )


def bits(kind: str) -> int:
    """Returns the bits of a value of a type such as f32, bf16, s4, f8e4m3fn or pred."""
    return _BITS[kind] if kind in _BITS else int(re.search(r"\d+", kind)[0])
