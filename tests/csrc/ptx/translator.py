"""Translates PTX to C++: a kernel is a function, an instruction a statement.

The translator knows how PTX is written. What an instruction does is in instructions.h, where `max.f16x2` is the
function `op_max<f16x2>`. An instruction without a function there is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from itertools import accumulate
from pathlib import Path

INSTRUCTIONS = Path(__file__).resolve().parent / "instructions.h"

_TYPE = re.compile(r"[bsu](?:8|16|32|64)|f(?:32|64)|b?f16(?:x2)?|pred")
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_HEADER = re.compile(r"\.(version|target|address_size)\b[^\n]*")
_SHARED = re.compile(r"\.shared\s+\.align\s+\d+\s+\.b8\s+([\w$]+)\[(\d+)\];")
_ENTRY = re.compile(r"\s*(?:\.visible\s+)?\.entry\s+(\w+)\s*\(([^)]*)\)(?:\s*\.(?:maxntid|minnctapersm)[ \d,]*)*\s*\{")
_PARAMETER = re.compile(r"([\w$]+)(?:\[\d+\])?\s*(?:,|$)")
_STATEMENT = re.compile(r"\s*(?:(?P<brace>[{}])|(?P<label>[\w$]+):|(?P<text>[^;]+);)")
_INSTRUCTION = re.compile(r"(?:@(!?)%(\w+)\s+)?([a-z]\w*(?:\.\w+)*)\s*(.*)", re.DOTALL)
_VECTORS = {"v2": "2", "v4": "4"}
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+")


class UnknownInstruction(ValueError):
    """PTX that the translator or instructions.h does not know."""


def translated(ptx: str, file: str) -> str:
    """Returns C++ source that registers the kernels of a PTX file.

    Args:
        ptx: As nvcc prints it.
        file: Its name. The C++ compiler reports lines of this file.

    Raises:
        UnknownInstruction: Names the file, the line and the instruction.
    """
    ptx = _COMMENT.sub(lambda match: "\n" * match[0].count("\n"), ptx)
    shared = _SHARED.findall(ptx)  # also what is declared in a kernel; blocks run one after another
    offsets = list(accumulate((-(-int(size) // 16) * 16 for _, size in shared), initial=0))
    source = [
        f'__attribute__((section("emulated_shared"), aligned(16))) static char shared[{max(offsets[-1], 16)}];',
        f'#include "{INSTRUCTIONS.name}"',
        *(f"static constexpr u32 {name} = {offset};" for (name, _), offset in zip(shared, offsets, strict=False)),
    ]
    ptx = _SHARED.sub(" ", _HEADER.sub("", ptx)).rstrip()
    at = 0
    while at < len(ptx):
        entry = _ENTRY.match(ptx, at)
        if entry is None:
            text = ptx[at:].lstrip()
            raise UnknownInstruction(f"{file}:{ptx.count(chr(10), 0, -len(text)) + 1}: {text.splitlines()[0]}")
        name, parameters = entry.groups()
        source.append(f"static void run_{name}(void** arguments) {{")
        for k, parameter in enumerate(_PARAMETER.findall(parameters.strip())):
            source.append(f"const u64 {parameter} = reinterpret_cast<u64>(arguments[{k}]);")
        at = entry.end()
        for line, end, statement in _statements(ptx, at):
            source.append(f'#line {line} "{file}"\n{_translated(statement, f"{file}:{line}")}')
            at = end
        source.append(f'static const ptx::Kernel kernel_{name}{{"{name}", run_{name}}};')
    return "\n".join(source) + "\n"


def _statements(ptx: str, at: int) -> Iterator[tuple[int, int, str]]:
    """Yields line, end and text of each statement up to the brace that closes the one before index `at`."""
    line = ptx.count("\n", 0, at) + 1
    depth = 1
    while depth > 0:
        match = _STATEMENT.match(ptx, at)
        if match is None:
            raise UnknownInstruction(f"line {line}: a kernel has no end")
        statement = match[0].strip()
        line += match[0].count("\n")
        at = match.end()
        depth += (statement == "{") - (statement == "}")
        yield line, at, statement


def _translated(statement: str, where: str) -> str:
    """Returns one statement in C++. Errors say `where` it is."""
    if statement in ("{", "}"):
        return statement
    if statement.endswith(":"):
        return f"{statement};"
    statement = statement.rstrip(";").strip()
    if statement.startswith(".pragma"):
        return ""
    if statement.startswith(".reg"):
        return _declaration(*statement.split(maxsplit=2)[1:])
    match = _INSTRUCTION.fullmatch(statement)
    if match is None:
        raise UnknownInstruction(f"{where}: {statement}")
    negation, predicate, name, rest = match.groups()
    condition = f"if ({negation}{predicate}_) " if predicate else ""
    if name in ("bra", "bra.uni"):
        return f"{condition}goto {rest};"
    if name == "ret":
        return f"{condition}return;"
    function = _function(name)
    if function not in _known():
        raise UnknownInstruction(f"{where}: {statement}: {INSTRUCTIONS.name} has no {function}")
    return condition + _call(name, function, _OPERAND.findall(rest))


def _declaration(type_: str, names: str) -> str:
    """Returns the declaration of registers such as `%r<3>`, which are r0_ to r2_, or of one with a name."""
    register = "bool" if type_ == ".pred" else f"u{32 if type_.endswith('x2') else re.sub(r'[^0-9]', '', type_)}"
    declared = []
    for name in names.split(","):
        many = re.fullmatch(r"%(\w+)<(\d+)>", name.strip())
        declared += [f"{many[1]}{k}_" for k in range(int(many[2]))] if many else [name.strip()]
    return f"{register} {', '.join(declared)};"


def _function(name: str) -> str:
    """Returns the function of an instruction: its name without types and the length of vectors."""
    return "_".join(["op", *(part for part in name.split(".") if not _TYPE.fullmatch(part) and part not in _VECTORS)])


def _call(name: str, function: str, operands: list[str]) -> str:
    """Returns the call of an instruction's function, with types and the length of vectors as template arguments."""
    parts = name.split(".")
    types = [part for part in parts if _TYPE.fullmatch(part)]
    length = [_VECTORS[part] for part in parts if part in _VECTORS]
    arguments = f"<{', '.join(types + length)}>" if types else ""
    results = [] if parts[0] in ("st", "bar") else re.findall(r"[%\w]+", operands.pop(0))
    read_as = types[-1] if types else "u32"
    call = f"{function}{arguments}({', '.join(_read(operand, read_as, bool(length)) for operand in operands)})"
    return f"put({', '.join([call, *map(_register, results)])});" if results else f"{call};"


def _read(operand: str, type_: str, is_vector: bool) -> str:
    """Returns the C++ expression that reads an operand."""
    if address := re.fullmatch(r"\[([%\w$]+)(?:\+(-?\d+))?\]", operand):
        return f"at({_register(address[1])}, {address[2] or 0})"
    if operand.startswith("{"):
        elements = re.findall(r"[^{},\s]+", operand)
        part = type_ if is_vector else f"b{int(type_[1:]) // len(elements)}"
        values = ", ".join(_read(element, part, False) for element in elements)
        return f"{{{values}}}" if is_vector else f"get<{type_}>(pack({values}))"
    if special := re.fullmatch(r"%(\w+)\.([xyz])", operand):
        return f"get<{type_}>({special[1]}_{special[2]}())"
    if number := re.fullmatch(r"0[fd]([0-9A-F]+)", operand):
        return f"get<{type_}>(0x{number[1]}ull)"
    if re.fullmatch(r"-?\d+", operand):
        return f"get<{type_}>({int(operand) & (1 << 64) - 1:#x}ull)"
    return f"get<{type_}>({_register(operand)})"


def _register(operand: str) -> str:
    """Returns the C++ name of a register or a symbol."""
    return f"{operand[1:]}_" if operand.startswith("%") else operand


@cache
def _known() -> frozenset[str]:
    """The functions of instructions.h."""
    return frozenset(re.findall(r"\b(op_\w+)\(", INSTRUCTIONS.read_text(encoding="utf-8")))
