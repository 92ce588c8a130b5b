"""Follows values through the expressions of a method."""

from __future__ import annotations

import ast
import functools
import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import TYPE_CHECKING, NamedTuple, TypeGuard

import torch
from torch import nn

from gradprobe.nn.inline import values
from gradprobe.nn.inline.decided import outcome
from gradprobe.nn.inline.known import (
    ACTIVATIONS,
    CHILDREN,
    LAYERS,
    LIBRARIES,
    METHODS,
    MUTATORS,
    UNRELATED,
    is_no_stream,
)
from gradprobe.nn.inline.values import NOTHING, described, joined, made_from, path_through
from gradprobe.nn.rewrite import Source, span_of
from gradprobe.nn.shortcuts import Addition, Path, Value, judge

if TYPE_CHECKING:
    from gradprobe.nn.inline.flow import Reader

_MANY = 8  # arguments assumed for `*args`: more than most calls pass
_NOT_THERE = Value()  # an attribute that is None, and so cannot be called
# Functions that add two tensors, and the name under which `InlineAdd` does the same.
_ADDING: Sequence[tuple[object, str]] = ((torch.add, "torch.add"), (operator.add, "+"), (operator.iadd, "+="))


class Call(NamedTuple):
    """A call of another module's method."""

    module: nn.Module
    method: str
    given: Sequence[Value]
    by_name: Mapping[str, Value]


class Closure(NamedTuple):
    """A function defined inside a method, and the scope that defines it."""

    definition: ast.FunctionDef | ast.Lambda
    within: Expressions


class Expressions:
    """Follows values through expressions.

    Args:
        reader: Collects the findings.
        source: The method.
        method: Its name.
        names: The values of its variables at the start.
        why_not: Why additions in it cannot be replaced, if they cannot.
    """

    def __init__(
        self, reader: Reader, source: Source, method: str, names: Mapping[str, Value], why_not: str = ""
    ) -> None:
        self.reader = reader
        self.module = reader.module
        self.source = source
        self.method = method
        self.names = dict(names)
        self.why_not = why_not

    def value(self, node: ast.expr | None) -> Value:
        """Returns the value of an expression and records the additions in it."""
        if node is None or isinstance(node, ast.Constant):
            return NOTHING
        follow: Callable[[ast.expr], Value] | None = getattr(self, f"_{type(node).__name__.lower()}", None)
        if follow is not None:
            return follow(node)
        return joined([self.value(child) for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr)])

    def bind(self, target: ast.expr, value: Value) -> None:
        """Assigns a value to a target."""
        if isinstance(target, ast.Name):
            self.names[target.id] = value
        elif isinstance(target, (ast.Tuple, ast.List)):
            for element in target.elts:
                self.bind(element, replace(value, is_sequence=False, is_outputs=False))
        elif isinstance(target, ast.Starred):
            self.bind(target.value, value)
        elif isinstance(target, (ast.Attribute, ast.Subscript)):
            base: ast.expr = target
            while isinstance(base, (ast.Attribute, ast.Subscript)):
                inner, base = base, base.value
            if not isinstance(base, ast.Name) or base.id not in self.names:
                return
            if self.names[base.id].modules != (self.module,):
                self.names[base.id] = joined([self.names[base.id], value])
            elif isinstance(inner, ast.Attribute):
                self.reader.kept[inner.attr] = joined([self.reader.kept.get(inner.attr, NOTHING), value])

    def add(self, at: ast.expr | ast.stmt, left: Value, right: Value, written: str, why_not: str = "") -> Value:
        """Returns the value of a sum; if it is residual, records it or the reason why it cannot be replaced."""
        if left.is_sequence or right.is_sequence or (left.is_outputs and right.is_outputs):
            return replace(joined([left, right]), is_sequence=True)
        place = (self.method, span_of(at))
        findings = self.reader.findings
        verdict = judge(left, right, id(self.module), self.reader.since)
        total = made_from([left, right])
        if why_not := self.why_not or why_not:
            verdict = why_not if isinstance(verdict, Addition) else None
        if self.reader.is_again and not (isinstance(verdict, Addition) and not verdict.is_projected):
            verdict = findings.additions.get(
                place
            )  # a recurrent cell adds results of the previous round: not a projection
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
            for inner in branch.sums:  # sums of parallel branches, before the shortcut is added
                if inner not in findings.additions or findings.additions[inner].is_projected:
                    findings.additions.pop(inner, None)
                    findings.refused.pop(inner, None)
            total = replace(total, sums=total.sums | {place})
        return total

    def _name(self, node: ast.Name) -> Value:
        found = self.names[node.id] if node.id in self.names else described(self.source.outside(node.id))
        if not found.paths:
            return found
        if is_no_stream(node.id):
            return replace(found, paths={})
        return replace(found, is_outputs=True) if node.id in _names_of_outputs(self.source.definition) else found

    def _namedexpr(self, node: ast.NamedExpr) -> Value:
        found = self.value(node.value)
        self.bind(node.target, found)
        return found

    def _lambda(self, node: ast.Lambda) -> Value:
        return self.closure(node)

    def closure(self, definition: ast.FunctionDef | ast.Lambda) -> Value:
        """Returns the value of a function that the method defines and records the additions in it."""
        closure = Closure(definition, self)
        self.reader.call_closure(closure, (), {})
        return Value(held=closure)

    def _compare(self, node: ast.Compare) -> Value:
        for operand in (node.left, *node.comparators):
            self.value(operand)
        return NOTHING

    def _binop(self, node: ast.BinOp) -> Value:
        left, right = self.value(node.left), self.value(node.right)
        if isinstance(node.op, ast.Add):
            return self.add(node, left, right, "+")
        is_product = isinstance(node.op, ast.Mult) and bool(left.paths and right.paths)
        return made_from([left, right], Path(isinstance(node.op, ast.MatMult), gates=is_product))

    def _tuple(self, node: ast.Tuple | ast.List) -> Value:
        return replace(joined([self.value(element) for element in node.elts]), is_sequence=True)

    _list = _tuple

    def _unaryop(self, node: ast.UnaryOp) -> Value:
        return made_from([self.value(node.operand)])

    def _ifexp(self, node: ast.IfExp) -> Value:
        comes_out = outcome(node.test, self.source, self.names)
        return joined(
            [
                *([self.value(node.body)] if comes_out is not False else []),
                *([self.value(node.orelse)] if comes_out is not True else []),
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
        if isinstance(node.value, ast.Call) and _is_super(node.value):
            return self._of_parent(node.value, node.attr)
        base = self.value(node.value)
        if base.modules == (self.module,) and node.attr in self.reader.kept:
            return joined([self.reader.kept[node.attr], self._of_module(self.module, node.attr)])
        if base.modules and not base.method:
            return joined([self._of_module(module, node.attr) for module in base.modules])
        if base.held is not None:
            return _of_object(base.held, node.attr)
        return NOTHING if node.attr in UNRELATED else base

    def _of_module(self, module: nn.Module, name: str) -> Value:
        """Returns the value of a module's attribute."""
        try:
            held = values.attribute(module, self.source.mangled(name))
        except AttributeError:
            return Value()
        if isinstance(held, (property, functools.cached_property)):
            getter = held.fget if isinstance(held, property) else held.func
            found = None
            if isinstance(getter, FunctionType) and name not in UNRELATED:
                found = self.reader.call_function(getter, [Value(modules=(module,))], {})
            return Value() if found is None else found
        if name == "_modules":
            return self._children(module)
        if isinstance(held, FunctionType) and name not in vars(module):
            return Value(modules=(module,), method=self.source.mangled(name))
        return _NOT_THERE if held is None else described(_bound(held, type(module)))

    def _of_parent(self, parent: ast.Call, name: str) -> Value:
        """Describes `super().name`."""
        owner = self.value(parent.args[0]).held if parent.args else self.source.outside("__class__")
        kinds = type(self.module).__mro__
        for kind in kinds[kinds.index(owner) + 1 :] if owner in kinds else ():
            if name in vars(kind):
                held = vars(kind)[name]
                return Value(held=MethodType(held, self.module) if isinstance(held, FunctionType) else held)
        return Value()

    def _subscript(self, node: ast.Subscript) -> Value:
        base = self.value(node.value)
        self.value(node.slice)
        if isinstance(node.slice, ast.Slice):
            leaves_first = isinstance(node.slice.lower, ast.Constant) and node.slice.lower.value != 0
            return replace(base, is_outputs=leaves_first)
        if len(base.modules) == 1 and isinstance(node.slice, ast.Constant):
            child = dict(base.modules[0].named_children()).get(str(node.slice.value))
            if child is not None:
                return Value(modules=(child,))
        return elements(base)

    def _call(self, node: ast.Call) -> Value:
        given = []
        for argument in node.args:
            value = self.value(argument)
            given += [elements(value)] * _MANY if isinstance(argument, ast.Starred) else [value]
        by_name = {keyword.arg or "**": self.value(keyword.value) for keyword in node.keywords}
        callee = self.value(node.func)
        if callee is _NOT_THERE:
            return NOTHING
        name = _name_of(node.func, callee.held)
        if (total := self._added(node, name, callee, given, by_name)) is not None:
            return total
        if callee.modules:
            return self._called(callee, given, by_name)
        if name in UNRELATED:
            return NOTHING
        if callee.held is getattr and len(node.args) > 1:
            return self._named(node.args[0], node.args[1])
        return self._function(node, name, callee, given, by_name)

    def _named(self, owner: ast.expr, name: ast.expr) -> Value:
        """Returns the value of `getattr(owner, name)`."""
        return self._attribute(ast.Attribute(owner, str(name.value))) if isinstance(name, ast.Constant) else Value()

    def _function(
        self, node: ast.Call, name: str, callee: Value, given: Sequence[Value], by_name: Mapping[str, Value]
    ) -> Value:
        """Returns the result of calling anything except a module."""
        operands = [*given, *by_name.values()]
        held = callee.held
        if callable(held) and _is_followed(type(held).__call__):
            held = MethodType(type(held).__call__, held)
        if isinstance(held, MethodType):
            given, held = [described(held.__self__), *given], held.__func__
            if not _is_followed(held) and given[0].modules:
                return made_from(operands, max(Path(1), path_through(given[0].modules)))
        if isinstance(held, Closure):
            found = held.within.reader.call_closure(held, given, by_name)
            return made_from(operands, Path(opaque=1)) if found is None else found
        if _is_followed(held):
            found = self.reader.call_function(held, given, by_name)
            return made_from(operands, Path(opaque=1)) if found is None else found
        if isinstance(held, type):  # tuple, enumerate, zip, or a class of outputs
            return joined(operands)
        through = joined([value for value in given if self._may_be_called(value)])
        if name not in ("iter", "next", "sorted"):  # passed to a function that calls it, such as checkpoint
            tensors = [value for value in given if value.paths]
            if through.modules:
                return self._called(through, tensors, by_name)
            if through.held is not None:
                return self._function(node, _name_of(node.func, through.held), through, tensors, by_name)
        if isinstance(node.func, ast.Attribute):
            base = node.func.value
            if name in MUTATORS and isinstance(base, ast.Name) and base.id in self.names:
                self.names[base.id] = joined([self.names[base.id], *operands])
            operands.append(callee)
        is_known = isinstance(held, (FunctionType, BuiltinFunctionType)) or (held is None and name in METHODS)
        bare_name = name.rstrip("_")
        return made_from(operands, Path(name in LAYERS, not is_known, bare_name in ACTIVATIONS, bare_name == "mul"))

    def _may_be_called(self, value: Value) -> bool:
        is_self = value.modules == (self.module,) and not value.method
        return bool(value.modules and not is_self) or isinstance(value.held, (Closure, FunctionType))

    def _called(self, callee: Value, given: Sequence[Value], by_name: Mapping[str, Value]) -> Value:
        """Returns the result of calling modules or their methods."""
        operands = [*given, *by_name.values()]
        method = "forward" if callee.method in (None, "__call__") else callee.method
        if method in CHILDREN:
            return joined([self._children(module) for module in callee.modules])
        if method in vars(nn.Module) and method != "forward":
            return made_from(operands)
        if callee.modules == (self.module,):
            found = self.reader.call_method(method, given, by_name)
            return made_from(operands, Path(1)) if found is None else found
        for module in callee.modules if not self.reader.is_again else ():
            self.reader.findings.calls.append(Call(module, method, given, by_name))
        if all(map(values.is_lookup, callee.modules)):
            return made_from([], Path(1))
        return made_from(operands, path_through(callee.modules))

    def _children(self, module: nn.Module) -> Value:
        """Returns the children of a module over which a method iterates."""
        if values.is_container(module):
            return Value(modules=(module,))
        where = f"iterates over its children in {self.method}"
        if module is not self.module:
            where = f"has its children iterated over in {self.method} of {type(self.module).__name__}"
        self.reader.findings.walked[module] = f"{where}, which would run one more child too"
        return Value(modules=tuple(module.children()))

    def _added(
        self, node: ast.Call, name: str, callee: Value, given: Sequence[Value], by_name: Mapping[str, Value]
    ) -> Value | None:
        """Returns the result of a call that adds; None if the call does something else."""
        target = node.func.value if isinstance(node.func, ast.Attribute) else None
        is_method = target is not None and callee.held is None and not callee.modules
        operands = [callee, *given] if is_method else [*given]
        written = next((how for function, how in _ADDING if function is callee.held), "")
        if is_method and name in ("add", "add_"):
            written = name
        if written and len(operands) == 2 and not by_name and not any(isinstance(a, ast.Starred) for a in node.args):
            total = self.add(node, operands[0], operands[1], written)
            if written in ("add_", "+="):
                self.bind(target if is_method and target is not None else node.args[0], total)
            return total
        if callee.held is sum and node.args and isinstance(node.args[0], (ast.Tuple, ast.List)):
            operands = [self.value(element) for element in node.args[0].elts]
        elif not written and not (
            name.rstrip("_") in ("addcmul", "addcdiv") and (is_method or _is_torchs(callee.held))
        ):
            return None
        total, *rest = [*operands, *by_name.values()] or [NOTHING]
        for operand in rest:
            total = self.add(node, total, operand, name, f"adds by {name} in a form that cannot be replaced")
        return total


def elements(value: Value) -> Value:
    """Returns the value of an element of an iterable.

    Args:
        value: A tensor, or a value with modules in it.

    Returns:
        The same value with the children in place of containers.

    Example:
        >>> elements(Value(modules=(nn.ModuleList([nn.ReLU()]),))).modules
        (ReLU(),)
    """
    inner = [
        child for module in value.modules for child in (module.children() if values.is_container(module) else [module])
    ]
    return replace(value, modules=tuple(inner), is_sequence=False, is_outputs=False)


@functools.lru_cache(maxsize=4096)
def _names_of_outputs(definition: ast.FunctionDef) -> frozenset[str]:
    """Collects the variables of a function of which it reads an attribute that no tensor has."""
    return frozenset(
        node.value.id
        for node in ast.walk(definition)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and not hasattr(torch.Tensor, node.attr)
    )


def _of_object(held: object, name: str) -> Value:
    """Returns the value of an attribute of an object that is not an `nn.Module`: a function, a class, a package."""
    if name in UNRELATED and not isinstance(held, ModuleType):
        return NOTHING
    found = inspect.getattr_static(held, name, None)
    if isinstance(found, FunctionType) and not isinstance(held, (ModuleType, type)):
        return Value(held=MethodType(found, held))
    return described(_bound(found, held))


def _bound(held: object, owner: object) -> object:
    """Unwraps a static or class method."""
    if isinstance(held, staticmethod):
        return held.__func__
    return MethodType(held.__func__, owner) if isinstance(held, classmethod) else held


def _name_of(node: ast.expr, held: object) -> str:
    if isinstance(node, ast.Attribute):
        return node.attr
    if isinstance(held, (FunctionType, BuiltinFunctionType)):
        return held.__name__
    return node.id if isinstance(node, ast.Name) else ""


def _is_followed(held: object) -> TypeGuard[FunctionType]:
    """Returns whether an object is a function of the model's code, not of a library known by its functions' names."""
    return isinstance(held, FunctionType) and (held.__module__ or "").partition(".")[0] not in LIBRARIES


def _is_torchs(held: object) -> bool:
    return str(getattr(held, "__module__", "")).partition(".")[0] == "torch"


def _is_super(node: ast.Call) -> bool:
    return isinstance(node.func, ast.Name) and node.func.id == "super"
