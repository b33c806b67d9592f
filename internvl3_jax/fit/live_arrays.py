"""Arrays that a compiled TPU program holds at its peak; XLA's own analysis only gives the total.

The text of a TPU program lists instructions in the order in which they run, and its shapes have
their tilings. So the program can be walked: an array is alive from the instruction that makes it to
the last one that reads it. Instructions that update in place (loops, tuples, fusions that say so)
make no new array. What is alive around a loop adds to the peak of its body.
"""

import collections
import dataclasses
import math
import re

from internvl3_jax.fit.hlo import Instruction, bits, called_by, operands, parse_computations

_ARRAY = re.compile(r"\b(pred|token|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\](\{[^}]*\})?")
# Instructions whose result is the memory of their first operand.
_IN_PLACE = {"bitcast", "while", "optimization-barrier", "dynamic-update-slice"}


@dataclasses.dataclass(frozen=True)
class Array:
    """An array: its bytes in HBM, a shape such as "bf16[28,1,16384,3584]", its model operation."""

    bytes: int
    shape: str
    source: str


@dataclasses.dataclass
class _Lifetime:
    """When an array is made and last read, as indices of instructions.

    `is_parameter`: It is an input of the computation.
    """

    array: Array
    made: int
    read: int
    is_parameter: bool


def arrays_at_peak(text: str) -> list[Array]:
    """Returns the arrays that are alive at the peak of a program, the largest first.

    Their sum is the peak, except for code, fragmentation, and copies of values carried by loops.
    """
    computations, entry = parse_computations(text)
    walk = _Walk(computations, _sources(text))
    return sorted(walk.peak(entry, is_entry=True)[1], key=lambda array: -array.bytes)


def count_equal(arrays: list[Array]) -> list[tuple[int, Array]]:
    """Returns (count, array) of equal arrays, the largest totals first."""
    counts = collections.Counter(arrays)
    return sorted(
        ((count, array) for array, count in counts.items()),
        key=lambda pair: -pair[0] * pair[1].bytes,
    )


def _sources(text: str) -> dict[str, str]:
    """Returns the model operation of each instruction, without the common prefix."""
    sources = {}
    for name, source in re.findall(r'%?([\w.\-]+) = [^\n]*?op_name="((?:[^"\\]|\\.)*)"', text):
        sources.setdefault(name, re.sub(r"^jit\(\w+\)/", "", source.replace("\\'", "'")))
    return sources


class _Walk:
    """Walks computations; results are cached by name."""

    def __init__(self, computations: dict[str, list[Instruction]], sources: dict[str, str]):
        self.computations, self.sources = computations, sources
        self.peaks: dict[str, tuple[int, list[Array]]] = {}

    def peak(self, name: str, is_entry: bool = False) -> tuple[int, list[Array]]:
        """Returns the most bytes alive at once in a computation, and the arrays.

        Inputs only count in the entry; elsewhere the caller counts them.
        """
        if name not in self.peaks:
            self.peaks[name] = self._walk(name, is_entry)
        return self.peaks[name]

    def _walk(self, name: str, is_entry: bool) -> tuple[int, list[Array]]:
        # 1) Lifetimes. Results live to the end, and so do inputs.
        instructions = self.computations[name]
        lifetimes, values = [], {}
        for number, instruction in enumerate(instructions):
            self._step(number, instruction, values, lifetimes)
        end = len(instructions)
        for life in values[instructions[-1].name]:
            life.read = end
        for life in lifetimes:
            life.read = end if life.is_parameter else life.read

        # 2) The instruction at which most bytes are alive, those inside of it included.
        counted = [life for life in lifetimes if is_entry or not life.is_parameter]
        change = collections.Counter()
        for life in counted:
            change[life.made] += life.array.bytes
            change[life.read + 1] -= life.array.bytes
        (peak, at, inner), current = (-1, 0, []), 0
        for number, instruction in enumerate(instructions):
            current += change[number]
            size, arrays = self._inner_peak(instruction)
            if current + size > peak:
                peak, at, inner = current + size, number, arrays

        # 3) What is alive there.
        alive = [
            life.array for life in counted if life.made <= at <= life.read and life.array.bytes
        ]
        return peak, alive + inner

    def _inner_peak(self, instruction: Instruction) -> tuple[int, list[Array]]:
        """Returns the peak of the loop body or branch that an instruction runs."""
        bodies = [
            called
            for role, called in called_by(instruction)
            if role in ("body", "branch") and called in self.computations
        ]
        return max((self.peak(body) for body in bodies), key=lambda pair: pair[0], default=(0, []))

    def _step(
        self,
        number: int,
        instruction: Instruction,
        values: dict[str, list[_Lifetime]],
        lifetimes: list[_Lifetime],
    ) -> None:
        """Records the arrays that an instruction makes, and that it reads its operands."""
        names = operands(instruction)
        inputs = [values[name] for name in names if name in values]
        opcode = instruction.opcode

        # The arrays of the result: those of operands, or new ones.
        if opcode == "get-tuple-element":
            index = int(re.search(r"index=(\d+)", instruction.rest)[1])
            result = inputs[0][index : index + 1] if index < len(inputs[0]) else inputs[0]
        elif opcode == "tuple":
            result = [life for value in inputs for life in value]
        elif opcode in _IN_PLACE and inputs:
            result = inputs[0]
        elif opcode.endswith("-done") and inputs:
            # The operand is (operand, result, ...) of the start.
            arrays = _ARRAY.findall(instruction.shape)
            result = inputs[0][1:2] if len(inputs[0]) > 1 and len(arrays) == 1 else inputs[0]
        else:
            result = self._make(number, instruction, names, values, lifetimes)
        values[instruction.name] = result

        # Building a tuple reads nothing, and taking an element reads only that.
        if opcode == "get-tuple-element":
            read = [result]
        else:
            read = [] if opcode == "tuple" else [*inputs, result]
        for life in (life for value in read for life in value):
            life.read = max(life.read, number)

    def _make(
        self,
        number: int,
        instruction: Instruction,
        names: list[str],
        values: dict[str, list[_Lifetime]],
        lifetimes: list[_Lifetime],
    ) -> list[_Lifetime]:
        """Returns the arrays of a result; those that reuse an operand's memory are not new."""
        aliases = _aliases(instruction, len(names)) | self._updated(instruction)
        source, result = self.sources.get(instruction.name, instruction.name), []
        for index, (dtype, shape, layout) in enumerate(_ARRAY.findall(instruction.shape)):
            operand = (
                names[aliases[index]] if index in aliases and aliases[index] < len(names) else None
            )
            if values.get(operand):
                result.append(values[operand][0])
                continue
            array = Array(_hbm_bytes(dtype, shape, layout), f"{dtype}[{shape}]", source)
            result.append(_Lifetime(array, number, number, instruction.opcode == "parameter"))
            lifetimes.append(result[-1])
        return result

    def _updated(self, instruction: Instruction) -> dict[int, int]:
        """Returns result -> operand of a fusion that ends with updating a slice of the operand."""
        body = next(
            (
                self.computations.get(called, [])
                for role, called in called_by(instruction)
                if role == "calls"
            ),
            [],
        )
        if instruction.opcode != "fusion" or not body:
            return {}
        by_name = {inner.name: inner for inner in body}

        # The instruction that a value comes from, through those that do not change it.
        def origin(name: str) -> Instruction | None:
            inner = by_name.get(name)
            while inner is not None and inner.opcode in ("bitcast", "copy", "convert", "reshape"):
                inner = by_name.get(operands(inner)[0])
            return inner

        roots = operands(body[-1]) if body[-1].opcode == "tuple" else [body[-1].name]
        updated = {}
        for index, root in enumerate(map(origin, roots)):
            if root is not None and root.opcode == "dynamic-update-slice":
                target = origin(operands(root)[0])
                if target is not None and target.opcode == "parameter":
                    updated[index] = int(re.match(r"\((\d+)", target.rest)[1])
        return updated


def _aliases(instruction: Instruction, num_operands: int) -> dict[int, int]:
    """Returns result -> operand whose memory it reuses, where the compiler notes it.

    The note numbers operands first, then results.
    """
    aliases = {}
    _, _, noted = instruction.rest.partition('"aliasing_operands"')
    for group in re.findall(r'"indices":\[([^\]]*)\]', noted):
        numbers = [int(number.strip('"')) for number in group.split(",")]
        inputs = [number for number in numbers if number < num_operands]
        if len(inputs) == 1:
            results = (number for number in numbers if number >= num_operands)
            aliases |= {number - num_operands: inputs[0] for number in results}
    return aliases


def _hbm_bytes(dtype: str, shape: str, layout: str) -> int:
    """Returns the bytes in HBM of an array with a layout such as {1,0:T(8,128)(2,1)}.

    Tiled dimensions are rounded up. An array in another memory, such as S(1), has 0.
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
    return math.ceil(bits(dtype) / 8 * math.prod(sizes))
