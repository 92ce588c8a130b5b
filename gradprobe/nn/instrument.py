"""Residual junctions for models that add inline: `out += identity`, `x = x + self.attn(x)`.

The additions are found in the source of the model's methods and exchanged there for calls of a new child module of the
block, which adds as before: same modules, classes, parameters, hooks, control flow and numbers. Only `forward`, or the
method that adds, is overridden on the instances. What was found depends on the modules that the model has then: replace
modules first, instrument afterwards, compile last. Where one place adds several times in a step, as in a loop, its
junction has the sum of them. A deep copy is instrumented too; a pickle of the model is plain, since it holds the
class's own methods, and so is what `torch.jit.script` makes of it. Shallow copies by `copy.copy` and the replicas of
`nn.DataParallel` would run the original: make deep copies, and wrap in `DistributedDataParallel`.
"""

from __future__ import annotations

import itertools
import operator
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MethodType, TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from gradprobe.errors import ArgumentError, GradprobeWarning
from gradprobe.nn.inline.expressions import Call
from gradprobe.nn.inline.flow import Findings, find_additions
from gradprobe.nn.inline.values import attribute, is_chain, is_container, is_torchs_layer
from gradprobe.nn.residual import ResidualAdd
from gradprobe.nn.rewrite import Exchange, Span, Unreadable, read, rewritten

# How a model may write an addition, and what runs where no probe observes it. Not each operand need be a tensor.
_WRITTEN: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add,
    "+=": operator.iadd,
    "add": lambda left, right: left.add(right),
    "add_": lambda left, right: left.add_(right),
    "torch.add": torch.add,
}


class InlineAdd(ResidualAdd):
    """An addition that a model writes inline, as a module; made by `instrument`.

    Args:
        shortcut_first: Whether the shortcut is the left operand.
        written: How the model writes it: "+", "+=", "add", "add_" or "torch.add".

    Example:
        >>> InlineAdd(shortcut_first=True, written="+")(torch.ones(2), torch.ones(1))
        tensor([2., 2.])
    """

    def __init__(self, shortcut_first: bool, written: str) -> None:
        super().__init__()
        self.shortcut_first = shortcut_first
        self.written = written

    @torch.jit.unused  # a model that is scripted takes its methods from the class, without junctions
    def forward(self, x: Tensor, f: Tensor) -> Tensor:
        """Adds as the model did: by torch itself, unless a probe taps the junction.

        Args:
            x: What passes by the shortcut.
            f: What comes out of the branch.

        Returns:
            The sum, with the strides that torch gives it; the left operand itself where that is written to. A probe
            sees it where both are plain tensors of one shape, with at least one dimension.

        Example:
            >>> InlineAdd(shortcut_first=True, written="+")(torch.ones(2), torch.ones(2))
            tensor([2., 2.])
        """
        left, right = (x, f) if self.shortcut_first else (f, x)
        if self.observer is None or not (_is_plain(x) and _is_plain(f) and x.shape == f.shape and x.device == f.device):
            added: Tensor = _WRITTEN[self.written](left, right)
            return added
        if self.written in ("+=", "add_"):
            return self.observer.in_place(x, f, into_x=self.shortcut_first)
        y = self.observer(x, f, self.relu)
        return y if self.shortcut_first or x.stride() == f.stride() else _restrided(y, _strides_of_sum(left, right))


def _strides_of_sum(left: Tensor, right: Tensor) -> tuple[int, ...]:
    """Gives the strides that torch gives a sum; which operand is first matters."""
    empty = [torch.empty_strided(tensor.shape, tensor.stride(), device="meta") for tensor in (left, right)]
    return (empty[0] + empty[1]).stride()


def _restrided(y: Tensor, strides: tuple[int, ...]) -> Tensor:
    """Copies a tensor where it has other strides: kernels that come after may round otherwise."""
    if y.stride() == strides:
        return y
    return torch.empty_strided(y.shape, strides, dtype=y.dtype, device=y.device).copy_(y)


@dataclass
class Instrumented:
    """What `instrument` found in a model, and the way back; a context manager that goes it at its end.

    Attributes:
        junctions: Names of the new modules, as `gradprobe.attach` calls their junctions.
        blocks: Names of the modules in `unseen` that can be measured at their boundaries, by
            `attach(model, activations=[*blocks])`: their output and the gradient that comes back to it.
        unseen: Modules with additions that are left as they are, or whose source is out of reach, and why.
    """

    junctions: tuple[str, ...]
    blocks: tuple[str, ...]
    unseen: dict[str, str]
    _undo: list[tuple[nn.Module, list[str], dict[str, MethodType]]] = field(default_factory=list, repr=False)

    def undo(self) -> None:
        """Takes the new modules out of the model and gives it its own methods back. Calling it again does nothing.

        Where a method has been wrapped by something else since, which calls it still, its module stays as it is, with
        a `GradprobeWarning`; undo it again afterwards.
        """
        left = []
        for module, children, methods in self._undo:
            wrapped = [name for name in methods if vars(module).get(name, methods[name]) is not methods[name]]
            if wrapped:
                left.append((module, children, methods))
                warnings.warn(
                    f"gradprobe: {', '.join(wrapped)} of {type(module).__name__} has been replaced since it was "
                    f"instrumented: {', '.join(children)} stay until that is undone, and this again",
                    GradprobeWarning,
                    stacklevel=2,
                )
                continue
            for name in children:
                if isinstance(getattr(module, name, None), InlineAdd):
                    delattr(module, name)
            for name in methods:
                if name in vars(module):
                    delattr(module, name)
        self._undo[:] = left

    def __enter__(self) -> Instrumented:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()

    def __str__(self) -> str:
        rows = [*((name, "junction") for name in self.junctions)]
        rows += [(name or "(the model)", f"unseen: {reason}") for name, reason in self.unseen.items()]
        if not rows:
            return "no residual additions found"
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def instrument(model: nn.Module) -> Instrumented:
    """Gives the residual additions that a model writes inline a module each, so that a probe sees them as junctions.

    Found are `a + b`, `a += b`, `a.add(b)`, `a.add_(b)`, `torch.add(a, b)` and `operator.add(a, b)` in `forward`, in
    the methods that it or another module calls, and in functions within those, where one operand comes from the same
    tensor as the other by fewer layers: by none, or by a projection beside a longer branch with an activation.
    Additions of positions, biases, masks, constants, adapters and gated mixtures are none. Outputs, gradients, state
    dict and classes stay as they are. Use it before `gradprobe.attach` and `torch.compile`.

    Args:
        model: Any module; it is changed until `undo` is called.

    Returns:
        What was found and what was not, which prints as a table.

    Raises:
        ArgumentError: The model is no module, is compiled or scripted, or is instrumented already.

    Source: the shortcuts of He et al. 2015, "Deep Residual Learning for Image Recognition" (arXiv 1512.03385).

    Example:
        >>> report = instrument(nn.TransformerEncoderLayer(8, 2, norm_first=True))
        >>> print(report)
        residual_add    junction
        residual_add_1  junction
        >>> report.undo()
    """
    _check(model)
    _remove_leftovers(model)
    report = Instrumented((), (), {})
    try:
        _instrument(model, report)
    except BaseException:
        report.undo()
        raise
    return report


def _instrument(model: nn.Module, report: Instrumented) -> None:
    handed: defaultdict[nn.Module, list[Call]] = defaultdict(list)
    walked: dict[nn.Module, str] = {}
    closed: tuple[str, ...] = ()  # how names begin within modules that do not run as Python
    junctions: list[str] = []
    for name, module in list(model.named_modules()):
        if name.startswith(closed):
            continue
        if _is_translated(module):
            scripted = isinstance(module, torch.jit.ScriptModule)
            report.unseen[name] = "is scripted, and takes no hooks" if scripted else "is compiled"
            closed += (f"{name}.",)
            continue
        if isinstance(module, ResidualAdd) or is_chain(module) or is_torchs_layer(module) or _is_list(module):
            continue
        try:
            findings = find_additions(module, handed[module])
        except Unreadable as error:
            report.unseen[name] = str(error)
            continue
        for call in findings.calls:
            handed[call.module].append(call)
        walked |= findings.walked
        reasons = list(findings.refused.values())
        if findings.additions and (obstacle := _obstacle(module, walked)):
            reasons.insert(0, obstacle)
        elif findings.additions:
            children = _exchange(module, findings, report)
            junctions += [f"{name}.{child}" if name else child for child in children]
        if reasons:
            report.unseen[name] = reasons[0]
    report.junctions = tuple(junctions)
    modules = dict(model.named_modules())
    report.blocks = tuple(
        name for name in report.unseen if name and not isinstance(modules[name], torch.jit.ScriptModule)
    )


def _check(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model: need a torch.nn.Module; got {type(model).__name__}")
    if _is_translated(model):
        raise ArgumentError(
            "model: need one that runs as Python, to be compiled afterwards; got a compiled or scripted one"
        )
    for name, module in model.named_modules():
        has_junctions = any(isinstance(child, InlineAdd) for child in module.children())
        if has_junctions and any(_is_replaced(module, method) for method in vars(module)):
            where = f"{name} has them" if name else "it has them"
            raise ArgumentError(f"model: need one that is not instrumented yet; got one where {where}: undo it first")


def _is_translated(module: nn.Module) -> bool:
    """Tells whether a module does not run as Python: its methods are not what is run."""
    translated = (torch.jit.ScriptModule, torch._dynamo.OptimizedModule)
    return isinstance(module, translated) or getattr(module, "_compiled_call_impl", None) is not None


def _is_replaced(module: nn.Module, name: str) -> bool:
    """Tells whether an attribute of a module takes the place of a method of its class."""
    of_class, own = getattr(type(module), name, None), vars(module)[name]
    return callable(of_class) and not (isinstance(own, MethodType) and own.__func__ is of_class)


def _remove_leftovers(model: nn.Module) -> None:
    """Removes junctions that nothing calls, and methods that are the class's own: what a pickle makes of them."""
    for module in model.modules():
        for name in [name for name, child in module._modules.items() if isinstance(child, InlineAdd)]:
            delattr(module, name)
            for method in [key for key, value in vars(module).items() if isinstance(value, MethodType)]:
                if vars(module)[method].__func__ is getattr(type(module), method, None):
                    delattr(module, method)


def _is_list(module: nn.Module) -> bool:
    return type(module) in (nn.ModuleList, nn.ModuleDict)


def _obstacle(module: nn.Module, walked: Mapping[nn.Module, str]) -> str | None:
    """Gives the reason why a module may have no further child."""
    if is_container(module):
        return "is a container, where one more child would be run with the others"
    if hasattr(module, "a name that nothing has"):
        return "has an attribute of any name, so that none is free"
    return walked.get(module)


def _is_plain(tensor: object) -> bool:
    """Tells whether a tensor has numbers of its own that a junction can add and measure."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and isinstance(tensor, Tensor)
        and tensor.is_floating_point()
        and tensor.layout is torch.strided
        and tensor.dim() > 0
    )


def _exchange(module: nn.Module, findings: Findings, report: Instrumented) -> list[str]:
    """Puts children into a module that do its additions, and notes the way back; returns their names."""
    exchanges: defaultdict[str, dict[Span, Exchange]] = defaultdict(dict)
    names = (name for name in _child_names() if not hasattr(module, name))
    children = dict(zip(names, findings.additions.values(), strict=False))
    for (method, span), child in zip(findings.additions, children, strict=True):
        exchanges[method][span] = Exchange(child, children[child].shortcut_first)
    methods = {
        method: MethodType(rewritten(read(attribute(module, method)), places), module)
        for method, places in exchanges.items()
    }
    report._undo.append((module, list(children), methods))
    for child, addition in children.items():
        module.add_module(child, InlineAdd(addition.shortcut_first, addition.written).train(module.training))
    for method in methods:
        object.__setattr__(module, method, methods[method])
    return list(children)


def _child_names() -> Iterator[str]:
    yield "residual_add"
    yield from (f"residual_add_{number}" for number in itertools.count(1))
