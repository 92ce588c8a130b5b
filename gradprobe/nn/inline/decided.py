"""Evaluates the conditions in a method that attributes of its module decide before it runs."""

from __future__ import annotations

import ast
import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from gradprobe.nn.inline.values import attribute
from gradprobe.nn.rewrite import Source
from gradprobe.nn.shortcuts import Value

_COMPARED: Mapping[type[ast.cmpop], Callable[[Any, Any], object]] = {
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}


def outcome(test: ast.expr, source: Source, names: Mapping[str, Value]) -> bool | None:
    """Evaluates a condition.

    Args:
        test: Any expression.
        source: The function that contains it.
        names: The values of that function's variables.

    Returns:
        True or False; None if attributes of modules do not decide it.

    Example:
        >>> from gradprobe.nn.rewrite import read
        >>> test = ast.parse("self.bias is None or self.in_features in (2, 3)", mode="eval").body
        >>> outcome(test, read(nn.Linear.forward), {"self": Value(modules=(nn.Linear(2, 2),))})
        True
    """
    try:
        return bool(_Test(source, names).value(test))
    except (LookupError, AttributeError, TypeError, ValueError, RuntimeError):
        return None


class _Test:
    """Evaluates expressions of constants and attributes; raises LookupError for anything else."""

    def __init__(self, source: Source, names: Mapping[str, Value]) -> None:
        self._source = source
        self._names = names

    def value(self, node: ast.expr) -> object:
        """Evaluates an expression."""
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, (ast.Tuple, ast.List, ast.Set)):
            return [self.value(element) for element in node.elts]
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            return not self.value(node.operand)
        if isinstance(node, ast.BoolOp):
            return self._any_or_all(node)
        if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _COMPARED:
            return _COMPARED[type(node.ops[0])](self.value(node.left), self.value(node.comparators[0]))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "hasattr":
            return self._has(*node.args)
        if isinstance(node, ast.Attribute) and node.attr != "training":
            held = self._read(node)
            if held is None or isinstance(held, (bool, int, float, str, nn.Module)):
                return held
            if isinstance(held, torch.Tensor):
                return _Tensor()
        raise LookupError

    def _any_or_all(self, node: ast.BoolOp) -> bool:
        outcomes = [outcome(operand, self._source, self._names) for operand in node.values]
        decisive = isinstance(node.op, ast.Or)
        if decisive in outcomes:
            return decisive
        if None in outcomes:
            raise LookupError
        return not decisive

    def _has(self, owner: ast.expr, name: ast.expr) -> bool:
        if not isinstance(name, ast.Constant) or not isinstance(self._read(owner), nn.Module):
            raise LookupError
        try:
            self._read(ast.Attribute(owner, str(name.value)))
        except AttributeError:
            return False
        return True

    def _read(self, node: ast.expr) -> object:
        """Reads a module or a chain of attributes that starts at one."""
        if isinstance(node, ast.Attribute):
            if node.attr in _set_by(self._source.definition):
                raise LookupError
            owner = self._read(node.value)
            if isinstance(owner, nn.Module):
                return attribute(owner, self._source.mangled(node.attr))
            return vars(owner)[node.attr]
        (module,) = self._names[node.id].modules if isinstance(node, ast.Name) else ()
        return module


class _Tensor:
    """Stands for a tensor, which is not None and whose values are unknown."""

    def __bool__(self) -> bool:
        raise TypeError


@functools.lru_cache(maxsize=4096)
def _set_by(definition: ast.FunctionDef) -> frozenset[str]:
    """Collects the attributes that a function sets, whose values before the call decide nothing."""
    nodes = (node for node in ast.walk(definition) if isinstance(node, ast.Attribute))
    return frozenset(node.attr for node in nodes if isinstance(node.ctx, ast.Store))
