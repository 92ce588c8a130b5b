"""Finds the additions in a module's methods that join a shortcut and a branch, from the source alone; nothing is run.

Each value is described by the tensors it was made from and the number of layers in between (modules with parameters of
their own, and functions such as `linear` or `matmul`). `a + b` is residual if both were made from one tensor and one of
them through no layer, or through a projection: at most half as many layers as the other, and no activation. Both sides
of an `if` are followed unless attributes of the module decide it; loops are followed twice.
"""

from __future__ import annotations

import ast
import itertools
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import FunctionType

from torch import nn

from gradprobe.nn.inline.decided import outcome
from gradprobe.nn.inline.expressions import Call, Closure, Expressions, elements
from gradprobe.nn.inline.values import NEW, NOTHING, attribute, joined, made_from
from gradprobe.nn.rewrite import Place, Source, Unreadable, read
from gradprobe.nn.shortcuts import Addition, Input, Path, Value

_MAX_DEPTH = 8  # of nested calls


@dataclass
class Findings:
    """The result of following a module's source.

    Attributes:
        additions: The residual additions, in source order.
        refused: Additions that look residual but cannot be replaced, and why.
        calls: Calls of other modules.
        walked: Modules over whose children a method iterates, and which method.
    """

    additions: dict[Place, Addition] = field(default_factory=dict)
    refused: dict[Place, str] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    walked: dict[nn.Module, str] = field(default_factory=dict)


def find_additions(module: nn.Module, handed: Sequence[Call] = ()) -> Findings:
    """Finds the residual additions in the methods that a module's forward runs through.

    Args:
        module: Any module.
        handed: The known calls of its methods.

    Returns:
        The additions, those refused, and the calls of other modules.

    Raises:
        Unreadable: The forward cannot be rewritten.

    Example:
        >>> found = find_additions(nn.TransformerEncoderLayer(8, 2))
        >>> [addition.shortcut_first for addition in found.additions.values()]
        [True, True]
    """
    reader = Reader(module)
    reader.run(handed)
    found = reader.findings
    for place in found.refused:
        found.additions.pop(place, None)
    found.additions = dict(sorted(found.additions.items(), key=lambda item: item[0][1]))
    return found


class Reader:
    """Follows the values through one module's methods."""

    def __init__(self, module: nn.Module) -> None:
        self.findings = Findings()
        self.module = module
        self.kept: dict[str, Value] = {}  # attributes that the module's methods set
        self.since = next(NEW)  # tensors with this number or a higher one are created in the module
        self.is_again = False  # whether this is the second round of a loop
        self._self = Value(modules=(module,))
        self._stack: list[ast.FunctionDef | ast.Lambda] = []

    def run(self, handed: Sequence[Call]) -> None:
        """Follows the forward and the other methods that `handed` calls; raises Unreadable for the forward."""
        self._run("forward", self.source("forward"), handed)
        for method in {call.method: None for call in handed if call.method != "forward"}:
            if (source := self._source_or_none(method)) is not None:
                self._run(method, source, [call for call in handed if call.method == method])

    def _run(self, method: str, source: Source, calls: Sequence[Call]) -> None:
        arguments = source.definition.args
        known: dict[str, Value] = {}
        for call in calls:
            if call.method == method:
                given = zip(_positional(arguments)[1:], call.given, strict=False)
                for name, value in (*given, *call.by_name.items()):
                    known[name] = joined([known.get(name, NOTHING), value])
        names = self._arguments(arguments, [self._self], known, is_input=method == "forward")
        self._follow(source.definition, Statements(self, source, method, names))

    def source(self, method: str) -> Source:
        """Reads a method of the module's class; raises Unreadable if it cannot be rewritten."""
        if method in vars(self.module):
            raise Unreadable(f"has a {method} that overrides its class's on the instance")
        return read(attribute(self.module, method))

    def call_method(self, method: str, values: Sequence[Value], by_name: Mapping[str, Value]) -> Value | None:
        """Follows a call of a method of the module; returns its result, None if it cannot be followed."""
        if (source := self._source_or_none(method)) is None:
            return None
        names = self._arguments(source.definition.args, [self._self, *values], by_name)
        return self._follow(source.definition, Statements(self, source, method, names))

    def _source_or_none(self, method: str) -> Source | None:
        """Reads a method; None if it cannot be read, which is recorded."""
        try:
            return self.source(method)
        except AttributeError:
            return None
        except Unreadable as error:
            is_own = method in vars(self.module)
            reason = str(error) if is_own else f"has a method {method} that {error}"
            self.findings.refused[method, (0, 0, 0, 0)] = reason
            return None

    def call_function(
        self, function: FunctionType, values: Sequence[Value], by_name: Mapping[str, Value]
    ) -> Value | None:
        """Follows a call of a function outside the module, whose additions are only reported; returns its result."""
        try:
            source = read(function, is_method=False)
        except Unreadable:
            return None
        within = f"{function.__module__}.{function.__qualname__}"
        names = self._arguments(source.definition.args, values, by_name)
        why_not = f"adds in {function.__qualname__}, a function outside the module"
        return self._follow(source.definition, Statements(self, source, within, names, why_not))

    def call_closure(self, closure: Closure, values: Sequence[Value], by_name: Mapping[str, Value]) -> Value | None:
        """Follows a call of a function defined inside a method; returns its result."""
        definition, within = closure
        names = {**within.names, **self._arguments(definition.args, values, by_name)}
        return self._follow(definition, Statements(self, within.source, within.method, names, within.why_not))

    def _follow(self, definition: ast.FunctionDef | ast.Lambda, statements: Statements) -> Value | None:
        if definition in self._stack or len(self._stack) >= _MAX_DEPTH:
            return None
        self._stack.append(definition)
        try:
            if isinstance(definition, ast.Lambda):
                return statements.value(definition.body)
            return statements.result(definition.body)
        finally:
            self._stack.pop()

    def _arguments(
        self, arguments: ast.arguments, values: Sequence[Value], by_name: Mapping[str, Value], is_input: bool = False
    ) -> dict[str, Value]:
        """Returns the values of a function's parameters: each is a new tensor made from the argument."""
        positional = _positional(arguments)
        given = {**dict(zip(positional, values, strict=False)), **by_name}
        named = [*positional, *(argument.arg for argument in arguments.kwonlyargs)]
        if arguments.vararg is not None:
            given[arguments.vararg.arg] = joined(values[len(positional) :])
        if arguments.kwarg is not None:
            given[arguments.kwarg.arg] = joined(value for name, value in by_name.items() if name not in named)
        names = {}
        for name in [*named, *(argument.arg for argument in (arguments.vararg, arguments.kwarg) if argument)]:
            known = given.get(name, by_name.get("**", NOTHING))
            own: Hashable = Input(id(self.module), name) if is_input and name in named else next(NEW)
            is_tensor = not known.modules and known.held is None
            names[name] = replace(known, paths={**known.paths, own: Path()}) if is_tensor else known
        return names


class Statements(Expressions):
    """Follows values through the statements of a method."""

    def result(self, body: Iterable[ast.stmt]) -> Value:
        """Follows the body of a function and returns its result."""
        self._returned: list[Value] = []
        self._run(body)
        return joined(self._returned)

    def _run(self, statements: Iterable[ast.stmt]) -> bool:
        """Follows statements and tells whether the end is reached."""
        return all(self._statement(statement) for statement in statements)

    def _statement(self, node: ast.stmt) -> bool:
        if isinstance(node, ast.Return):
            self._returned.append(self.value(node.value))
            return False
        if isinstance(node, ast.Raise):
            return False
        if isinstance(node, ast.Assign):
            self._assign(node.targets, node.value)
        elif isinstance(node, ast.AnnAssign):
            if node.value is not None:
                self.bind(node.target, self.value(node.value))
        elif isinstance(node, ast.AugAssign):
            self._augmented(node)
        elif isinstance(node, ast.If):
            return self._either([node.body, node.orelse], outcome(node.test, self.source, self.names), node.test)
        elif isinstance(node, (ast.For, ast.While)):
            return self._loop(node)
        elif isinstance(node, ast.With):
            for item in node.items:
                context = self.value(item.context_expr)
                if item.optional_vars is not None:
                    self.bind(item.optional_vars, context)
            return self._run(node.body)
        elif isinstance(node, ast.Try):
            before = dict(self.names)
            reached = self._run([*node.body, *node.orelse])
            for handler in node.handlers:
                self.names = _merged([before, self.names])
                reached = self._run(handler.body) or reached
            return self._run(node.finalbody) and reached
        elif isinstance(node, ast.Match):
            self.value(node.subject)
            return self._either([*(case.body for case in node.cases), []], None, node.subject)
        elif isinstance(node, ast.Delete):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    self.names.pop(target.id, None)
        elif isinstance(node, ast.FunctionDef):
            self.names[node.name] = self.closure(node)
        elif not isinstance(node, ast.ClassDef):
            for child in ast.iter_child_nodes(node):
                if isinstance(child, ast.expr):
                    self.value(child)
        return True

    def _assign(self, targets: Sequence[ast.expr], value: ast.expr) -> None:
        elements = [self.value(element) for element in value.elts] if isinstance(value, ast.Tuple) else []
        whole = joined(elements) if elements else self.value(value)
        for target in targets:
            if isinstance(target, ast.Tuple) and len(target.elts) == len(elements):
                for element, found in zip(target.elts, elements, strict=True):
                    self.bind(element, found)
            else:
                self.bind(target, whole)

    def _yield(self, node: ast.Yield | ast.YieldFrom) -> Value:
        self._returned.append(self.value(node.value))
        return NOTHING

    _yieldfrom = _yield

    def _augmented(self, node: ast.AugAssign) -> None:
        old, operand = self.value(node.target), self.value(node.value)
        if isinstance(node.op, ast.Add):
            why_not = "" if isinstance(node.target, ast.Name) else "adds in place to a slice or an attribute"
            total = self.add(node, old, operand, "+=", why_not)
        else:
            is_product = isinstance(node.op, ast.Mult) and bool(old.paths and operand.paths)
            total = made_from([old, operand], Path(isinstance(node.op, ast.MatMult), gates=is_product))
        self.bind(node.target, total)

    def _either(self, bodies: Sequence[Sequence[ast.stmt]], comes_out: bool | None, test: ast.expr) -> bool:
        if comes_out is None:
            self.value(test)
        followed = bodies if comes_out is None else [bodies[0] if comes_out else bodies[1]]
        before, ends = self.names, []
        for body in followed:
            self.names = dict(before)
            if self._run(body):
                ends.append(self.names)
        self.names = _merged(ends) if ends else before
        return bool(ends)

    def _loop(self, node: ast.For | ast.While) -> bool:
        """Follows a loop twice, for values carried from one round to the next; assumes that it runs."""
        ends: list[Mapping[str, Value]] = []
        is_again = self.reader.is_again
        for round_ in range(2):
            self.reader.is_again = is_again or round_ > 0
            if isinstance(node, ast.For):
                items = self.value(node.iter)
                item = elements(items)
                if items.modules and not item.modules:
                    break
                self.bind(node.target, item)
            else:
                self.value(node.test)
            self._run(node.body)
            ends.append(self.names)
            self.names = _merged(ends)
        self.reader.is_again = is_again
        return self._run(node.orelse)


def _positional(arguments: ast.arguments) -> list[str]:
    return [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]


def _merged(ends: Sequence[Mapping[str, Value]]) -> dict[str, Value]:
    return {name: joined(end.get(name, NOTHING) for end in ends) for name in dict.fromkeys(itertools.chain(*ends))}
