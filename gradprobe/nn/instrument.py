"""Turns residual additions that a model writes inline (`out += identity`, `x = x + self.attn(x)`) into modules.

The additions are found by running the model, and replaced in the source of its methods by calls to a new child module
of the block, which adds as before: modules, classes, parameters, hooks, control flow and numbers stay the same. Only
`forward` or whichever method adds is overridden on the instances. The result depends on the modules the model has at
that time: replace modules first, then instrument, then compile. If one place adds several times per step, as in a loop,
its residual add reports the total. A deep copy stays instrumented. A pickle of the model is plain, since it stores the
class's own methods, and so is the result of `torch.jit.script`. Shallow copies by `copy.copy` and the replicas of
`nn.DataParallel` would run the original: use deep copies and `DistributedDataParallel`.
"""

from __future__ import annotations

import itertools
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import MethodType, TracebackType

import torch
from torch import nn

from gradprobe.errors import ArgumentError, GradprobeWarning, warn_user
from gradprobe.nn.addition_site import attribute
from gradprobe.nn.first_forward import call_at_first_forward, is_waiting, stop_waiting
from gradprobe.nn.residual import InlineAdd, watchers, watchers_paused
from gradprobe.nn.rewrite import Place, Replacement, Span, read, rewritten
from gradprobe.nn.shortcuts import Addition
from gradprobe.nn.trace import Traced, trace


@dataclass
class Instrumented:
    """The result of `instrument`; as a context manager, it undoes the changes on exit.

    Attributes:
        junctions: Names of the new modules, which are also the names of their residual adds in a snapshot.
        blocks: Names of the modules in `unseen` whose output and its gradient can still be measured, by
            `attach(model, activations=[*blocks])`.
        unseen: Names of modules with residual additions that were left alone, and why.
        is_waiting: The model was instrumented without an example and has not run yet: nothing is found so far.
    """

    junctions: tuple[str, ...]
    blocks: tuple[str, ...]
    unseen: dict[str, str]
    is_waiting: bool = False
    _undo: list[tuple[nn.Module, list[str], dict[str, MethodType]]] = field(default_factory=list, repr=False)
    _stop_waiting: Callable[[], None] = field(default=lambda: None, repr=False)

    def undo(self) -> None:
        """Removes the new modules from the model and restores its own methods; a second call does nothing.

        If a method has since been wrapped by other code, its module is left as it is, with a `GradprobeWarning`: remove
        the wrapper and call `undo` again.
        """
        self._stop_waiting()
        self.is_waiting = False
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
        for watcher in [*watchers]:
            watcher.take_up()

    def __enter__(self) -> Instrumented:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()

    def __str__(self) -> str:
        if self.is_waiting:
            return "to be traced at the first forward"
        rows = [*((name, "residual add") for name in self.junctions)]
        rows += [(name or "(the model)", f"unseen: {reason}") for name, reason in self.unseen.items()]
        if not rows:
            return "no residual additions found"
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def instrument(model: nn.Module, *example: object, **keywords: object) -> Instrumented:
    """Replaces each residual addition that a model writes inline by a module, so that a probe can observe it.

    It runs a forward, which leaves the model and the random state as they are, and judges each `a + b`, `a += b`,
    `a.add(b)`, `a.add_(b)`, `torch.add(a, b)` and `operator.add(a, b)` in it by autograd's graph. An addition is
    residual if both operands come from one tensor and one of them, the shortcut, through fewer layers: through none, or
    through a projection next to a longer branch with an activation. Adding positions, biases, masks, constants,
    adapters or gated mixtures is not residual. Outputs, gradients, state dict and classes do not change.

    Call it before `torch.compile`. Without an example, the model is traced at its first forward, with the arguments of
    that call, and a probe that is attached by then takes up the residual adds; a model that is sharded or compiled
    needs an example, before it is.

    Args:
        model: Any module; it stays changed until `undo` is called.
        example: Arguments of the model's forward.
        keywords: Keyword arguments of the model's forward.

    Returns:
        The residual adds that were found and those that could not be replaced; prints as a table.

    Raises:
        ArgumentError: The model is not a module, is compiled or scripted, or is already instrumented; or its forward
            fails with the example.

    Source: the shortcuts of He et al. 2015, "Deep Residual Learning for Image Recognition" (arXiv 1512.03385).

    Example:
        >>> report = instrument(nn.TransformerEncoderLayer(8, 2, norm_first=True), torch.zeros(3, 1, 8))
        >>> print(report)
        self_attn+  residual add
        linear2+    residual add
        >>> report.undo()
    """
    _check(model)
    _remove_leftovers(model)
    report = Instrumented((), (), {})
    if example or keywords:
        _trace(model, report, example, keywords)
    else:
        _trace_later(model, report)
    return report


def _trace_later(model: nn.Module, report: Instrumented) -> None:
    """Traces the model at its first forward; a deep copy of it at its own, without a report."""
    inner = _inner(model)
    report.is_waiting = True
    report._stop_waiting = partial(stop_waiting, inner)

    def tell(called: nn.Module, args: Sequence[object], keywords: Mapping[str, object]) -> None:
        if called is not inner:
            _trace(called, Instrumented((), (), {}), args, keywords, is_inside=True)
            return
        _trace(model, report, args, keywords, is_inside=True)
        report.is_waiting = False

    def give_up(called: nn.Module, error: ArgumentError) -> None:
        if called is inner:
            report.is_waiting, report.unseen[""] = False, f"could not be traced: {error}"
        warn_user(f"the residual adds of {type(called).__name__} could not be traced and are not observed: {error}")

    call_at_first_forward(inner, tell, give_up)


def _inner(model: nn.Module) -> nn.Module:
    """Returns the module that a wrapper for data-parallel training runs; its own forward synchronises."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def _trace(
    model: nn.Module,
    report: Instrumented,
    example: Sequence[object],
    keywords: Mapping[str, object],
    is_inside: bool = False,
) -> None:
    """Finds the residual additions in one forward, and replaces them."""
    if any(map(_is_sharded, model.modules())):
        raise ArgumentError("model: needed one that is not sharded yet: instrument it before, with an example")
    with watchers_paused():
        traced = trace(_inner(model), example, keywords, is_inside=is_inside)
    try:
        _instrument(model, report, traced)
    except BaseException:
        report.undo()
        raise
    for watcher in [*watchers]:
        watcher.take_up()


def _instrument(model: nn.Module, report: Instrumented, traced: Traced) -> None:
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
        additions, reasons = traced.additions.get(module, {}), list(traced.refused.get(module, ()))
        if additions and (obstacle := _obstacle(module, traced.walked)):
            reasons.insert(0, obstacle)
        elif additions:
            children = _replace(module, additions, report)
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
        if is_waiting(module) or (has_junctions and any(_is_replaced(module, method) for method in vars(module))):
            where = f" ({name})" if name else ""
            raise ArgumentError(
                f"model: needed one that is not instrumented yet, got an instrumented one{where}: undo it"
            )


def _is_translated(module: nn.Module) -> bool:
    """Returns whether a module is compiled or scripted, so that its Python methods do not run."""
    dynamo = sys.modules.get("torch._dynamo")
    is_compiled = dynamo is not None and isinstance(module, dynamo.OptimizedModule)
    has_compiled_call = getattr(module, "_compiled_call_impl", None) is not None
    return is_compiled or has_compiled_call or isinstance(module, torch.jit.ScriptModule)


def _is_sharded(module: nn.Module) -> bool:
    """Returns whether a module gathers its parameters when it runs, so that nothing can stand for them."""
    is_wrapped = any(kind.__name__ in ("FSDPModule", "FullyShardedDataParallel") for kind in type(module).__mro__)
    return is_wrapped or any(map(_is_part, module.parameters(recurse=False)))


def _is_part(parameter: nn.Parameter) -> bool:
    """Returns whether a parameter is sharded, or a piece of what a wrapper around the module shards."""
    is_piece = parameter._is_view() and not parameter.is_leaf
    return is_piece or hasattr(parameter, "device_mesh") or hasattr(parameter, "_is_flat_param")


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


def _obstacle(module: nn.Module, walked: Mapping[nn.Module, str]) -> str | None:
    """Returns the reason why no child can be added to a module, None if one can."""
    if isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        return "is a container that would run one more child along with the others"
    if hasattr(module, "a name that nothing has"):
        return "has an attribute of every name, so none is free for a new child"
    return walked.get(module)


def _replace(module: nn.Module, additions: Mapping[Place, Addition], report: Instrumented) -> list[str]:
    """Adds children that do a module's additions, records how to undo it, and returns their names."""
    children = dict(zip(_free_names(module, [each.branch for each in additions.values()]), additions, strict=True))
    replacements: defaultdict[str, dict[Span, Replacement]] = defaultdict(dict)
    added = {}
    for child, place in children.items():
        addition = additions[place]
        added[child] = InlineAdd(addition.shortcut_first, addition.written).train(module.training)
        within = replacements[place.method]
        for span, function in zip(place.spans, place.functions, strict=False):
            call = within.setdefault(span, Replacement(child, None))
            within = added[call.child].functions.setdefault(function, {})
        within[place.spans[-1]] = Replacement(child, addition.shortcut_first)
    methods = {
        method: MethodType(rewritten(read(attribute(module, method)), places), module)
        for method, places in replacements.items()
    }
    report._undo.append((module, list(children), methods))
    for child, added_module in added.items():
        module.add_module(child, added_module)
    for method in methods:
        object.__setattr__(module, method, methods[method])
    return list(children)


def _free_names(module: nn.Module, branches: Sequence[str]) -> list[str]:
    """Names residual adds after the last modules of their branches."""
    names: list[str] = []
    for branch in branches:
        first = f"{branch}+" if branch else "residual_add"
        candidates = itertools.chain([first], (f"{first}{number}" for number in itertools.count(2)))
        names.append(next(name for name in candidates if name not in names and not hasattr(module, name)))
    return names
