"""Kernels of a compiled GPU program, read from its text: how often each is launched, and the bytes
that it moves.

The text is that of `compiled.as_text()`. Every instruction outside of fusions that computes or
copies is one launch. A fusion reads of an operand only the part that it slices out, and writes of a
buffer that it updates in place only the part that changes.
"""

import collections
import dataclasses
import functools
import re

from internvl3_jax.fit import hlo
from internvl3_jax.fit.hlo import Instruction

# Instructions that launch nothing.
_FREE = {
    "add-dependency",
    "after-all",
    "bitcast",
    "constant",
    "get-tuple-element",
    "opt-barrier",
    "parameter",
    "partition-id",
    "replica-id",
    "tuple",
}
_CONTROL = {"while", "conditional", "call"}
_SLICES = ("dynamic-slice", "slice", "gather")
_UPDATES = ("dynamic-update-slice", "scatter")
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_OP_NAME = re.compile(r'op_name="([^"]*)"')
# cuDNN and cuBLAS take a buffer of bytes for themselves.
_WORKSPACE = re.compile(r"[su]8\[\d+\]\{0\}")


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel of the program.

    Attributes:
      name: Name of the instruction.
      kind: "attention" (fused), "product", "copy" or "elementwise".
      scope: Path of the operation in the model, as JAX named it.
      launches: How often it runs in one call of the program.
      bytes: Bytes that one launch reads and writes.
    """

    name: str
    kind: str
    scope: str
    launches: int
    bytes: int

    @property
    def total_bytes(self) -> int:
        return self.launches * self.bytes


@dataclasses.dataclass(frozen=True)
class Program:
    """The kernels of a program.

    Attributes:
      kernels: In the order of the text.
      unknown_loops: Loops without a known number of iterations; they are counted as one iteration.
          The host waits for the device before every iteration of such a loop.
    """

    kernels: tuple[Kernel, ...]
    unknown_loops: tuple[str, ...]

    @property
    def launches(self) -> int:
        return sum(kernel.launches for kernel in self.kernels)

    @property
    def bytes(self) -> int:
        return sum(kernel.total_bytes for kernel in self.kernels)

    def select(self, kind: str = "", scope: str = "") -> "Program":
        """Returns the kernels of a kind whose scope matches a regular expression."""
        return dataclasses.replace(
            self,
            kernels=tuple(
                kernel
                for kernel in self.kernels
                if kind in ("", kernel.kind) and re.search(scope, kernel.scope)
            ),
        )


def read(text: str) -> Program:
    """Reads the kernels of a compiled program.

    Raises:
      ValueError: The text has no entry.
    """
    computations, entry = hlo.parse_computations(text)
    kernels, unknown = [], []
    # Follow loops, branches and calls from the entry; fusions are kernels.
    pending = [(entry, 1)]
    while pending:
        name, times = pending.pop()
        shapes = {instruction.name: instruction.shape for instruction in computations[name]}
        for instruction in computations[name]:
            if instruction.opcode in _CONTROL:
                iterations = 1
                if instruction.opcode == "while":
                    iterations = hlo.iterations(instruction, computations)
                    if iterations is None:
                        unknown.append(instruction.name)
                        iterations = 1
                pending += [
                    (called, times * iterations)
                    for role, called in hlo.called_by(instruction)
                    if called in computations and role != "condition"
                ]
            elif not _is_free(instruction):
                kernels.append(_kernel(instruction, shapes, computations, times))
    return Program(tuple(kernels), tuple(unknown))


def _is_free(instruction: Instruction) -> bool:
    """Returns whether an instruction launches nothing."""
    if instruction.opcode in _FREE or instruction.opcode.endswith("-done"):
        return True
    # An array that is not filled.
    return 'custom_call_target="AllocateBuffer"' in instruction.rest


def _kernel(instruction: Instruction, shapes, computations, times: int) -> Kernel:
    target = _TARGET.search(instruction.rest)
    scope = _OP_NAME.search(instruction.rest)
    called = dict(hlo.called_by(instruction)).get("calls")
    inside = computations.get(called, [])
    return Kernel(
        instruction.name,
        _kind(instruction, target[1] if target else "", inside),
        scope[1] if scope else "",
        times,
        _bytes(instruction, shapes, inside),
    )


def _kind(instruction: Instruction, target: str, inside: list[Instruction]) -> str:
    # Those of ops/fused_decode.py are named by their functions.
    is_own, is_attention = "mosaic_gpu" in target, "(attend)" in instruction.rest
    if "fmha" in target or (is_own and is_attention):
        return "attention"
    libraries = "gemm", "cublas", "cudnn"
    if is_own or any(name in target for name in libraries) or instruction.opcode == "dot":
        return "product"
    opcodes = {x.opcode for x in inside}
    if opcodes & {"dot", "custom-call"}:
        return "product"
    moves = {"copy", "transpose", "copy-start", "fusion-start"}
    if instruction.opcode in moves or (inside and opcodes <= moves | _FREE | set(_SLICES)):
        return "copy"
    return "elementwise"


def _bytes(instruction: Instruction, shapes, inside: list[Instruction]) -> int:
    """Returns the bytes that an instruction reads and writes."""
    if inside:
        return _fusion_bytes(inside)
    if instruction.opcode in ("copy", "transpose", "copy-start"):
        return 2 * max(hlo.array_bytes(instruction.shape), default=0)
    names = hlo.operands(instruction)
    if instruction.opcode in _UPDATES:
        return 2 * _size(shapes.get(names[-1 if instruction.opcode == "scatter" else 1], ""))
    if instruction.opcode in _SLICES:
        return 2 * _size(instruction.shape)
    inputs = sum(_size(shapes.get(name, "")) for name in names)
    # A kernel that updates its inputs in place writes a few values.
    return inputs + _size(instruction.shape) * (
        "output_to_operand_aliasing" not in instruction.rest
    )


def _size(shape: str) -> int:
    return sum(hlo.array_bytes(_WORKSPACE.sub("", shape)))


def _fusion_bytes(inside: list[Instruction]) -> int:
    by_name = {x.name: x for x in inside}
    users = collections.defaultdict(list)
    for x in inside:
        for name in hlo.operands(x):
            users[name].append(x)

    def read(name: str) -> int:
        """Returns the bytes that the users of a value read of it."""
        total = 0
        for user in users[name]:
            first = hlo.operands(user)[0] == name
            if user.opcode == "bitcast":
                total += read(user.name)
            elif user.opcode in _SLICES and first:
                total += _size(user.shape)
            elif not (user.opcode in _UPDATES and first):
                return _size(by_name[name].shape)
        return min(total, _size(by_name[name].shape))

    @functools.cache
    def written(name: str) -> int:
        """Returns the bytes of an output that change."""
        x = by_name[name]
        if x.opcode == "bitcast":
            return written(hlo.operands(x)[0])
        if x.opcode in _UPDATES:
            update = hlo.operands(x)[-1 if x.opcode == "scatter" else 1]
            return _size(by_name[update].shape)
        return _size(x.shape)

    root = inside[-1]
    outputs = hlo.operands(root) if root.opcode == "tuple" else [root.name]
    return sum(read(x.name) for x in inside if x.opcode == "parameter") + sum(map(written, outputs))
