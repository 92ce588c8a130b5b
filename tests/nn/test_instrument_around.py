"""Instrumented models that are wrapped, scripted, traced, exported, reloaded or instrumented again."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from importlib import import_module, reload
from pathlib import Path
from types import MethodType

import helpers.inline_cases as cases
import pytest
import torch
from helpers.inline_cases import OneLayer
from torch import nn

import gradprobe
from gradprobe.nn import instrument as instrumentation
from gradprobe.nn.residual import InlineAdd

TOKENS = torch.linspace(-2, 2, 4 * 5 * 8).reshape(4, 5, 8).sin()


class InComprehension(OneLayer):
    """The addition is in an inner code object, not in that of `forward` itself."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([x + layer(x) for layer in (self.layer, self.layer)]).sum(0)


@pytest.mark.parametrize("block", [InComprehension, cases.Decorated, cases.Methods])
def test_instrumenting_twice_is_an_error_and_changes_nothing(block: Callable[[int], nn.Module]) -> None:
    model = block(8)
    expected = model(TOKENS)
    report = gradprobe.instrument(model, TOKENS)
    with pytest.raises(gradprobe.ArgumentError, match="one that is not instrumented yet"):
        gradprobe.instrument(model, TOKENS)
    assert torch.equal(model(TOKENS), expected)
    report.undo()
    assert torch.equal(model(TOKENS), expected)
    assert not any(isinstance(module, InlineAdd) for module in model.modules())


def wrap(model: nn.Module) -> None:
    """Wraps a model's forward as libraries for mixed precision or offloading do."""
    model.forward = functools.partial(lambda forward, *args: forward(*args), model.forward)  # type: ignore[method-assign]


def test_a_wrapped_method_keeps_its_residual_adds_until_it_is_restored() -> None:
    model = cases.TimmBlock(8)
    expected = model(TOKENS)
    report = gradprobe.instrument(model, TOKENS)
    ours = model.forward
    wrap(model)
    with pytest.raises(gradprobe.ArgumentError, match="one that is not instrumented yet"):
        gradprobe.instrument(model, TOKENS)
    with pytest.warns(
        gradprobe.GradprobeWarning, match="forward of TimmBlock has been replaced .* stay until you restore it"
    ):
        report.undo()
    assert torch.equal(model(TOKENS), expected)
    model.forward = ours  # type: ignore[method-assign]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report.undo()
    assert "forward" not in vars(model)
    assert "attn+" not in dict(model.named_children())


@pytest.mark.parametrize(
    "own",
    [
        lambda model: functools.partial(type(model).forward, model),
        lambda model: MethodType(functools.partial(type(model).forward), model),
    ],
    ids=["partial", "bound-partial"],
)
def test_a_forward_overridden_on_the_instance_is_left_alone(own: Callable[[nn.Module], object]) -> None:
    model = cases.TimmBlock(8)
    expected = model(TOKENS)
    model.forward = own(model)  # type: ignore[method-assign, assignment]
    assert gradprobe.instrument(model, TOKENS).unseen == {
        "": "adds in TimmBlock.forward, a function outside the module"
    }
    assert torch.equal(model(TOKENS), expected)


def test_a_failure_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(cases.TimmBlock(8), cases.DecoderLayer(8))
    replace = instrumentation._replace

    def failing(module: nn.Module, *arguments: object) -> object:
        if isinstance(module, cases.DecoderLayer):
            raise KeyboardInterrupt
        return replace(module, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(instrumentation, "_replace", failing)
    with pytest.raises(KeyboardInterrupt):
        gradprobe.instrument(model, TOKENS)
    assert "forward" not in vars(model[0])
    assert "attn+" not in dict(model[0].named_children())


class AnyName(OneLayer):
    """Returns None for every attribute that it does not have."""

    def __getattr__(self, name: str) -> object:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layer(x)


def test_a_module_without_a_free_name_is_reported() -> None:
    assert gradprobe.instrument(AnyName(8), TOKENS).unseen == {
        "": "has an attribute of every name, so none is free for a new child"
    }


TRANSLATIONS: dict[str, Callable[[nn.Module, torch.Tensor], Callable[[torch.Tensor], torch.Tensor]]] = {
    "scripted": lambda model, batch: torch.jit.script(model),
    "traced": torch.jit.trace,
    "fx": lambda model, batch: torch.fx.symbolic_trace(model),
    "exported": lambda model, batch: torch.export.export(model, (batch,)).module(),
    "vmap": lambda model, batch: lambda batch: torch.vmap(model)(batch.unsqueeze(0)),
}


@pytest.mark.parametrize("probed", [False, True], ids=["alone", "probed"])
@pytest.mark.parametrize("how", TRANSLATIONS)
@pytest.mark.parametrize("in_place", [False, True], ids=["new", "in-place"])
def test_translations_give_the_same_numbers(in_place: bool, how: str, probed: bool) -> None:
    model = cases.BasicBlock(8, 8).eval() if in_place else cases.Parallel(8)
    batch = torch.randn(4, 8, 3, 3) if in_place else TOKENS
    expected = TRANSLATIONS[how](model, batch)(batch)
    gradprobe.instrument(model, batch)
    if probed:
        gradprobe.attach(model)
    assert torch.equal(TRANSLATIONS[how](model, batch)(batch), expected)


def test_a_function_that_is_reloaded_in_place_runs_its_new_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reloads as notebooks do: references to the old function run the new code."""
    text = (
        "from helpers.inline_cases import OneLayer\n"
        "class Block(OneLayer):\n  def forward(self, x):\n    return x + {}\n"
    )
    path = tmp_path / "reloaded.py"
    path.write_text(text.format("self.layer(x)"))
    monkeypatch.syspath_prepend(tmp_path)
    reloaded = import_module("reloaded")
    forward = reloaded.Block.forward
    model = reloaded.Block(8)
    gradprobe.instrument(model, TOKENS).undo()
    path.write_text(text.format("2 * self.layer(x)  # changed"))
    forward.__code__ = reload(reloaded).Block.forward.__code__
    expected = model(TOKENS)
    assert gradprobe.instrument(model, TOKENS).junctions == ("layer+",)
    assert torch.equal(model(TOKENS), expected)


def add_layer(self: OneLayer, x: torch.Tensor) -> torch.Tensor:
    return x + self.layer(x)


@pytest.mark.parametrize(
    "forward",
    [
        functools.partialmethod(add_layer),
        property(lambda self: functools.partial(add_layer, self)),
    ],
)
def test_a_forward_that_is_not_a_function_is_reported(forward: object) -> None:
    model = type("Block", (OneLayer,), {"forward": forward})(8)
    expected = model(TOKENS)
    assert gradprobe.instrument(model, TOKENS).unseen == {"": "adds in add_layer, a function outside the module"}
    assert torch.equal(model(TOKENS), expected)


class Added(OneLayer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layer(x)


class IteratesOverABlock(nn.Module):
    """Runs a block's children itself, as a feature extractor does, and then the block."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Added(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for child in self.block.children():
            x = x + child(x)
        y: torch.Tensor = self.block(x)
        return y


def test_a_block_whose_children_another_module_runs_gets_no_new_child() -> None:
    model = IteratesOverABlock()
    expected = model(TOKENS)
    report = gradprobe.instrument(model, TOKENS)
    reason = "has its children iterated over in forward of IteratesOverABlock, which would run one more child too"
    assert (report.junctions, report.unseen) == (("block+",), {"block": reason})
    assert torch.equal(model(TOKENS), expected)
