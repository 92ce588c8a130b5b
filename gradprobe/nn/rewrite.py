"""Recompiles a method's source with some of its additions replaced by module calls.

Everything else stays as it was: control flow, defaults, closures, decorators, line numbers in tracebacks. A method is
left alone unless its source, compiled unchanged, yields exactly the code that runs now.
"""

from __future__ import annotations
import __future__

import ast
import builtins
import copy
import functools
import inspect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import CellType, CodeType, FunctionType
from typing import NamedTuple

from gradprobe.errors import GradprobeError

Span = tuple[int, int, int, int]  # first line, first column, last line, last column
CodeName = tuple[str, int, str]  # file, line and name of a function; outlives a pickle


class Place(NamedTuple):
    """The place of an addition in the source.

    Attributes:
        method: The method of the module that adds.
        spans: Position of the addition in it; or of the call of a function outside the module, followed by the
            position of the addition, or the next call, in that function.
        functions: The functions outside the module, one less than positions.
    """

    method: str
    spans: tuple[Span, ...]
    functions: tuple[CodeName, ...] = ()


_FEATURES = functools.reduce(
    int.__or__, (getattr(__future__, name).compiler_flag for name in __future__.all_feature_names), 0
)


_BLOCK = "__gradprobe_block__"  # the variable that holds the module, in copies of functions outside it


class Unreadable(GradprobeError):
    """A method cannot be rewritten; the message is the predicate of a sentence about its module ("has no ...")."""


@dataclass(frozen=True)
class Source:
    """The source of a method.

    Attributes:
        function: The function with the body.
        wrappers: The functions that decorators wrapped around it, innermost first.
        tree: The statements of its file that affect how it compiles: imports, and the statement that contains it.
        definition: The method's definition in `tree`.
        self_name: The method's name for its module, usually "self"; empty for a function.
    """

    function: FunctionType
    wrappers: tuple[FunctionType, ...]
    tree: ast.Module
    definition: ast.FunctionDef
    self_name: str

    def outside(self, name: str) -> object:
        """Looks up a name that the function uses but does not bind.

        Args:
            name: The name as written in the function.

        Returns:
            The object; None if there is none or the function binds the name itself.

        Example:
            >>> read(span_of, is_method=False).outside("ast") is ast
            True
        """
        code = self.function.__code__
        if name in code.co_freevars:
            return _content((self.function.__closure__ or ())[code.co_freevars.index(name)])
        if name in code.co_varnames or name in code.co_cellvars:
            return None
        return self.function.__globals__.get(name, getattr(builtins, name, None))


@dataclass(frozen=True)
class Replacement:
    """The module call that replaces an addition.

    Attributes:
        child: Name of the called module.
        shortcut_first: Whether the left operand is the shortcut; None at the call of a function that adds: its copy by
            the module, see `InlineAdd.copy_of`, is called instead.
    """

    child: str
    shortcut_first: bool | None


def span_of(node: ast.expr | ast.stmt) -> Span:
    """Returns the position of a node in its file.

    Args:
        node: A node of a `Source`'s tree.

    Returns:
        First line and column, last line and column.

    Example:
        >>> span_of(ast.parse("a + b").body[0])
        (1, 0, 1, 5)
    """
    return node.lineno, node.col_offset, node.end_lineno or node.lineno, node.end_col_offset or node.col_offset


def read(function: object, is_method: bool = True) -> Source:
    """Reads the source of a method, or of a function.

    Args:
        function: The function as stored in the class, decorators included.
        is_method: Whether its first parameter is a module.

    Returns:
        The source.

    Raises:
        Unreadable: There is no source, or it is not the source of the code that runs.

    Example:
        >>> import torch
        >>> read(torch.nn.TransformerEncoderLayer.forward).self_name
        'self'
    """
    wrappers: list[FunctionType] = []
    while isinstance(function, FunctionType) and isinstance(vars(function).get("__wrapped__"), FunctionType):
        wrappers.insert(0, function)
        function = vars(function)["__wrapped__"]
    if not isinstance(function, FunctionType):
        raise Unreadable(f"is a {type(function).__name__}, not a Python function")
    for wrapper, inner in zip(wrappers, [function, *wrappers], strict=False):
        if len(_cells_with(wrapper, inner)) != 1:
            raise Unreadable(f"is wrapped by a decorator that does not show what it calls ({wrapper.__code__.co_name})")
    tree, definition, self_name = _read(function, function.__code__, is_method)
    return Source(function, tuple(wrappers), tree, definition, self_name)


@functools.lru_cache(maxsize=4096)  # keyed by the code too: autoreloaders replace a function's code in place
def _read(function: FunctionType, code: CodeType, is_method: bool) -> tuple[ast.Module, ast.FunctionDef, str]:
    try:
        lines, _ = inspect.findsource(function)
        statements = _statements("".join(lines))
    except (OSError, SyntaxError, TypeError, ValueError) as error:
        raise Unreadable("has no readable source") from error
    definition, within = _find(statements, code)
    positional = [*definition.args.posonlyargs, *definition.args.args]
    if is_method and not positional:
        raise Unreadable("has no named parameter for its module")
    self_name = positional[0].arg if is_method else ""
    for node in ast.walk(definition):
        is_bound = isinstance(node, ast.Name) and node.id == self_name and not isinstance(node.ctx, ast.Load)
        is_inner = isinstance(node, ast.arg) and node.arg == self_name and node is not positional[0]
        if is_method and (is_bound or is_inner):
            raise Unreadable(f"rebinds {self_name}")
    tree = ast.Module([*(node for node in statements if node is not within and _imports(node)), within], [])
    if not _are_same(_compiled(tree, code), code):
        raise Unreadable("runs code that differs from its source")
    return tree, definition, self_name


def name_of(code: CodeType) -> CodeName:
    """Returns a name by which a function is found again.

    Example:
        >>> name_of(span_of.__code__)[2]
        'span_of'
    """
    return code.co_filename, code.co_firstlineno, code.co_name


@functools.lru_cache(maxsize=256)
def bare(function: FunctionType) -> FunctionType:
    """Copies a function without its `__wrapped__` attribute, so that `read` stops at it.

    Example:
        >>> bare(span_of) is span_of, bare(span_of).__code__ is span_of.__code__
        (False, True)
    """
    return _alike(function, function.__code__, function.__closure__ or ())


def rewritten(source: Source, replacements: Mapping[Span, Replacement], block: object = None) -> FunctionType:
    """Builds a copy of a method in which module calls replace some additions.

    Args:
        source: The method, or a function outside the module.
        replacements: Position of each addition to its replacement.
        block: The module whose children replace additions in a function.

    Returns:
        A function with the same signature and decorators.

    Example:
        >>> from torch import nn
        >>> layer = nn.TransformerEncoderLayer
        >>> rewritten(read(layer.forward), {}).__code__.co_code == layer.forward.__code__.co_code
        True
    """
    inner = source.function
    code = _rewritten_code(source, inner.__code__, tuple(replacements.items()))
    cells = dict(zip(inner.__code__.co_freevars, inner.__closure__ or (), strict=True)) | {_BLOCK: CellType(block)}
    made = _alike(inner, code, tuple(cells[name] for name in code.co_freevars))
    before = inner
    for wrapper in source.wrappers:
        (name,) = _cells_with(wrapper, before)
        closure = tuple(
            CellType(made) if free == name else cell
            for free, cell in zip(wrapper.__code__.co_freevars, wrapper.__closure__ or (), strict=True)
        )
        outer = _alike(wrapper, wrapper.__code__, closure)
        outer.__wrapped__ = made  # type: ignore[attr-defined]
        made, before = outer, wrapper
    return made


@functools.lru_cache(maxsize=1024)
def _rewritten_code(source: Source, code: CodeType, replacements: tuple[tuple[Span, Replacement], ...]) -> CodeType:
    """Compiles one code object for all modules with the same replacements, so that torch.compile sees one function."""
    copies: dict[int, ast.AST] = {}
    tree = copy.deepcopy(source.tree, copies)
    _Replacer(source.self_name or _BLOCK, dict(replacements)).generic_visit(copies[id(source.definition)])
    if not source.self_name:
        tree.body[-1] = _inside(tree.body[-1])
    return _compiled(tree, code)


def _inside(statement: ast.stmt) -> ast.stmt:
    """Puts a definition into a function with a variable that holds the block; its name stays global."""
    if not isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
        raise Unreadable("is not defined at the top of its file")
    outer = ast.parse(f"def outer({_BLOCK}):\n    global {statement.name}").body[0]
    assert isinstance(outer, ast.FunctionDef)
    outer.name = "<block>"
    outer.body.append(statement)
    return ast.copy_location(outer, statement)


class _Replacer(ast.NodeTransformer):
    """Replaces additions by module calls that evaluate the operands in the original order."""

    def __init__(self, self_name: str, replacements: Mapping[Span, Replacement]) -> None:
        self._self_name = self_name
        self._replacements = replacements

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        replacement = self._replacements.get(span_of(node))
        self.generic_visit(node)
        return node if replacement is None else self._call(replacement, node, node.left, node.right)

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.AST:
        replacement = self._replacements.get(span_of(node))
        self.generic_visit(node)
        if replacement is None or not isinstance(node.target, ast.Name):
            return node
        left = ast.copy_location(ast.Name(node.target.id, ast.Load()), node.target)
        return ast.copy_location(ast.Assign([node.target], self._call(replacement, node, left, node.value)), node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        replacement = self._replacements.get(span_of(node))
        self.generic_visit(node)
        if replacement is None:
            return node
        if replacement.shortcut_first is None:
            copy_of = ast.Attribute(self._module(replacement), "copy_of", ast.Load())
            node.func = ast.Call(copy_of, [node.func, ast.Name(self._self_name, ast.Load())], [])
            ast.copy_location(node.func, node)
            return ast.fix_missing_locations(node)
        operands = [node.func.value, *node.args] if isinstance(node.func, ast.Attribute) else node.args
        left, right = operands[-2:]
        return self._call(replacement, node, left, right)

    def _call(self, replacement: Replacement, at: ast.expr | ast.stmt, left: ast.expr, right: ast.expr) -> ast.Call:
        names = ("x", "f") if replacement.shortcut_first else ("f", "x")
        keywords = [ast.keyword(name, operand) for name, operand in zip(names, (left, right), strict=True)]
        return ast.fix_missing_locations(ast.copy_location(ast.Call(self._module(replacement), [], keywords), at))

    def _module(self, replacement: Replacement) -> ast.expr:
        return ast.Attribute(ast.Name(self._self_name, ast.Load()), replacement.child, ast.Load())


@functools.lru_cache(maxsize=16)
def _statements(text: str) -> tuple[ast.stmt, ...]:
    return tuple(ast.parse(text).body)


def _find(statements: Sequence[ast.stmt], code: CodeType) -> tuple[ast.FunctionDef, ast.stmt]:
    """Finds the definition that a code object was compiled from, and the top-level statement that contains it."""
    for statement in statements:
        for node in ast.walk(statement):
            if isinstance(node, ast.FunctionDef) and node.name == code.co_name:
                first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                if first == code.co_firstlineno:
                    return node, statement
    raise Unreadable("is not a plain function in its source")


def _imports(statement: ast.stmt) -> bool:
    """Returns whether a statement imports names at module level: method calls on imported names compile differently."""
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return False
    return any(isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.walk(statement))


def _compiled(tree: ast.Module, before: CodeType) -> CodeType:
    """Compiles a source's tree and returns the code of one function in it."""
    code = compile(tree, before.co_filename, "exec", flags=before.co_flags & _FEATURES, dont_inherit=True)
    for inner in codes_in(code):
        if (inner.co_name, inner.co_firstlineno) == (before.co_name, before.co_firstlineno):
            return inner
    raise Unreadable("is not a plain function in its source")


def codes_in(code: CodeType) -> Iterator[CodeType]:
    """Yields the code objects of the functions that a function defines, at any depth."""
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from codes_in(constant)


def _are_same(a: CodeType, b: CodeType) -> bool:
    """Returns whether two code objects do the same, at whatever position in the file."""
    attributes = ("co_code", "co_names", "co_varnames", "co_freevars", "co_cellvars", "co_flags")
    return all(getattr(a, name) == getattr(b, name) for name in attributes) and all(
        _are_same(x, y) if isinstance(x, CodeType) and isinstance(y, CodeType) else type(x) is type(y) and x == y
        for x, y in itertools.zip_longest(a.co_consts, b.co_consts)
    )


def _cells_with(wrapper: FunctionType, inner: FunctionType) -> list[str]:
    """Returns the free variables of a wrapper that hold the function it wraps."""
    held = zip(wrapper.__code__.co_freevars, wrapper.__closure__ or (), strict=True)
    return [name for name, cell in held if _content(cell) is inner]


def _content(cell: CellType) -> object:
    try:
        content: object = cell.cell_contents
    except ValueError:  # still empty
        return None
    return content


def _alike(function: FunctionType, code: CodeType, closure: tuple[CellType, ...]) -> FunctionType:
    """Copies a function with different code and closure."""
    made = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, closure)
    functools.update_wrapper(made, function)
    del made.__wrapped__  # type: ignore[attr-defined]
    made.__kwdefaults__ = None if function.__kwdefaults__ is None else dict(function.__kwdefaults__)
    return made
