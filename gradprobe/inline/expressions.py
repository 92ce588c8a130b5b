"""Follows values through the expressions of a method."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import FunctionType
from typing import TYPE_CHECKING

from torch import nn

from gradprobe.inline import values
from gradprobe.inline.additions import Addition, judge
from gradprobe.inline.known import ACTIVATIONS, LAYERS, MUTATORS, NO_STREAM, UNRELATED
from gradprobe.inline.source import Source, span_of
from gradprobe.inline.values import NOTHING, Path, Value, joined, made_from, path_through

if TYPE_CHECKING:
    from gradprobe.inline.flow import Reader

_NOT_THERE = Value()  # an attribute that is missing or None, which nothing can call
SEQUENCES = (ast.Tuple, ast.List)
_COMPARED: Mapping[type[ast.cmpop], Callable[[object, object], bool]] = {
    ast.Is: lambda a, b: a is b,
    ast.IsNot: lambda a, b: a is not b,
    ast.Eq: lambda a, b: a == b,
    ast.NotEq: lambda a, b: a != b,
}


class Expressions:
    """Follows values through expressions.

    Args:
        reader: Collects what is found.
        source: The method.
        method: Its name.
        names: What its names stand for at the start.
    """

    def __init__(self, reader: Reader, source: Source, method: str, names: Mapping[str, Value]) -> None:
        self.reader = reader
        self.module = reader.module
        self.source = source
        self.method = method
        self.names = dict(names)

    def value(self, node: ast.expr | None) -> Value:
        """Describes the value of an expression, and notes the additions in it."""
        if node is None or isinstance(node, (ast.Constant, ast.Lambda)):
            return NOTHING
        follow: Callable[[ast.expr], Value] | None = getattr(self, f"_{type(node).__name__.lower()}", None)
        if follow is not None:
            return follow(node)
        return joined([self.value(child) for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr)])

    def bind(self, target: ast.expr, value: Value) -> None:
        """Gives a value to a name, or to what a target stands for."""
        if isinstance(target, ast.Name):
            self.names[target.id] = value
        elif isinstance(target, (ast.Tuple, ast.List)):
            for element in target.elts:
                self.bind(element, value)
        elif isinstance(target, ast.Starred):
            self.bind(target.value, value)
        elif isinstance(target, (ast.Attribute, ast.Subscript)):
            base: ast.expr = target
            while isinstance(base, (ast.Attribute, ast.Subscript)):
                base = base.value
            if isinstance(base, ast.Name) and base.id in self.names:
                self.names[base.id] = joined([self.names[base.id], value])

    def add(self, at: ast.expr | ast.stmt, left: Value, right: Value, written: str) -> Value:
        """Describes a sum, and notes it where it is residual."""
        place = (self.method, span_of(at))
        findings = self.reader.findings
        verdict = judge(left, right, id(self.module))
        total = made_from([left, right])
        if self.reader.is_again and not (isinstance(verdict, Addition) and not verdict.is_projected):
            verdict = findings.additions.get(place)  # a cell adds what it makes of the round before: no projection
        if isinstance(verdict, str):
            findings.refused[place] = verdict
            total = replace(total, sums=total.sums | {place})
        elif verdict is not None:
            before = findings.additions.get(place, verdict)
            if before.shortcut_first != verdict.shortcut_first:
                findings.refused[place] = "either operand may be the shortcut"
            is_projected = before.is_projected and verdict.is_projected
            findings.additions[place] = replace(verdict, is_projected=is_projected, written=written)
            branch = right if verdict.shortcut_first else left
            for inner in branch.sums:  # of branches, joined before they meet the shortcut
                assert isinstance(inner, tuple)
                if inner not in findings.additions or findings.additions[inner].is_projected:
                    findings.additions.pop(inner, None)
                    findings.refused.pop(inner, None)
            total = replace(total, sums=total.sums | {place})
        return total

    def _name(self, node: ast.Name) -> Value:
        found = self.names.get(node.id, NOTHING)
        return replace(found, paths={}) if NO_STREAM.search(node.id) else found

    def _namedexpr(self, node: ast.NamedExpr) -> Value:
        found = self.value(node.value)
        self.bind(node.target, found)
        return found

    def _compare(self, node: ast.Compare) -> Value:
        for operand in (node.left, *node.comparators):
            self.value(operand)
        return NOTHING

    def _binop(self, node: ast.BinOp) -> Value:
        left, right = self.value(node.left), self.value(node.right)
        if isinstance(node.left, SEQUENCES) or isinstance(node.right, SEQUENCES):
            return joined([left, right])
        if isinstance(node.op, ast.Add):
            return self.add(node, left, right, "+")
        return made_from([left, right], Path(isinstance(node.op, ast.MatMult)))

    def _unaryop(self, node: ast.UnaryOp) -> Value:
        return made_from([self.value(node.operand)])

    def _ifexp(self, node: ast.IfExp) -> Value:
        outcome = self.outcome(node.test)
        return joined(
            [
                *([self.value(node.body)] if outcome is not False else []),
                *([self.value(node.orelse)] if outcome is not True else []),
            ]
        )

    def _comprehension_of(self, generators: Sequence[ast.comprehension], *results: ast.expr) -> Value:
        outside = dict(self.names)
        for generator in generators:
            self.bind(generator.target, elements(self.value(generator.iter)))
            for test in generator.ifs:
                self.value(test)
        found = joined([self.value(result) for result in results])
        self.names = outside
        return found

    def _listcomp(self, node: ast.ListComp | ast.SetComp | ast.GeneratorExp) -> Value:
        return self._comprehension_of(node.generators, node.elt)

    _setcomp = _generatorexp = _listcomp

    def _dictcomp(self, node: ast.DictComp) -> Value:
        return self._comprehension_of(node.generators, node.key, node.value)

    def _attribute(self, node: ast.Attribute) -> Value:
        is_self = isinstance(node.value, ast.Name) and node.value.id == self.source.self_name
        base = NOTHING if is_self else self.value(node.value)
        if not is_self and not base.modules:
            return NOTHING if node.attr in UNRELATED else base
        found = []
        for module in (self.module,) if is_self else base.modules:
            held = self._held(module, node.attr)
            if held is None:
                continue
            if isinstance(held, nn.Module):
                found.append(Value(modules=(held,)))
            elif isinstance(held, FunctionType) and node.attr not in vars(module):
                found.append(Value(method=node.attr) if is_self else Value(modules=(module,)))
            elif values.is_tensor(held):
                origin = (id(module), node.attr)
                found.append(Value({origin: Path()}))
            else:
                found.append(Value())
        return joined(found) if found else _NOT_THERE

    def _held(self, module: nn.Module, name: str) -> object:
        """Reads an attribute as the method would, None where there is nothing."""
        if name.startswith("__") and not name.endswith("__"):
            owner = self.source.function.__qualname__.split(".")[-2:][0]
            name = f"_{owner.lstrip('_')}{name}"
        try:
            return values.attribute(module, name)
        except AttributeError:
            return None

    def _subscript(self, node: ast.Subscript) -> Value:
        base = self.value(node.value)
        self.value(node.slice)
        if not base.modules:
            return base
        if len(base.modules) == 1 and isinstance(node.slice, ast.Constant):
            child = dict(base.modules[0].named_children()).get(str(node.slice.value))
            if child is not None:
                return Value(modules=(child,))
        return elements(base)

    def _call(self, node: ast.Call) -> Value:
        given = [self.value(argument) for argument in node.args]
        by_name = {keyword.arg or "**": self.value(keyword.value) for keyword in node.keywords}
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        operands = [*given, *by_name.values()]
        if isinstance(node.func, ast.Attribute) and _is_super(node.func.value):
            return made_from(operands, max(Path(1), path_through(self.module)))
        if name == "getattr" and len(node.args) > 1 and isinstance(node.args[1], ast.Constant):
            return self._attribute(ast.copy_location(ast.Attribute(node.args[0], str(node.args[1].value)), node))
        callee = self.value(node.func)
        if callee is _NOT_THERE:
            return NOTHING
        if callee.method or callee.modules:
            return self._called(node, callee, given, by_name)
        through = [value for value in given if value.modules or value.method]
        if through and not _is_builtin(name):  # handed to a function that calls it, as a checkpoint does
            tensors = [value for value in given if value.paths]
            return self._called(node, joined(through), tensors, by_name)
        if isinstance(node.func, ast.Attribute) and self._adds(node, name):
            is_method = len(node.args) == 1
            left, right = (callee, given[0]) if is_method else given
            total = self.add(node, left, right, name if is_method else f"torch.{name}")
            if name == "add_":
                self.bind(node.func.value, total)
            return total
        if name in UNRELATED:
            return NOTHING
        if isinstance(node.func, ast.Attribute):
            base = node.func.value
            if name in MUTATORS and isinstance(base, ast.Name) and base.id in self.names:
                self.names[base.id] = joined([self.names[base.id], *operands])
            if callee.paths:
                operands.append(callee)
        if _is_builtin(name):
            return joined(operands)
        function = self.source.function.__globals__.get(node.func.id) if isinstance(node.func, ast.Name) else None
        if isinstance(function, FunctionType) and not function.__module__.startswith("torch."):
            result = self.reader.call_function(function, given, by_name)
            if result is not None:
                return result
        return made_from(operands, Path(name in LAYERS, bends=name.rstrip("_") in ACTIVATIONS))

    def _called(self, node: ast.Call, callee: Value, given: Sequence[Value], by_name: Mapping[str, Value]) -> Value:
        """Describes what a module, or a method of this one, gives back."""
        operands = [*given, *by_name.values()]
        if callee.method is not None:
            found = self.reader.call_method(callee.method, given, by_name)
            return made_from(operands, Path(1)) if found is None else found
        for module in callee.modules if not self.reader.is_again else ():
            self.reader.findings.calls.append((module, tuple(given), dict(by_name)))
        if all(map(values.is_lookup, callee.modules)):
            return made_from([], Path(1))
        return made_from(operands, max(map(path_through, callee.modules)))

    def _adds(self, node: ast.Call, name: str) -> bool:
        """Tells whether a call is `torch.add(a, b)`, `a.add(b)` or `a.add_(b)`."""
        if node.keywords or name not in ("add", "add_") or not isinstance(node.func, ast.Attribute):
            return False
        is_torchs = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch" and name == "add"
        return len(node.args) == (2 if is_torchs else 1) and not any(isinstance(a, ast.Starred) for a in node.args)

    def outcome(self, test: ast.expr) -> bool | None:
        """Tells how a test comes out, as far as attributes of the module decide; None where they do not."""
        try:
            return bool(self._fixed(test))
        except (LookupError, AttributeError, TypeError, ValueError, RuntimeError):
            return None

    def _fixed(self, node: ast.expr) -> object:
        """Computes an expression of constants and attributes; LookupError where it has anything else."""
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            return not self._fixed(node.operand)
        if isinstance(node, ast.BoolOp):
            outcomes = [self.outcome(operand) for operand in node.values]
            decisive = isinstance(node.op, ast.Or)
            if decisive in outcomes:
                return decisive
            if None not in outcomes:
                return not decisive
        if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _COMPARED:
            return _COMPARED[type(node.ops[0])](self._fixed(node.left), self._fixed(node.comparators[0]))
        if isinstance(node, ast.Attribute) and node.attr != "training":
            base = node.value
            is_self = isinstance(base, ast.Name) and base.id == self.source.self_name
            module = self.module if is_self else self._fixed(base)
            if isinstance(module, nn.Module):
                held = values.attribute(module, node.attr)
                if held is None or isinstance(held, (bool, int, float, str, nn.Module)):
                    return held
                if values.is_tensor(held):
                    return _Tensor()
        raise LookupError


def elements(value: Value) -> Value:
    """Describes an element of what a loop goes through.

    Args:
        value: A tensor, or something with modules in it.

    Returns:
        The same with children in place of containers.

    Example:
        >>> elements(Value(modules=(nn.ModuleList([nn.ReLU()]),))).modules
        (ReLU(),)
    """
    inner = [
        child for module in value.modules for child in (module.children() if values.is_container(module) else [module])
    ]
    return replace(value, modules=tuple(inner))


class _Tensor:
    """Stands for a tensor: it is not None, and its numbers decide nothing."""

    def __bool__(self) -> bool:
        raise TypeError


def _is_super(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super"


def _is_builtin(name: str) -> bool:
    return name in (
        "enumerate",
        "zip",
        "reversed",
        "list",
        "tuple",
        "dict",
        "items",
        "values",
        "iter",
        "next",
        "sorted",
    )
