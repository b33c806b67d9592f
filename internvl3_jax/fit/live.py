"""Which arrays a compiled TPU program holds when it holds most: XLA's analysis gives the number
alone.

The text of a TPU's program is in the order in which it runs, and its shapes name their tiles. So it
can be walked: an array is alive from the instruction that makes it to the last that reads it; what
an instruction updates in place (loops, tuples, fusions that say so) makes none. On top of what
lives around a loop comes the most of its body.
"""

import collections
import dataclasses
import math
import re

from internvl3_jax.fit.compiled import Instruction, bits, called_by, computations_of, operands

_ARRAY = re.compile(r"\b(pred|token|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\](\{[^}]*\})?")
# the result is the first operand
_SAME = {"bitcast", "while", "optimization-barrier", "dynamic-update-slice"}


@dataclasses.dataclass(frozen=True)
class Array:
    bytes: int
    shape: str  # "bf16[28,1,16384,3584]"
    source: str  # the operation in the model


@dataclasses.dataclass
class _Made:
    """An array of the walk: when it is made and last read, counted in instructions."""

    array: Array
    made: int
    read: int
    given: bool  # from outside


def alive_at_peak(text: str) -> list[Array]:
    """The arrays, the largest first; their sum is the program's peak but for code, gaps and what a
    loop's carried values are copied to.
    """
    computations, entry = computations_of(text)
    walk = _Walk(computations, _sources(text))
    return sorted(walk.peak(entry, outermost=True)[1], key=lambda array: -array.bytes)


def grouped(arrays: list[Array]) -> list[tuple[int, Array]]:
    """(how many, one of them) of equal arrays, the largest sums first."""
    counts = collections.Counter(arrays)
    return sorted(
        ((count, array) for array, count in counts.items()),
        key=lambda pair: -pair[0] * pair[1].bytes,
    )


def _sources(text: str) -> dict[str, str]:
    """Instruction -> the operation it is of, without what all have in front."""
    found = {}
    for name, source in re.findall(r'%?([\w.\-]+) = [^\n]*?op_name="((?:[^"\\]|\\.)*)"', text):
        found.setdefault(name, re.sub(r"^jit\(\w+\)/", "", source.replace("\\'", "'")))
    return found


class _Walk:
    def __init__(self, computations: dict[str, list[Instruction]], sources: dict[str, str]):
        self.computations, self.sources = computations, sources
        self.known: dict[str, tuple[int, list[Array]]] = {}

    def peak(self, name: str, outermost: bool = False) -> tuple[int, list[Array]]:
        """Most bytes alive at a time in a computation, and what they are. What it is given counts
        in the outermost alone.
        """
        if name not in self.known:
            self.known[name] = self._walk(name, outermost)
        return self.known[name]

    def _walk(self, name: str, outermost: bool) -> tuple[int, list[Array]]:
        instructions = self.computations[name]
        made, values = [], {}
        for number, instruction in enumerate(instructions):
            self._step(number, instruction, values, made)
        last = len(instructions)
        for one in values[instructions[-1].name]:
            one.read = last
        for one in made:
            one.read = last if one.given else one.read
        counted = [one for one in made if outermost or not one.given]
        change = collections.Counter()
        for one in counted:
            change[one.made] += one.array.bytes
            change[one.read + 1] -= one.array.bytes
        best, current = (-1, 0, []), 0
        for number, instruction in enumerate(instructions):
            current += change[number]
            size, inside = self._inside(instruction)
            if current + size > best[0]:
                best = (current + size, number, inside)
        alive = [
            one.array for one in counted if one.made <= best[1] <= one.read and one.array.bytes
        ]
        return best[0], alive + best[2]

    def _inside(self, instruction: Instruction) -> tuple[int, list[Array]]:
        bodies = [
            called
            for how, called in called_by(instruction)
            if how in ("body", "branch") and called in self.computations
        ]
        return max((self.peak(body) for body in bodies), key=lambda pair: pair[0], default=(0, []))

    def _step(
        self,
        number: int,
        instruction: Instruction,
        values: dict[str, list[_Made]],
        made: list[_Made],
    ) -> None:
        """Enters the arrays that the instruction makes, and that it reads its operands."""
        names = operands(instruction)
        given = [values[name] for name in names if name in values]
        opcode = instruction.opcode
        if opcode == "get-tuple-element":
            index = int(re.search(r"index=(\d+)", instruction.rest)[1])
            result = given[0][index : index + 1] if index < len(given[0]) else given[0]
        elif opcode == "tuple":
            result = [one for part in given for one in part]
        elif opcode in _SAME and given:
            result = given[0]
        elif opcode.endswith("-done") and given:
            # Of (operand, result, ...) the result.
            arrays = _ARRAY.findall(instruction.shape)
            result = given[0][1:2] if len(given[0]) > 1 and len(arrays) == 1 else given[0]
        else:
            result = self._make(number, instruction, names, values, made)
        values[instruction.name] = result
        read = (
            [result]
            if opcode == "get-tuple-element"
            else []
            if opcode == "tuple"
            else [*given, result]
        )
        for one in (one for part in read for one in part):
            one.read = max(one.read, number)

    def _make(
        self, number: int, instruction: Instruction, names: list[str], values, made: list[_Made]
    ) -> list[_Made]:
        in_place = _in_place(instruction, len(names)) | self._updated(instruction)
        source, result = self.sources.get(instruction.name, instruction.name), []
        for index, (kind, shape, layout) in enumerate(_ARRAY.findall(instruction.shape)):
            target = (
                names[in_place[index]]
                if index in in_place and in_place[index] < len(names)
                else None
            )
            if values.get(target):
                result.append(values[target][0])
                continue
            array = Array(_stored(kind, shape, layout), f"{kind}[{shape}]", source)
            result.append(_Made(array, number, number, instruction.opcode == "parameter"))
            made.append(result[-1])
        return result

    def _updated(self, instruction: Instruction) -> dict[int, int]:
        """Result -> operand of a fusion that ends in updating a part of it."""
        body = next(
            (
                self.computations.get(called, [])
                for how, called in called_by(instruction)
                if how == "calls"
            ),
            [],
        )
        if instruction.opcode != "fusion" or not body:
            return {}
        named = {one.name: one for one in body}

        def origin(name: str) -> Instruction | None:
            one = named.get(name)
            while one is not None and one.opcode in ("bitcast", "copy", "convert", "reshape"):
                one = named.get(operands(one)[0])
            return one

        roots = operands(body[-1]) if body[-1].opcode == "tuple" else [body[-1].name]
        found = {}
        for index, root in enumerate(map(origin, roots)):
            if root is not None and root.opcode == "dynamic-update-slice":
                whole = origin(operands(root)[0])
                if whole is not None and whole.opcode == "parameter":
                    found[index] = int(re.match(r"\((\d+)", whole.rest)[1])
        return found


def _in_place(instruction: Instruction, count: int) -> dict[int, int]:
    """Result -> operand whose memory it takes, where the compiler says so: operands and results are
    numbered in one line.
    """
    found = {}
    _, _, noted = instruction.rest.partition('"aliasing_operands"')
    for group in re.findall(r'"indices":\[([^\]]*)\]', noted):
        numbers = [int(number.strip('"')) for number in group.split(",")]
        given = [number for number in numbers if number < count]
        if len(given) == 1:
            found |= {number - count: given[0] for number in numbers if number >= count}
    return found


def _stored(kind: str, shape: str, layout: str) -> int:
    """Bytes in HBM of an array with its tiles, such as {1,0:T(8,128)(2,1)}; 0 for one in another
    memory, such as S(1).
    """
    if "S(" in layout:
        return 0
    sizes = [int(size) for size in shape.split(",") if size]
    order = re.match(r"\{([\d,]+)", layout)
    minor_first = (
        [int(axis) for axis in order[1].split(",")] if order else list(range(len(sizes)))[::-1]
    )
    if tile := re.search(r"T\(([\d,]+)\)", layout):
        for axis, multiple in zip(minor_first, reversed(tile[1].split(",")), strict=False):
            sizes[axis] = -(-sizes[axis] // int(multiple)) * int(multiple)
    return math.ceil(bits(kind) / 8 * math.prod(sizes))
