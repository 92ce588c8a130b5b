"""Finds an addition that runs in the source of the method that runs it."""

from __future__ import annotations

import ast
import itertools
import operator
from types import CellType, CodeType, FrameType, FunctionType

import torch
from torch import nn

from gradprobe.nn.rewrite import Source, Unreadable, read, span_of

_FUNCTIONS: dict[object, str] = {torch.add: "torch.add", operator.add: "+", operator.iadd: "+="}


def method_of(module: nn.Module, code: CodeType) -> tuple[str, Source]:
    """Finds the method of a module that runs a code object.

    Raises:
        Unreadable: It is none of its methods, or the method cannot be rewritten.

    Example:
        >>> method_of(nn.Linear(1, 1), nn.Linear.forward.__code__)[0]
        'forward'
    """
    for name in [*vars(module), *dir(type(module))]:
        try:
            held = attribute(module, name)
        except AttributeError:
            continue
        if code in _codes_of(held):
            try:
                source = read(held)
            except Unreadable as error:
                raise Unreadable(str(error) if name == "forward" else f"has a method {name} that {error}") from error
            if source.function.__code__ is code:
                return name, source
    raise Unreadable(f"adds in {qualname(code)}, a function outside the module")


def attribute(module: nn.Module, name: str) -> object:
    """Reads an attribute of a module without running any of its code.

    Args:
        module: Any module.
        name: Name of a child, parameter, buffer, method or other attribute of the module or its class.

    Returns:
        The attribute; functions, properties and other descriptors as stored in the class.

    Raises:
        AttributeError: There is no such attribute.

    Example:
        >>> attribute(nn.Linear(2, 3), "out_features")
        3
    """
    state = vars(module)
    for held in (state, state["_parameters"], state["_buffers"], state["_modules"]):
        if name in held:
            return held[name]
    for owner in type(module).__mro__:
        if name in vars(owner):
            return vars(owner)[name]
    raise AttributeError(name)


def qualname(code: CodeType) -> str:
    """Returns the name of a function with that of its class, as far as this version of Python tells."""
    return getattr(code, "co_qualname", code.co_name)  # new in Python 3.11


def _codes_of(held: object) -> list[CodeType]:
    found = []
    while hasattr(held, "__code__"):
        found.append(held.__code__)
        held = getattr(held, "__wrapped__", None)
    return found


def node_at(source: Source, frame: FrameType) -> ast.expr | ast.stmt:
    """Returns the addition that a frame runs now, or the call that it is in.

    Raises:
        Unreadable: It is written in a form that cannot be replaced.
    """
    nodes = [node for node in ast.walk(source.definition) if isinstance(node, ast.BinOp | ast.AugAssign | ast.Call)]
    if hasattr(frame.f_code, "co_positions"):
        first, last, start, end = next(itertools.islice(frame.f_code.co_positions(), frame.f_lasti // 2, None))
        nodes = [node for node in nodes if span_of(node) == (first, start, last, end)]
    else:
        nodes = [node for node in nodes if node.lineno <= frame.f_lineno <= (node.end_lineno or node.lineno)]
        nodes = [node for node in nodes if isinstance(node, ast.Call) or isinstance(node.op, ast.Add)]
    if len(nodes) == 1 and isinstance(nodes[0], ast.AugAssign) and not isinstance(nodes[0].target, ast.Name):
        raise Unreadable("adds in place to a slice or an attribute")
    if len(nodes) != 1:
        raise Unreadable(f"adds in line {frame.f_lineno} in a form that cannot be replaced")
    return nodes[0]


def source_of(frame: FrameType) -> Source:
    """Reads the source of the function that a frame runs, for a function outside any module.

    Raises:
        Unreadable: It cannot be rewritten.
    """
    code = frame.f_code
    if frame.f_globals.get("__name__", "").partition(".")[0] == "torch":
        raise Unreadable("is a part of torch")
    closure = tuple(CellType(frame.f_locals.get(name)) for name in code.co_freevars)
    return read(FunctionType(code, frame.f_globals, code.co_name, None, closure), is_method=False)


def written_in(node: ast.expr | ast.stmt, source: Source) -> str:
    """Returns how the model writes an addition, "" in a form that cannot be replaced."""
    if isinstance(node, ast.BinOp | ast.AugAssign):
        if not isinstance(node.op, ast.Add):
            return ""
        return "+" if isinstance(node, ast.BinOp) else "+="
    assert isinstance(node, ast.Call)
    if node.keywords or any(isinstance(one, ast.Starred) for one in node.args):
        return ""
    if isinstance(node.func, ast.Name):
        held = source.outside(node.func.id)
    elif isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
        held = getattr(source.outside(node.func.value.id), node.func.attr, None)
    else:
        held = None
    written = _FUNCTIONS.get(held) if isinstance(held, type(torch.add)) else None
    if written is not None:
        return written if len(node.args) == 2 else ""
    is_method = isinstance(node.func, ast.Attribute) and node.func.attr in ("add", "add_") and held is None
    return node.func.attr if is_method and len(node.args) == 1 else ""  # type: ignore[attr-defined]
