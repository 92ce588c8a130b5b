"""Finds the residual additions of a model in one real forward, by what autograd's graph knows of their operands."""

from __future__ import annotations

import ast
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from types import CodeType, FrameType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree, checkpoint

from gradprobe.errors import ArgumentError
from gradprobe.nn.addition_site import method_of, node_at, qualname, source_of, written_in
from gradprobe.nn.graph_paths import GraphPaths, graph_age
from gradprobe.nn.kept_state import as_input, mute_hooks, unchanged
from gradprobe.nn.rewrite import CodeName, Place, Source, Span, Unreadable, codes_in, name_of, span_of
from gradprobe.nn.shortcuts import Addition, Origins, judge

_ADDING = {torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__}
_FUSED = {torch.addcmul, torch.addcdiv, Tensor.addcmul, Tensor.addcmul_, Tensor.addcdiv, Tensor.addcdiv_}
_MOST_JUDGED = 8  # executions of one place: each follows the graph back to the inputs, which grows with every round
_SETTING_FLAGS = {Tensor.requires_grad_, Tensor.requires_grad.__set__}  # type: ignore[attr-defined]


@dataclass
class Traced:
    """The additions of a forward.

    Attributes:
        additions: The residual ones that can be replaced, by module and place in its source.
        refused: Why others cannot be replaced, by the module that ran.
        walked: Modules over whose children a method iterates, and which method.
    """

    additions: dict[nn.Module, dict[Place, Addition]] = field(default_factory=dict)
    refused: dict[nn.Module, list[str]] = field(default_factory=dict)
    walked: dict[nn.Module, str] = field(default_factory=dict)


def trace(
    model: nn.Module, example: Sequence[object], keywords: Mapping[str, object], *, is_inside: bool = False
) -> Traced:
    """Runs a forward on copies of the parameters, in training a second one in eval, and finds the residual additions.

    Gradients are enabled, also where the forward turns them off, and every floating-point tensor counts as one that
    needs a gradient, so that frozen layers and the first block on raw input are seen. The model, the attributes of its
    modules, the arguments and the random state are afterwards as before.

    Args:
        model: Any module.
        example: Arguments of its forward.
        keywords: Keyword arguments of its forward.
        is_inside: A forward of the model has begun with these arguments: forward hooks run in that one alone.

    Returns:
        The additions.

    Raises:
        ArgumentError: The forward fails with these arguments.

    Example:
        >>> layer = nn.TransformerEncoderLayer(8, 2)
        >>> [len(places) for places in trace(layer, [torch.zeros(3, 1, 8)], {}).additions.values()]
        [2]
    """
    dynamo = sys.modules.get("torch._dynamo")  # if it is not loaded, no part of the model is compiled
    eager = nullcontext() if dynamo is None else dynamo.set_stance("force_eager")
    # an outer checkpoint would count the tensors that this forward saves, and miss them when it recomputes
    own_tensors = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
    with torch.inference_mode(False), eager, own_tensors, _without_reentrant_checkpoints():
        with suppress(Exception):
            return _trace(model, example, keywords, is_inside, keeps_no_grad=False)
        try:  # a forward may write to parameters where it turns gradients off
            return _trace(model, example, keywords, is_inside, keeps_no_grad=True)
        except Exception as error:
            raise ArgumentError(
                f"example: needed arguments that the model's forward takes; it raised {type(error).__name__}: {error}"
            ) from error


def _trace(
    model: nn.Module, example: Sequence[object], keywords: Mapping[str, object], is_inside: bool, keeps_no_grad: bool
) -> Traced:
    # copies: a forward may write to parameters, as that of a model with a teacher does
    parameters = {
        name: one.detach().clone().requires_grad_(one.is_floating_point()) for name, one in model.named_parameters()
    }
    finder = _Finder(model, parameters.values(), keeps_no_grad)
    with unchanged(model), torch.enable_grad(), finder.noting_calls(), finder:
        if is_inside:
            mute_hooks(model)
        _run(model, parameters, example, keywords)
        if any(module.training for module in model.modules()):
            for module in model.modules():
                vars(module)["training"] = False
            finder.n_judged.clear()
            with suppress(Exception):  # what training leaves out at random; not every model runs like that
                _run(model, parameters, example, keywords)
    return finder.result()


def _run(
    model: nn.Module, parameters: Mapping[str, Tensor], example: Sequence[object], keywords: Mapping[str, object]
) -> None:
    buffers = {name: one.detach().clone() for name, one in model.named_buffers()}
    arguments, by_name = _pytree.tree_map(as_input, (tuple(example), dict(keywords)))
    torch.func.functional_call(model, {**parameters, **buffers}, arguments, by_name)


_Key: TypeAlias = tuple[nn.Module, "Place | str"]  # the place, or why the addition there cannot be replaced


@dataclass
class _Sum:
    """The executions of one addition.

    Attributes:
        verdict: The addition, or why it cannot be decided.
        inner: Other sums that the branch consists of, with no layer in between.
    """

    verdict: Addition | str
    inner: set[_Key] = field(default_factory=set)

    def join(self, verdict: Addition | str) -> None:
        """Takes one more execution."""
        before = self.verdict
        if isinstance(before, Addition) and isinstance(verdict, Addition):
            if before.shortcut_first == verdict.shortcut_first:
                verdict = replace(before, is_projected=before.is_projected and verdict.is_projected)
            else:
                verdict = "either operand may be the shortcut"
        self.verdict = before if isinstance(before, str) else verdict


class _Children(dict[str, Any]):
    """The children of a module, which tell when they are iterated over."""

    def __init__(self, children: Mapping[str, Any], tell: Callable[[], None]) -> None:
        super().__init__(children)
        self._tell = tell

    def __iter__(self) -> Iterator[str]:
        self._tell()
        return super().__iter__()

    def values(self) -> Any:
        self._tell()
        return super().values()

    def items(self) -> Any:
        self._tell()
        return super().items()


class _Finder(TorchFunctionMode):
    """Judges every addition that runs while it is active.

    Args:
        model: The model.
        parameters: What stands for its parameters.
        keeps_no_grad: Gradients are off where the forward turns them off.

    Attributes:
        n_judged: How often each place has been judged.
    """

    def __init__(self, model: nn.Module, parameters: Any, keeps_no_grad: bool) -> None:
        super().__init__()
        self._keeps_no_grad = keeps_no_grad
        self._modules = {id(module): module for module in model.modules()}
        self._graph = GraphPaths(parameters)
        self._running: list[tuple[nn.Module, int]] = [(model, 0)]  # and how old what it is given is
        self._thread = threading.get_ident()
        self._sums: dict[_Key, _Sum] = {}
        self._made: dict[Node, _Key] = {}  # by which addition
        self._outputs: dict[Node, nn.Module] = {}  # of which module, the innermost one with parameters
        self._children: dict[nn.Module, dict[int, str]] = {}  # see _children_of
        self._has_parameters = {id(module): any(True for _ in module.parameters()) for module in model.modules()}
        self._walks: dict[nn.Module, dict[CodeType, str]] = {}  # over the children of a module, by which code
        self._walked: dict[nn.Module, str] = {}  # those that run the children
        self._seen: dict[tuple[object, ...], tuple[_Key, str]] = {}  # by call of the module and place in it
        self._at: dict[tuple[object, ...], _Key] = {}  # by module and place in it
        self.n_judged: Counter[tuple[object, ...]] = Counter()

    @contextmanager
    def noting_calls(self) -> Iterator[None]:
        """Notes which modules run, and which methods iterate over the children of one."""

        def enter(module: nn.Module, _: object) -> None:
            if threading.get_ident() == self._thread and id(module) in self._modules:
                self._note_child(module)
                self._running.append((module, graph_age()))

        def leave(module: nn.Module, _: object, output: object) -> None:
            if threading.get_ident() == self._thread and self._running[-1][0] is module:
                self._running.pop()
                self._note_output(module, output)

        for module in self._modules.values():
            vars(module)["_modules"] = _Children(vars(module)["_modules"], partial(self._note_walk, module))
        handles = register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Runs an operation; judges it first if it adds."""
        kwargs = kwargs or {}
        if func in _SETTING_FLAGS and not args[0].is_leaf:
            return args[0]  # a model may ask for the gradient of its input, which is a leaf outside this forward
        if func is torch._C._set_grad_enabled and not self._keeps_no_grad:
            return None
        judged = None
        if func in _ADDING or func in _FUSED:
            operands = [*args, *kwargs.values()]
            if len(operands) >= 2 and all(_may_be_stream(one) for one in operands[:2]):
                judged = self._judge(sys._getframe(1), func, operands, not kwargs)
        result = func(*args, **kwargs)
        if judged is not None and isinstance(result, Tensor) and result.grad_fn is not None:
            self._made[result.grad_fn] = judged
        return result

    def result(self) -> Traced:
        """Returns what was found."""
        found = Traced(walked=self._walked)
        inner = set().union(*(one.inner for one in self._sums.values()))
        for key, one in self._sums.items():
            module, place = key
            if isinstance(place, str):
                if isinstance(one.verdict, Addition):
                    found.refused.setdefault(module, []).append(place)
            elif isinstance(one.verdict, str):
                if key not in inner:
                    found.refused.setdefault(module, []).append(one.verdict)
            elif key not in inner or not one.verdict.is_projected:
                found.additions.setdefault(module, {})[place] = one.verdict
        for module, places in found.additions.items():
            found.additions[module] = dict(sorted(places.items(), key=lambda item: item[0].spans))
        return found

    def _note_output(self, module: nn.Module, output: object) -> None:
        for leaf in _pytree.tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.grad_fn is not None:
                before = self._outputs.get(leaf.grad_fn)
                if before is None or (self._has_parameters[id(module)] and not self._has_parameters[id(before)]):
                    self._outputs[leaf.grad_fn] = module

    def _note_walk(self, module: nn.Module) -> None:
        if threading.get_ident() != self._thread or len(self._running) < 2:
            return
        frame: FrameType | None = sys._getframe(2)
        through = "children"
        while frame is not None and frame.f_globals.get("__name__") == nn.Module.__module__:
            through = frame.f_code.co_name
            frame = frame.f_back
        if through not in ("children", "named_children"):
            return  # it looks for parameters or modules of a kind
        by = None if frame is None else self._owner(frame)
        if frame is not None and by is not None:
            method = frame.f_code.co_name
            where = f"iterates over its children in {method}"
            if by is not module:
                where = f"has its children iterated over in {method} of {type(by).__name__}"
            self._walks.setdefault(module, {})[frame.f_code] = f"{where}, which would run one more child too"

    def _note_child(self, module: nn.Module) -> None:
        """Notes whether a module is run by a method that has iterated over it and its siblings."""
        for parent, walks in self._walks.items():
            if parent not in self._walked and module in dict.values(vars(parent)["_modules"]):
                frame: FrameType | None = sys._getframe(2)
                while frame is not None and frame.f_code not in walks:
                    frame = frame.f_back
                if frame is not None:
                    self._walked[parent] = walks[frame.f_code]

    def _owner(self, frame: FrameType) -> nn.Module | None:
        """Returns the module of the model whose method a frame runs."""
        code = frame.f_code
        owner = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        return owner if isinstance(owner, nn.Module) and id(owner) in self._modules else None

    def _judge(
        self, frame: FrameType, func: Callable[..., Any], operands: Sequence[Tensor], is_plain: bool
    ) -> _Key | None:
        """Judges one addition; returns where it is if it is residual."""
        left, right = (operands[1], operands[0]) if func is Tensor.__radd__ else operands[:2]
        if func in _FUSED:
            right = operands[1] * operands[2] if isinstance(operands[2], Tensor) else operands[1]
        if left.shape != right.shape:
            return None
        running, since = self._running[-1]
        where = running, *_calls_until(frame)
        execution = since, *where
        is_again = execution in self._seen
        if is_again and self._seen[execution][0] not in self._sums:
            return None
        self.n_judged[where] += 1
        if self.n_judged[where] > _MOST_JUDGED:
            key = self._at.get(where)
            return key if key in self._sums else None
        of_left, of_right = self._graph.origins(left, since), self._graph.origins(right, since)
        verdict = judge(of_left, of_right)
        if verdict is None:  # a branch may change some of the rows and pass the others on, as XCiT's class block does
            pairs = [(of_left, one) for one in self._graph.pieces(right, since)]
            pairs += [(one, of_right) for one in self._graph.pieces(left, since)]
            verdict = next((found for pair in pairs if isinstance(found := judge(*pair), Addition)), None)
        if isinstance(verdict, Addition) and verdict.is_projected and left.dim() < 2:
            return None  # numbers, such as the logits of an attention over a graph
        if not is_again:
            self._seen[execution] = self._key(frame, running, func.__name__, is_plain)
        key, written = self._seen[execution]
        self._at[where] = key
        if is_again and verdict is None:
            self._sums.pop(key, None)  # a recurrent cell: what it adds to nothing in the first round is no branch
        if verdict is None:
            return None
        if isinstance(verdict, Addition):
            if is_again and verdict.is_projected:
                return None  # it adds results of the round before: that is no projection
            shortcut, branch = (of_left, of_right) if verdict.shortcut_first else (of_right, of_left)
            last = self._last_in(branch, shortcut, key[0]) if key not in self._sums else ""
            verdict = replace(verdict, written=written, branch=last)
        total = self._sums.setdefault(key, _Sum(verdict))
        total.join(verdict)
        if isinstance(verdict, Addition):
            parts = [node for node, path in branch.items() if node in self._made and path.layers == 0]
            total.inner |= {self._made[node] for node in parts if isinstance(node, Node)} - {key}
        return key

    def _key(self, frame: FrameType, running: nn.Module, name: str, is_plain: bool) -> tuple[_Key, str]:
        """Returns where an addition is, or why it cannot be replaced; and how it is written."""
        try:
            module, method, calls, source = self._located(frame)
            node = node_at(source, frame)
            written = written_in(node, source) if is_plain else ""
            if not written:
                is_sum = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "sum"
                raise Unreadable(f"adds by {'sum' if is_sum else name} in a form that cannot be replaced")
        except Unreadable as error:
            return (running, str(error)), ""
        spans = (*(span for span, _ in calls), span_of(node))
        return (module, Place(method, spans, tuple(called for _, called in calls))), written

    def _located(self, frame: FrameType) -> tuple[nn.Module, str, list[tuple[Span, CodeName]], Source]:
        """Finds the module that adds, its method, the calls that lead from there out of the module, and the source."""
        try:
            module, method, source = self._method(frame)
        except Unreadable as error:
            with suppress(Unreadable):
                return self._called(frame)
            raise error
        return module, method, [], source

    def _called(self, frame: FrameType) -> tuple[nn.Module, str, list[tuple[Span, CodeName]], Source]:
        """Does what `_located` does for a frame that runs a function outside the module."""
        source = source_of(frame)
        calls: list[tuple[Span, CodeName]] = []
        while True:
            called, caller = name_of(frame.f_code), frame.f_back
            if caller is None or caller.f_globals.get("__name__") == nn.Module.__module__:
                raise Unreadable("is not called by a module")
            frame, module = caller, None
            try:
                module, method, outer = self._method(frame)
            except Unreadable:
                outer = source_of(frame)
            call = node_at(outer, frame)
            if not isinstance(call, ast.Call):
                raise Unreadable("is not called by its name")
            calls.insert(0, (span_of(call), called))
            if module is not None:
                return module, method, calls, source

    def _method(self, frame: FrameType) -> tuple[nn.Module, str, Source]:
        """Finds the module whose method a frame runs, and the method."""
        outer: FrameType | None = frame
        while outer is not None and (owner := self._owner(outer)) is None:
            outer = outer.f_back
        if outer is None or owner is None or not (frame is outer or frame.f_code in codes_in(outer.f_code)):
            raise Unreadable(f"adds in {qualname(frame.f_code)}, a function outside the module")
        return owner, *method_of(owner, outer.f_code)

    def _last_in(self, branch: Origins, shortcut: Origins, owner: nn.Module) -> str:
        """Names the child of a module that ran last in a branch: one with parameters, if there is one."""
        children = self._children_of(owner)
        ran = [
            (self._has_parameters[id(module)], node._sequence_nr(), children[id(module)])
            for node in branch
            if isinstance(node, Node) and node not in shortcut and (module := self._outputs.get(node)) is not None
            if id(module) in children
        ]
        return max(ran, default=(False, 0, ""))[2]

    def _children_of(self, owner: nn.Module) -> dict[int, str]:
        """Returns for each module within another the child that contains it, the last by name of several."""
        if owner not in self._children:
            named = sorted(owner.named_children())
            self._children[owner] = {id(inner): name for name, child in named for inner in child.modules()}
        return self._children[owner]


@contextmanager
def _without_reentrant_checkpoints() -> Iterator[None]:
    """Runs what is checkpointed as if it were not: a reentrant checkpoint turns gradients off where no mode sees it."""
    kind: Any = checkpoint.CheckpointFunction
    thread, before, checkpointed = threading.get_ident(), vars(kind).get("apply"), kind.apply

    def apply(function: Callable[..., Any], keeps_random_state: bool, *args: Any) -> Any:
        if threading.get_ident() != thread:
            return checkpointed(function, keeps_random_state, *args)
        return function(*args)

    kind.apply = staticmethod(apply)
    try:
        yield
    finally:
        if before is None:
            del kind.apply
        else:
            kind.apply = before


def _calls_until(frame: FrameType | None) -> Iterator[tuple[CodeType, int]]:
    """Yields where a frame is, and its callers up to the call of the running module."""
    while frame is not None and frame.f_globals.get("__name__") != nn.Module.__module__:
        yield frame.f_code, frame.f_lasti
        frame = frame.f_back


def _may_be_stream(operand: object) -> bool:
    return isinstance(operand, Tensor) and operand.is_floating_point() and operand.dim() > 0
