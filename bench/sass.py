"""What a kernel's machine code does: its loops, and what one way round each of them issues.

Reads the listing of ``cuobjdump -sass``. Knows no torch and no Triton.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import NamedTuple

_FUNCTION = re.compile(r"^\s*Function : (\S+)", re.MULTILINE)
_INSTRUCTION = re.compile(
    r"^\s*/\*(?P<address>[0-9a-f]{4,})\*/\s+(?P<guard>@!?U?P\w+)?\s*"
    r"(?P<opcode>[A-Z][\w.]*)(?P<operands>[^;]*);",
    re.MULTILINE,
)
_TARGET = re.compile(r"\b0x([0-9a-f]+)\s*$")
_JUMPS = ("BRA", "BRX", "JMP", "EXIT", "RET", "BREAK")
# Instructions that go on somewhere else, if at all, unless a guard says otherwise.
_LOADS = ("LDG", "LDGSTS", "UBLKCP")
_WIDTH = re.compile(r"\.(U8|S8|U16|S16|64|128|256)(?=\.|$)")


class Instruction(NamedTuple):
    """One line of a listing."""

    address: int
    guard: str  # "@P0", "@!P3", or ""
    opcode: str  # with its modifiers: "LDG.E.128"
    operands: str

    @property
    def base(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def bytes(self) -> int:
        """Of a load or store, a thread."""
        width = _WIDTH.search(self.opcode)
        return 4 if width is None else int(width[1].lstrip("US")) // 8

    @property
    def target(self) -> int | None:
        """Where a branch goes."""
        found = _TARGET.search(self.operands) if self.base == "BRA" else None
        return int(found[1], 16) if found else None


class Loop(NamedTuple):
    """A loop without a loop in it: all of its instructions and those of the shortest way round.

    What stands behind a branch, taken in one block of many, is not on the shortest way.
    """

    body: tuple[Instruction, ...]
    path: tuple[Instruction, ...]

    def count(self, base: str) -> int:
        """How often an instruction stands in the loop, branches and all."""
        return sum(i.base == base for i in self.body)

    def widths(self, *bases: str) -> dict[int, int]:
        """Bytes a thread: number of such accesses, on the shortest way."""
        return dict(Counter(i.bytes for i in self.path if i.base in bases))

    @property
    def loads(self) -> dict[int, int]:
        return self.widths(*_LOADS)

    @property
    def stores(self) -> dict[int, int]:
        return self.widths("STG")


def functions(listing: str) -> dict[str, list[Instruction]]:
    """The instructions of each kernel of a listing."""
    names = list(_FUNCTION.finditer(listing))
    ends = [name.start() for name in names[1:]] + [len(listing)]
    return {
        name[1]: [
            Instruction(int(m["address"], 16), m["guard"] or "", m["opcode"], m["operands"].strip())
            for m in _INSTRUCTION.finditer(listing, name.end(), end)
        ]
        for name, end in zip(names, ends, strict=True)
    }


def innermost_loops(code: list[Instruction]) -> list[Loop]:
    """The loops that contain no other, in the order of the code."""
    return [Loop(body, _shortest_way(body)) for body in _bodies(code, innermost=True)]


def outermost_loops(code: list[Instruction]) -> list[Loop]:
    """The loops that are in no other; their shortest way goes round no inner loop twice."""
    return [Loop(body, _shortest_way(body)) for body in _bodies(code, innermost=False)]


def _bodies(code: list[Instruction], innermost: bool) -> list[tuple[Instruction, ...]]:
    """From the target of a backward branch to the last branch to it."""
    ends: dict[int, int] = {}
    for i in code:
        # (Code ends in a branch to itself.)
        if i.target is not None and i.target < i.address:
            ends[i.target] = max(i.address, ends.get(i.target, 0))
    spans = list(ends.items())

    def keeps(first: int, last: int) -> bool:
        others = [(a, b) for a, b in spans if (a, b) != (first, last)]
        if innermost:
            return not any(first <= a and b <= last for a, b in others)
        return not any(a <= first and last <= b for a, b in others)

    return [
        tuple(i for i in code if first <= i.address <= last)
        for first, last in sorted(spans)
        if keeps(first, last)
    ]


def _shortest_way(body: tuple[Instruction, ...]) -> tuple[Instruction, ...]:
    """The fewest instructions from the first to a branch back to it, forward steps only."""
    at = {i.address: n for n, i in enumerate(body)}
    unreached = len(body) + 1
    # steps[n]: instructions on the way from n to the branch back; follows[n]: the next one.
    steps, follows = [unreached] * len(body), [-1] * len(body)
    for n in range(len(body) - 1, -1, -1):
        i, choices = body[n], []
        goes_on = i.base not in _JUMPS or i.guard or "P" in i.operands.partition(",")[0]
        if goes_on and n + 1 < len(body):
            choices.append((steps[n + 1], n + 1))
        if i.target == body[0].address:
            choices.append((0, -1))
        elif i.target in at and i.target > i.address:
            choices.append((steps[at[i.target]], at[i.target]))
        if choices:
            best, follows[n] = min(choices)
            steps[n] = 1 + best
    way, n = [], 0
    while n >= 0:
        way.append(body[n])
        n = follows[n]
    return tuple(way)
