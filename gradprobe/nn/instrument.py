"""Turns residual additions that a model writes inline (`out += identity`, `x = x + self.attn(x)`) into modules.

The additions are found in the source of the model's methods and replaced there by calls to a new child module of the
block, which adds as before: modules, classes, parameters, hooks, control flow and numbers stay the same. Only `forward`
or whichever method adds is overridden on the instances. The result depends on the modules the model has at that time:
replace modules first, then instrument, then compile. If one place adds several times per step, as in a loop, its
residual add reports the total. A deep copy stays instrumented. A pickle of the model is plain, since it stores the
class's own methods, and so is the result of `torch.jit.script`. Shallow copies by `copy.copy` and the replicas of
`nn.DataParallel` would run the original: use deep copies and `DistributedDataParallel`.
"""

from __future__ import annotations

import itertools
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MethodType, TracebackType

import torch
from torch import nn

from gradprobe.errors import ArgumentError, GradprobeWarning
from gradprobe.nn.inline.expressions import Call
from gradprobe.nn.inline.flow import Findings, find_additions
from gradprobe.nn.inline.values import attribute, is_chain, is_container, is_torchs_layer
from gradprobe.nn.residual import InlineAdd, ResidualAdd
from gradprobe.nn.rewrite import Replacement, Span, Unreadable, read, rewritten


@dataclass
class Instrumented:
    """The result of `instrument`; as a context manager, it undoes the changes on exit.

    Attributes:
        junctions: Names of the new modules, which are also the names of their residual adds in a snapshot.
        blocks: Names of the modules in `unseen` whose output and its gradient can still be measured, by
            `attach(model, activations=[*blocks])`.
        unseen: Names of modules with residual additions that were left alone, or with unreadable source, and why.
    """

    junctions: tuple[str, ...]
    blocks: tuple[str, ...]
    unseen: dict[str, str]
    _undo: list[tuple[nn.Module, list[str], dict[str, MethodType]]] = field(default_factory=list, repr=False)

    def undo(self) -> None:
        """Removes the new modules from the model and restores its own methods; a second call does nothing.

        If a method has since been wrapped by other code, its module is left as it is, with a `GradprobeWarning`: remove
        the wrapper and call `undo` again.
        """
        left = []
        for module, children, methods in self._undo:
            wrapped = [name for name in methods if vars(module).get(name, methods[name]) is not methods[name]]
            if wrapped:
                left.append((module, children, methods))
                warnings.warn(
                    f"gradprobe: {', '.join(wrapped)} of {type(module).__name__} has been replaced since it was "
                    f"instrumented; {', '.join(children)} stay until you restore it and call undo() again",
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
        rows = [*((name, "residual add") for name in self.junctions)]
        rows += [(name or "(the model)", f"unseen: {reason}") for name, reason in self.unseen.items()]
        if not rows:
            return "no residual additions found"
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def instrument(model: nn.Module) -> Instrumented:
    """Replaces each residual addition that a model writes inline by a module, so that a probe can observe it.

    It finds `a + b`, `a += b`, `a.add(b)`, `a.add_(b)`, `torch.add(a, b)` and `operator.add(a, b)` in `forward`, in the
    methods that it or another module calls, and in functions defined within those. An addition is residual if both
    operands come from one tensor and one of them, the shortcut, through fewer layers: through none, or through a
    projection next to a longer branch with an activation. Adding positions, biases, masks, constants, adapters or gated
    mixtures is not residual. Outputs, gradients, state dict and classes do not change. Call it before
    `gradprobe.attach` and `torch.compile`.

    Args:
        model: Any module; it stays changed until `undo` is called.

    Returns:
        The residual adds that were found and those that could not be replaced; prints as a table.

    Raises:
        ArgumentError: The model is not a module, is compiled or scripted, or is already instrumented.

    Source: the shortcuts of He et al. 2015, "Deep Residual Learning for Image Recognition" (arXiv 1512.03385).

    Example:
        >>> report = instrument(nn.TransformerEncoderLayer(8, 2, norm_first=True))
        >>> print(report)
        residual_add    residual add
        residual_add_1  residual add
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
    closed: tuple[str, ...] = ()  # name prefixes inside modules that do not run as Python
    junctions: list[str] = []
    for name, module in list(model.named_modules()):
        if name.startswith(closed):
            continue
        if _is_translated(module):
            scripted = isinstance(module, torch.jit.ScriptModule)
            report.unseen[name] = "is scripted and takes no hooks" if scripted else "is compiled"
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
            children = _replace(module, findings, report)
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
        raise ArgumentError(f"model: needed a torch.nn.Module, got {type(model).__name__}")
    if _is_translated(model):
        raise ArgumentError(
            "model: needed one that runs as Python (compile it after instrumenting), got a compiled or scripted one"
        )
    for name, module in model.named_modules():
        has_junctions = any(isinstance(child, InlineAdd) for child in module.children())
        if has_junctions and any(_is_replaced(module, method) for method in vars(module)):
            where = f" ({name})" if name else ""
            raise ArgumentError(
                f"model: needed one that is not instrumented yet, got an instrumented one{where}: undo it"
            )


def _is_translated(module: nn.Module) -> bool:
    """Returns whether a module is compiled or scripted, so that its Python methods do not run."""
    translated = (torch.jit.ScriptModule, torch._dynamo.OptimizedModule)
    return isinstance(module, translated) or getattr(module, "_compiled_call_impl", None) is not None


def _is_replaced(module: nn.Module, name: str) -> bool:
    """Returns whether an instance attribute overrides a method of the module's class."""
    of_class, own = getattr(type(module), name, None), vars(module)[name]
    return callable(of_class) and not (isinstance(own, MethodType) and own.__func__ is of_class)


def _remove_leftovers(model: nn.Module) -> None:
    """Removes what unpickling an instrumented model leaves: unused `InlineAdd` modules, and the class's own methods."""
    for module in model.modules():
        for name in [name for name, child in module._modules.items() if isinstance(child, InlineAdd)]:
            delattr(module, name)
            for method in [key for key, value in vars(module).items() if isinstance(value, MethodType)]:
                if vars(module)[method].__func__ is getattr(type(module), method, None):
                    delattr(module, method)


def _is_list(module: nn.Module) -> bool:
    return type(module) in (nn.ModuleList, nn.ModuleDict)


def _obstacle(module: nn.Module, walked: Mapping[nn.Module, str]) -> str | None:
    """Returns the reason why no child can be added to a module, None if one can."""
    if is_container(module):
        return "is a container that would run one more child along with the others"
    if hasattr(module, "a name that nothing has"):
        return "has an attribute of every name, so none is free for a new child"
    return walked.get(module)


def _replace(module: nn.Module, findings: Findings, report: Instrumented) -> list[str]:
    """Adds children that do a module's additions, records how to undo it, and returns their names."""
    replacements: defaultdict[str, dict[Span, Replacement]] = defaultdict(dict)
    names = (name for name in _child_names() if not hasattr(module, name))
    children = dict(zip(names, findings.additions.values(), strict=False))
    for (method, span), child in zip(findings.additions, children, strict=True):
        replacements[method][span] = Replacement(child, children[child].shortcut_first)
    methods = {
        method: MethodType(rewritten(read(attribute(module, method)), places), module)
        for method, places in replacements.items()
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
