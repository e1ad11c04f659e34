"""What a compiled program does, read off its HLO text: what it sends between devices, and its largest arrays."""

import collections
import math
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")

_BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "bf16": 16, "f16": 16, "s32": 32,
         "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64, "c64": 64}  # fmt: skip
_SHAPE = re.compile(r"\b([a-z]+\d+[a-z0-9]*|pred)\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*)$")
_OPCODE = re.compile(r"\s([a-z][a-z0-9-]*)\(")
_CONDITION = re.compile(r"\bcondition=%?([\w.-]+)")
_CONSTANT = re.compile(r"\bconstant\((\d+)\)")
_INDEX = re.compile(r"\bget-tuple-element\(.*, index=(\d+)")
_OPERAND = re.compile(r"%([\w.-]+)")
_CALLED = re.compile(r"\b(?:calls|body|to_apply|called_computations|branch_computations|true_computation"
                     r"|false_computation)=(\{[^}]*\}|%?[\w.-]+)")  # fmt: skip
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CHANNEL = re.compile(r"\bchannel_id=(\d+)")
_NAME = re.compile(r'op_name="([^"]*)"')
_HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) .*\{$")
_IOTA = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]*)\}")
_AXES = re.compile(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}")
_CHAIN = re.compile(r'chain_id="(\d+)"')


class Collective(NamedTuple):
    """One instruction that sends between devices.

    Attributes:
        kind: one of COLLECTIVES.
        bytes: of the larger of what a device gives and what it gets, each time.
        times: how often a run of the program carries it out.
        depth: loops that it is inside of.
        shapes: sizes of the arrays that a device gets, each a tuple.
        members: numbers of the devices that take part, in the first of the groups that do the same; of a permute, the
            first two; empty: all.
        source: the operation of the traced program that it stems from.
    """

    kind: str
    bytes: int
    times: int
    depth: int
    shapes: tuple[tuple[int, ...], ...]
    members: tuple[int, ...]
    source: str

    @property
    def sent(self) -> float:
        """Bytes that each device sends over all times, by the algorithms that use every link alike (rings, tori)."""
        around = (len(self.members) - 1) / len(self.members) if self.members else 1.0
        factor = {"all-reduce": 2 * around, "collective-permute": 1.0}.get(self.kind, around)
        return self.bytes * self.times * factor


class Buffer(NamedTuple):
    """An array that an instruction makes: bytes on one device, shape in HLO's notation, source as in `Collective`."""

    bytes: int
    shape: str
    source: str


class _Instruction(NamedTuple):
    name: str
    opcode: str
    shape: str
    called: tuple[str, ...]
    line: str


def collectives(text: str) -> list[Collective]:
    """Return every collective of a compiled program, those of loops with how often they are carried out.

    Args:
        text: `compiled.as_text()`.
    """
    computations, entry = _parse(text)
    return list(_walk(computations, entry, times=1, depth=0, chains=set()))


def largest_buffers(text: str, count: int = 5) -> list[Buffer]:
    """Return the largest arrays that the instructions of a compiled program make, those of one source once.

    Not every array is memory of its own: XLA lets some share it. It tells where to look.
    """
    found: dict[tuple[str, str], Buffer] = {}
    no_arrays = {"parameter", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "constant"}
    computations, _ = _parse(text)
    fused = {name for each in computations.values() for i in each if i.opcode == "fusion" for name in i.called}
    for name, instructions in computations.items():
        for i in instructions if name not in fused else ():
            if i.opcode in no_arrays or i.opcode.endswith("-done"):
                continue
            for shape in _SHAPE.finditer(i.shape):
                buffer = Buffer(_bytes(shape), shape.group(0), _source(i.line))
                found.setdefault((buffer.shape, buffer.source), buffer)
    return sorted(found.values(), key=lambda buffer: -buffer.bytes)[:count]


def shapes(text: str) -> set[tuple[int, ...]]:
    """Return the sizes of all arrays that the text names."""
    return {_sizes(shape) for shape in _SHAPE.finditer(text)}


def _parse(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    computations: dict[str, list[_Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = computations.setdefault(header.group(2), [])
            entry = header.group(2) if header.group(1) else entry
        elif current is not None and (found := _INSTRUCTION.match(line)):
            current.append(_instruction(*found.groups()))
    return computations, entry


def _instruction(name: str, rest: str) -> _Instruction:
    found = _OPCODE.search(rest)
    shape, opcode = (rest, "") if found is None else (rest[: found.start()], found.group(1))
    called = tuple(part.strip("{}% ") for found in _CALLED.finditer(rest) for part in found.group(1).split(","))
    return _Instruction(name, opcode, shape, called, rest)


def _walk(computations: dict, name: str, times: int, depth: int, chains: set[str]) -> Iterator[Collective]:
    for i in computations.get(name, ()):
        if i.opcode.endswith(("-done", "-update")):
            continue
        kind = i.opcode.removesuffix("-start")
        if kind not in COLLECTIVES:
            loop = i.opcode == "while"
            inside = (times * _trips(computations, i), depth + 1) if loop else (times, depth)
            for called in i.called:
                yield from _walk(computations, called, *inside, chains)
        elif not _seen(i, chains):
            found = _collective(i, kind, times, depth)
            # A TPU's reduce-scatter is a fusion of this name: of an all-reduce and the slices that are kept of it.
            yield found._replace(kind="reduce-scatter") if name.startswith("all-reduce-scatter") else found


def _seen(i: _Instruction, chains: set[str]) -> bool:
    """Return whether a collective was met before: every fusion that takes an asynchronous one further on a TPU has it
    in its text again, under the same chain_id.
    """
    chain = _CHAIN.search(i.line)
    if chain is None or chain.group(1) not in chains:
        chains |= {chain.group(1)} if chain else set()
        return False
    return True


def _trips(computations: dict, loop: _Instruction) -> int:
    """Return how often a loop's body runs: as the text says, or the bound that its condition compares with."""
    if said := _TRIPS.search(loop.line):
        return int(said.group(1))
    found = _CONDITION.search(loop.line)
    condition = computations.get(found.group(1), ()) if found else ()
    bounds = [int(bound) for i in condition for bound in _CONSTANT.findall(i.line)]
    return -(-max(bounds) // _stride(computations, loop, condition)) if bounds else 1


def _stride(computations: dict, loop: _Instruction, condition: Iterable[_Instruction]) -> int:
    """Return what a loop's body adds to the counter that its condition looks at: 2 where XLA unrolled it once."""
    index = next((int(found.group(1)) for i in condition if (found := _INDEX.search(i.line))), None)
    body = {i.name: i for name in loop.called for i in computations.get(name, ())}
    results = [i for i in body.values() if i.opcode == "tuple"][-1:]  # the root comes last
    if index is None or not results:
        return 1
    counter = body.get(_operands(results[0])[index])
    added = [] if counter is None or counter.opcode != "add" else [body[x] for x in _operands(counter) if x in body]
    return max((int(step) for i in added for step in _CONSTANT.findall(i.line)), default=1)


def _operands(i: _Instruction) -> list[str]:
    return _OPERAND.findall(i.line[len(i.shape) :].partition(")")[0])


def _collective(i: _Instruction, kind: str, times: int, depth: int) -> Collective:
    parts = _parts(i.shape)
    # A -start's result lists what goes in, what comes out, and flags; an all-reduce's may be what comes out alone.
    both = i.opcode.endswith("-start") and (kind != "all-reduce" or parts[0].startswith("("))
    result = [(_bytes(shape), _sizes(shape)) for shape in _SHAPE.finditer(parts[1] if both else i.shape)]
    members, total = _members(i.line), sum(size for size, _ in result)
    if kind == "reduce-scatter":  # takes in the more
        total *= max(1, len(members))
    return Collective(kind, total, times, depth, tuple(shape for _, shape in result), members, _source(i.line))


def _parts(shape: str) -> list[str]:
    """Return the elements of a tuple's shape, which may be tuples; any other shape is its own only element."""
    if not shape.startswith("("):
        return [shape]
    parts, depth = [""], 0
    for character in re.sub(r"\{[^}]*\}", "", shape[1:-1]):  # without layouts
        depth += (character in "([") - (character in ")]")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


def _members(line: str) -> tuple[int, ...]:
    """Return the devices of the first group; of a permute, the first pair."""
    if found := _IOTA.search(line):
        groups, size, dims, order = found.groups()
        numbers = np.arange(int(groups) * int(size)).reshape(_integers(dims))
        return tuple(np.transpose(numbers, _integers(order) if order else None).reshape(-1, int(size))[0].tolist())
    if found := _AXES.search(line):
        mesh = dict(re.findall(r"'(\w+)'=(\d+)", found.group(1)))
        over = re.findall(r"'(\w+)'", found.group(2))
        numbers = np.arange(math.prod(map(int, mesh.values()))).reshape([int(size) for size in mesh.values()])
        first = numbers[tuple(slice(None) if axis in over else 0 for axis in mesh)]
        return tuple(first.reshape(-1).tolist())
    found = _LISTED.search(line)
    return _integers(found.group(1)) if found else ()


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part)


def _sizes(shape: re.Match) -> tuple[int, ...]:
    return _integers(shape.group(2))


def _bytes(shape: re.Match) -> int:
    bits = _BITS.get(shape.group(1), 8)  # 8: the float8 types
    return math.prod(_sizes(shape)) * bits // 8


def _source(line: str) -> str:
    name = _NAME.search(line)
    return name.group(1) if name else ""


def by_kind(found: list[Collective]) -> dict[str, dict[str, float]]:
    """Return {kind: {"in_loops": bytes, "outside": bytes}} that a device sends in a run of the program."""
    sums: dict[str, dict[str, float]] = collections.defaultdict(lambda: {"in_loops": 0.0, "outside": 0.0})
    for one in found:
        sums[one.kind]["in_loops" if one.depth else "outside"] += one.sent
    return dict(sums)
