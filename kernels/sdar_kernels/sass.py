"""Reads the machine code of a CUDA kernel: its instructions, and loops that multiply matrices.

Input is what `cuobjdump -sass` prints. A loop is a natural loop of the control flow graph: a
branch back to an instruction that dominates it, and all that lies between, waits that were moved
to the end of the function included.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

_FUNCTION = re.compile(r"^\s*Function : \S+", re.MULTILINE)
_LINE = re.compile(
    r"^\s*/\*(?P<address>[0-9a-f]{4,})\*/\s+(?P<guard>@!?U?P\w+\s+)?(?P<opcode>[A-Z][\w.]*)"
    r"(?P<operands>[^;]*);",
    re.MULTILINE,
)
_ADDRESS = re.compile(r"0x[0-9a-f]+")
_ENDS = {"EXIT", "RET", "KILL"}
_JUMPS = {"BRA", "JMP", "CALL"}
_INDIRECT = {"BRX", "BRXU", "JMX", "JMXU"}


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        address: byte offset in the function.
        guarded: runs under a predicate ("@P0 ...").
        opcode: with its modifiers, e.g. "HMMA.16816.F32.BF16".
        operands: the rest of the text.
    """

    address: int
    guarded: bool
    opcode: str
    operands: str

    @property
    def base(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.partition(".")[0]

    @property
    def multiplies_matrices(self) -> bool:
        """HMMA, IMMA, QMMA, HGMMA, UTCHMMA and their like."""
        return self.base.endswith("MMA")


@dataclass(frozen=True)
class MatrixLoop:
    """An innermost loop that multiplies matrices.

    Attributes:
        address: byte offset of its head.
        instructions: in its body.
        multiplications: matrix instructions among them; where two loops do the same work, a
            difference here shows that one was unrolled.
    """

    address: int
    instructions: int
    multiplications: int


def read_sass(text: str) -> list[Instruction]:
    """The instructions of the one function in TEXT, without the padding at its end.

    Raises ValueError where TEXT holds no function, or several.
    """
    functions = len(_FUNCTION.findall(text))
    if functions != 1:
        raise ValueError(f"SASS of {functions} functions; expected one kernel without calls")
    code = [
        Instruction(
            int(match["address"], 16),
            match["guard"] is not None,
            match["opcode"],
            match["operands"].strip(),
        )
        for match in _LINE.finditer(text)
    ]
    while code and code[-1].base == "NOP":
        code.pop()
    if code and _target(code[-1]) == code[-1].address:
        code.pop()
    return code


def matrix_loops(code: list[Instruction]) -> tuple[MatrixLoop, ...]:
    """The innermost loops that multiply matrices, in the order of their addresses.

    Raises ValueError at an indirect branch, which cannot be followed.
    """
    loops = {
        head: body
        for head, body in _natural_loops([_successors(code, i) for i in range(len(code))]).items()
        if any(code[i].multiplies_matrices for i in body)
    }
    return tuple(
        MatrixLoop(code[head].address, len(body), sum(code[i].multiplies_matrices for i in body))
        for head, body in sorted(loops.items())
        if not any(other in body for other in loops if other != head)
    )


def _target(instruction: Instruction) -> int | None:
    """Where a jump goes; None for anything else."""
    if instruction.base not in _JUMPS:
        return None
    found = _ADDRESS.findall(instruction.operands)
    return int(found[-1], 16) if found else None


def _successors(code: list[Instruction], index: int) -> list[int]:
    """Indices of what may run next. A call may return; ptxas also writes jumps as calls."""
    instruction = code[index]
    if instruction.base in _INDIRECT:
        raise ValueError(f"an indirect branch at 0x{instruction.address:x}: {instruction.opcode}")
    following = [index + 1] if index + 1 < len(code) else []
    if instruction.base in _ENDS:
        return following if instruction.guarded else []
    target = _target(instruction)
    if target is None:
        return following
    step = code[1].address - code[0].address
    jump = [target // step] if target // step < len(code) else []
    conditional = instruction.guarded or "," in instruction.operands or instruction.base == "CALL"
    return jump + following if conditional else jump


def _natural_loops(successors: list[list[int]]) -> dict[int, set[int]]:
    """Body of each loop by its head; loops with one head are one loop."""
    order = _postorder(successors)
    predecessors: dict[int, list[int]] = {node: [] for node in order}
    for node in order:
        for following in successors[node]:
            predecessors[following].append(node)
    dominates = _dominance(order, predecessors)
    loops: dict[int, set[int]] = {}
    for node in order:
        for head in successors[node]:
            if not dominates(head, node):
                continue
            body = loops.setdefault(head, {head})
            pending = [node]
            while pending:
                member = pending.pop()
                if member not in body:
                    body.add(member)
                    pending += predecessors[member]
    return loops


def _postorder(successors: list[list[int]]) -> list[int]:
    """The nodes that node 0 reaches, each after what it leads to (but for loops)."""
    order: list[int] = []
    seen = {0}
    path = [(0, iter(successors[0]))]
    while path:
        node, remaining = path[-1]
        following = next(remaining, None)
        if following is None:
            order.append(node)
            path.pop()
        elif following not in seen:
            seen.add(following)
            path.append((following, iter(successors[following])))
    return order


def _dominance(order: list[int], predecessors: dict[int, list[int]]) -> Callable[[int, int], bool]:
    """Whether every way from the start to the second node leads through the first.

    Immediate dominators after Cooper, Harvey and Kennedy, "A Simple, Fast Dominance Algorithm".
    """
    rank = {node: position for position, node in enumerate(order)}
    above = {order[-1]: order[-1]}

    def meet(one: int, other: int) -> int:
        while one != other:
            if rank[one] < rank[other]:
                one = above[one]
            else:
                other = above[other]
        return one

    changed = True
    while changed:
        changed = False
        for node in reversed(order[:-1]):
            known = [before for before in predecessors[node] if before in above]
            best = known[0]
            for before in known[1:]:
                best = meet(best, before)
            if above.get(node) != best:
                above[node] = best
                changed = True

    def dominates(one: int, other: int) -> bool:
        while rank[other] < rank[one]:
            other = above[other]
        return one == other

    return dominates
