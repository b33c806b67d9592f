"""What a compiled program's text tells: the collectives, how often each runs, and what they move.

The text is of `compiled.as_text()`. An instruction in the body of a loop runs as often as the loop
does; the number of rounds is read from the compiler's note ("known_trip_count") or, where there is
none, from the bound in the loop's condition, counting from 0.
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
_BITS = {"pred": 8, "token": 0}  # other types name theirs
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"(?:^|[\s)}\]])([a-z][a-z0-9\-]*)\(")
_CALLED = re.compile(
    r"(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
_ARRAY = re.compile(r"\b(pred|token|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collectives:
    """All collectives of one kind over one set of axes in one step of one device."""

    kind: str
    group: int  # devices that take part in each
    axes: tuple[str, ...]  # of the mesh, if the text names them
    count: int  # that run
    bytes: int  # that the device receives
    # whether some stand in a loop whose rounds the text does not tell; each of those counts as one
    unknown: bool


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    shape: str  # as in the text
    opcode: str
    rest: str  # from the opening parenthesis on


def collectives(text: str, devices: int) -> list[Collectives]:
    """The collectives of a program for `devices` devices, those that move most first."""
    computations, entry = computations_of(text)
    found = collections.defaultdict(lambda: [0, 0, False])
    # The parts of an asynchronous collective that run beside other work are instructions of their
    # own with the same channel.
    seen = set()
    for name, (times, known, loop) in _runs(computations, entry).items():
        for instruction in computations[name]:
            kind = instruction.opcode.removesuffix("-start")
            if kind not in KINDS:
                continue
            channel = re.search(r"channel_id=(\d+)", instruction.rest)
            key = (kind, channel[1], loop) if channel else (kind, instruction.name)
            if key in seen:
                continue
            seen.add(key)
            group, axes = _group(instruction.rest, devices)
            total = found[kind, group, axes]
            total[0] += times
            total[1] += times * _received(instruction, kind, group)
            total[2] |= not known
    rows = [Collectives(*key, *values) for key, values in found.items()]
    return sorted(rows, key=lambda row: -row.bytes)


def computations_of(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """Name -> instructions; and the name of the entry."""
    computations, entry, current = {}, "", None
    for line in text.splitlines():
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
        raise ValueError("no ENTRY in the compiled program's text; is it of compiled.as_text()?")
    return computations, entry


def _opcode(text: str) -> re.Match | None:
    """Where the opcode stands in "TYPE opcode(...", past the layouts of the type, such as
    {1,0:T(8,128)}.
    """
    return next(
        (
            match
            for match in _OPCODE.finditer(text)
            if text[: match.start(1)].count("{") == text[: match.start(1)].count("}")
        ),
        None,
    )


def _runs(computations, entry: str) -> dict[str, tuple[int, bool, str]]:
    """Computation -> (times that it runs, whether that is known, the loop's body that it is in)."""
    runs = {entry: (1, True, entry)}
    waiting = [entry]
    while waiting:
        caller = waiting.pop()
        times, known, loop = runs[caller]
        for instruction in computations[caller]:
            rounds = _rounds(instruction, computations) if instruction.opcode == "while" else 1
            for how, called in called_by(instruction):
                inside = how == "body"
                reached = (
                    times * (rounds or 1),
                    known and rounds is not None,
                    called if inside else loop,
                )
                if called in computations and (called not in runs or runs[called][0] < reached[0]):
                    runs[called] = reached
                    waiting.append(called)
    return runs


def called_by(instruction: Instruction) -> list[tuple[str, str]]:
    """(how, computation): "body" and "condition" of a loop, "branch", "calls" of a fusion ..."""
    rest = instruction.rest
    branches = re.search(r"branch_computations=\{([^}]*)\}", rest)
    named = (
        [("branch", name.strip().lstrip("%")) for name in branches[1].split(",")]
        if branches
        else []
    )
    return named + _CALLED.findall(rest)


def _rounds(loop: Instruction, computations) -> int | None:
    if noted := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
        return int(noted[1])
    called = dict(called_by(loop))
    condition, body = (
        {x.name: x for x in computations.get(called.get(how), [])} for how in ("condition", "body")
    )
    if not condition or not body:
        return None
    # The condition's root is compare(counter, bound); the body's is the tuple with the counter's
    # next value.
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
    return re.findall(r"%([\w.\-]+)", instruction.rest.partition("), ")[0])


def _constant(instruction: Instruction | None) -> int | None:
    value = (
        re.match(r"\((\d+)\)", instruction.rest)
        if instruction and instruction.opcode == "constant"
        else None
    )
    return int(value[1]) if value else None


def _group(rest: str, devices: int) -> tuple[int, tuple[str, ...]]:
    """Devices in a group, and the mesh's axes that it spans where the text names them."""
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
    """Bytes that reach a device, by the fewest that the operation can do with."""
    arrays = [_bytes(*array) for array in _ARRAY.findall(instruction.shape)]
    others = (group - 1) / group
    if kind == "collective-permute":
        # A start's shape is (operand, result, counters).
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
    """Of a value of a type such as f32, bf16, s4, f8e4m3fn or pred."""
    return _BITS[kind] if kind in _BITS else int(re.search(r"\d+", kind)[0])
