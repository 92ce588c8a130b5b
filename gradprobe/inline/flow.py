"""Which additions in a module's methods join a shortcut and a branch, read off the source; nothing is run.

Each value is described by the tensors it was made from and by how many layers (modules with parameters of their own,
and functions such as `linear` or `matmul`) lie in between. `a + b` is residual where both were made from one tensor,
one of them through no layer, or through a projection: at most half as many as the other, and no activation. Both sides
of an `if` are followed, unless attributes of the module decide it; loops are followed twice.
"""

from __future__ import annotations

import ast
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import FunctionType

from torch import nn

from gradprobe.inline.additions import Addition, Place
from gradprobe.inline.expressions import SEQUENCES, Expressions, elements
from gradprobe.inline.source import Source, Unreadable, read
from gradprobe.inline.values import NEW, NOTHING, Input, Path, Value, attribute, joined, made_from

Arguments = tuple[tuple[Value, ...], dict[str, Value]]  # by position, by name

_MAX_DEPTH = 8  # of methods that call each other


@dataclass
class Findings:
    """What the source of a module says.

    Attributes:
        additions: The residual ones, in the order of the source.
        refused: Why others, which look residual, are left alone.
        calls: What the module hands to other modules.
        methods: The methods that were followed.
    """

    additions: dict[Place, Addition] = field(default_factory=dict)
    refused: dict[Place, str] = field(default_factory=dict)
    calls: list[tuple[nn.Module, tuple[Value, ...], dict[str, Value]]] = field(default_factory=list)
    methods: tuple[str, ...] = ()


def find_additions(module: nn.Module, handed: Sequence[Arguments] = ()) -> Findings:
    """Finds the residual additions in the methods that a module's forward runs through.

    Args:
        module: Any module.
        handed: The arguments of the calls of it that are known.

    Returns:
        The additions, those refused, and what goes to other modules.

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
    found.methods = tuple(sorted(reader.methods))
    for place in found.refused:
        found.additions.pop(place, None)
    found.additions = dict(sorted(found.additions.items(), key=lambda item: item[0][1]))
    return found


class Reader:
    """Follows the values through one module's methods.

    Args:
        module: Any module.
    """

    def __init__(self, module: nn.Module) -> None:
        self.findings = Findings()
        self.module = module
        self.methods: set[str] = set()
        self.is_again = False  # in the second round of a loop
        self._stack: list[str] = []

    def run(self, handed: Sequence[Arguments]) -> Value:
        """Follows the forward.

        Args:
            handed: The arguments of the calls of it that are known.

        Returns:
            What it gives back.

        Raises:
            Unreadable: The forward cannot be rewritten.
        """
        names = _positional(self.source("forward"))
        given: dict[str, Value] = {}
        for values, by_name in handed:
            for name, value in (*zip(names, values, strict=False), *by_name.items()):
                given[name] = joined([given.get(name, NOTHING), value])
        return self._follow("forward", given)

    def source(self, method: str) -> Source:
        """Reads a method of the module's class.

        Args:
            method: Its name.

        Returns:
            The source.

        Raises:
            Unreadable: It cannot be rewritten.
        """
        if method in vars(self.module):
            raise Unreadable(f"has a {method} of its own, other than its class's")
        return read(attribute(self.module, method))

    def call_method(self, method: str, values: Sequence[Value], by_name: Mapping[str, Value]) -> Value | None:
        """Follows a method that another one calls.

        Args:
            method: Its name.
            values: Arguments by position.
            by_name: Arguments by name.

        Returns:
            What it gives back; None where it cannot be followed.
        """
        try:
            if method in vars(nn.Module) or method in self._stack or len(self._stack) >= _MAX_DEPTH:
                return None
            given = dict(zip(_positional(self.source(method)), values, strict=False))
            return self._follow(method, {**given, **by_name})
        except (Unreadable, AttributeError):
            return None

    def call_function(
        self, function: FunctionType, values: Sequence[Value], by_name: Mapping[str, Value]
    ) -> Value | None:
        """Follows a function outside of the module: what it adds cannot be exchanged, but can be reported.

        Args:
            function: Any function.
            values: Arguments by position.
            by_name: Arguments by name.

        Returns:
            What it gives back; None where it cannot be followed.
        """
        try:
            source = read(function, is_method=False)
        except Unreadable:
            return None
        within = f"{function.__module__}.{function.__qualname__}"
        if within in self._stack or len(self._stack) >= _MAX_DEPTH:
            return None
        found, self.findings = self.findings, Findings()
        self._stack.append(within)
        try:
            given = {**dict(zip(_positional(source), values, strict=False)), **by_name}
            result = Statements(self, source, within, self._arguments(source, within, given)).result()
            inner = self.findings
        finally:
            self.findings = found
            self._stack.pop()
        for place in inner.additions:
            found.refused[place] = f"adds in {function.__qualname__}, a function outside of it"
        found.refused.update({place: reason for place, reason in inner.refused.items() if place[0] != within})
        found.calls += inner.calls
        return result

    def _follow(self, method: str, given: Mapping[str, Value]) -> Value:
        source = self.source(method)
        self.methods.add(method)
        names = self._arguments(source, method, given)
        self._stack.append(method)
        try:
            return Statements(self, source, method, names).result()
        finally:
            self._stack.pop()

    def _arguments(self, source: Source, method: str, given: Mapping[str, Value]) -> dict[str, Value]:
        """Describes arguments: each is a tensor of its own, made from what is given."""
        arguments = source.definition.args
        every = [*arguments.posonlyargs, *arguments.args][bool(source.self_name) :]
        names = {}
        for argument in (*every, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg):
            if argument is not None:
                known = given.get(argument.arg, NOTHING)
                own: Hashable = Input(id(self.module), argument.arg) if method == "forward" else next(NEW)
                names[argument.arg] = Value({**known.paths, own: Path()}, known.modules, sums=known.sums)
        return names


class Statements(Expressions):
    """Follows values through the statements of a method."""

    def result(self) -> Value:
        """Follows the whole body.

        Returns:
            What the method gives back.
        """
        self._returned: list[Value] = []
        self._run(self.source.definition.body)
        return joined(self._returned)

    def _run(self, statements: Iterable[ast.stmt]) -> bool:
        """Follows statements; tells whether the end is reached."""
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
            return self._either([node.body, node.orelse], self.outcome(node.test), node.test)
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
        elif not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
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

    def _augmented(self, node: ast.AugAssign) -> None:
        old, operand = self.value(node.target), self.value(node.value)
        if isinstance(node.op, ast.Add) and isinstance(node.value, SEQUENCES):
            total = joined([old, operand])
        elif isinstance(node.op, ast.Add) and isinstance(node.target, ast.Name):
            total = self.add(node, old, operand, "+=")
        else:
            total = made_from([old, operand])
        self.bind(node.target, total)

    def _either(self, bodies: Sequence[Sequence[ast.stmt]], outcome: bool | None, test: ast.expr) -> bool:
        if outcome is None:
            self.value(test)
        followed = bodies if outcome is None else [bodies[0] if outcome else bodies[1]]
        before, ends = self.names, []
        for body in followed:
            self.names = dict(before)
            if self._run(body):
                ends.append(self.names)
        self.names = _merged(ends) if ends else before
        return bool(ends)

    def _loop(self, node: ast.For | ast.While) -> bool:
        """Follows a loop twice, for what a round keeps for the next one; each is taken to run."""
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


def _positional(source: Source) -> list[str]:
    arguments = source.definition.args
    return [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)][bool(source.self_name) :]


def _merged(ends: Sequence[Mapping[str, Value]]) -> dict[str, Value]:
    return {name: joined(end.get(name, NOTHING) for end in ends) for name in {name for end in ends for name in end}}
