"""Reads the machine code that nvcc generates (SASS), and counts the instructions of a kernel's main loop."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_LINE = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")


@dataclass(frozen=True)
class Instruction:
    """One machine instruction.

    Attributes:
        address: In bytes from the kernel's start.
        name: Mnemonic with its modifiers, such as "LDG.E.128.CONSTANT".
        is_conditional: A predicate decides whether it has an effect.
        operands: As printed.
    """

    address: int
    name: str
    is_conditional: bool
    operands: str

    @property
    def target(self) -> int | None:
        """The address that a branch goes to; None for other instructions."""
        if not re.match(r"U?BRA\b", self.name):
            return None
        return int(self.operands.split()[-1].removeprefix("`(").rstrip(")"), 16)

    @property
    def falls_through(self) -> bool:
        """Whether the next instruction may be the one after it in memory."""
        if self.target is not None:
            return self.is_conditional or "," in self.operands  # sm_75 and up: BRA UP0, 0x...
        return self.is_conditional or not re.match(r"(EXIT|RET|BRX|JMP|KILL)\b", self.name)


def is_wide_load(instruction: Instruction) -> bool:
    """Whether it loads 16 bytes from global memory."""
    return instruction.name.startswith("LDG") and ".128" in instruction.name


def cuobjdump() -> str | None:
    """Finds the disassembler in the CUDA toolkit or in Triton's wheel."""
    spec = importlib.util.find_spec("triton")
    folders = [] if spec is None or spec.origin is None else [Path(spec.origin).parent / "backends" / "nvidia" / "bin"]
    return shutil.which("cuobjdump") or next(
        (found for folder in folders if (found := shutil.which("cuobjdump", path=str(folder)))), None
    )


def disassembled(tool: str, target: Path) -> dict[str, tuple[Instruction, ...]]:
    """Returns the instructions of each kernel of an object file, by mangled name."""
    return parsed(subprocess.run([tool, "-sass", str(target)], capture_output=True, text=True, check=True).stdout)


def parsed(dump: str) -> dict[str, tuple[Instruction, ...]]:
    """Returns the instructions of each kernel in the output of `cuobjdump -sass`, by mangled name."""
    found: dict[str, list[Instruction]] = {}
    for line in dump.splitlines():
        if match := re.search(r"Function : (\w+)", line):
            body = found.setdefault(match[1], [])
        elif match := _LINE.match(line):
            body.append(Instruction(int(match[1], 16), match[3], match[2] is not None, match[4].strip()))
    return {name: tuple(body) for name, body in found.items()}


def main_loop(body: Sequence[Instruction], loads: int) -> tuple[Instruction, ...]:
    """Returns one iteration of a kernel's main loop, on the way through it that takes the fewest instructions.

    Code for rare elements is off that way, because it comes on top of the code for all elements.

    Args:
        body: The kernel's instructions.
        loads: Wide loads that an iteration of the source's loop has. Of several loops with that many or more (one takes
            statistics, another does not), it is the one with the most instructions per load.

    Raises:
        ValueError: No loop has that many wide loads.
    """
    ways = [
        _shortest_way(body, last.target, last.address)
        for last in body
        if last.target is not None and last.target <= last.address
    ]
    long = [way for way in ways if sum(map(is_wide_load, way)) >= loads]
    if not long:
        counts = [sum(map(is_wide_load, way)) for way in ways]
        raise ValueError(f"needed a loop with {loads} loads of 16 bytes, got loops with {counts}")
    return max(long, key=lambda way: len(way) / sum(map(is_wide_load, way)))


def _shortest_way(body: Sequence[Instruction], first: int, last: int) -> tuple[Instruction, ...]:
    """Returns the fewest instructions from address `first` to address `last`, both included, or none if it cannot."""
    at = {each.address: k for k, each in enumerate(body)}
    came_from: dict[int, int | None] = {at[first]: None}
    reached = deque([at[first]])
    while reached and at[last] not in came_from:
        k = reached.popleft()
        next_ = [k + 1] if body[k].falls_through and k + 1 < len(body) else []
        if (target := body[k].target) is not None:
            next_.append(at[target])
        for successor in next_:
            if successor not in came_from:
                came_from[successor] = k
                reached.append(successor)
    way = []
    step = at[last] if at[last] in came_from else None
    while step is not None:
        way.append(body[step])
        step = came_from[step]
    return tuple(reversed(way))
