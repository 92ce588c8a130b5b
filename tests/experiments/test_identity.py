"""`gradprobe identity`: the constructed network equals the shallow one, and the conclusions follow from the numbers."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

from gradprobe import networks
from gradprobe.cli.commands import app
from gradprobe.errors import ArgumentError
from gradprobe.experiments.data import Dataset, load
from gradprobe.experiments.identity.result import NetErrors, Paradox
from gradprobe.experiments.identity.run import extend, identity
from gradprobe.experiments.identity.stacks import Stack, Stacks, train_stacks
from gradprobe.experiments.sweep import engines
from gradprobe.experiments.train import EpochResult, Recipe, load_state, train_cell


def images(channels: int = 3) -> torch.Tensor:
    return torch.randn(16, channels, 12, 12, generator=torch.Generator().manual_seed(1))


def difference(one: nn.Module, other: nn.Module, x: torch.Tensor) -> float:
    with torch.no_grad():
        return float((one.eval()(x) - other.eval()(x)).abs().max())


def weight_layers(model: nn.Module, x: torch.Tensor) -> int:
    """Counts the convolutions and linear layers that run on x."""
    ran: list[nn.Module] = []
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    hooks = [layer.register_forward_hook(lambda module, *_: ran.append(module)) for layer in layers]
    model(x)
    for hook in hooks:
        hook.remove()
    return len(ran)


@pytest.mark.parametrize(("shallow_depth", "deep_depth"), [(8, 14), (8, 110), (20, 56), (44, 56)])
@pytest.mark.parametrize("norm", ["batch", "none"])
def test_a_random_network_and_its_extension_have_equal_logits(shallow_depth: int, deep_depth: int, norm: Any) -> None:
    torch.manual_seed(0)
    shallow, deep = (networks.plain(depth, norm=norm) for depth in (shallow_depth, deep_depth))
    assert difference(shallow, deep, images()) > 1e-3

    extend(shallow, deep)

    assert difference(shallow, deep, images()) <= 1e-5
    assert shallow(images()).std(dim=0).max().item() > 1e-4  # the logits depend on the image
    assert weight_layers(deep, images()) == deep_depth


def test_the_imagenet_layout_is_extended_too() -> None:
    torch.manual_seed(0)
    shallow, deep = (networks.plain(depth, width=4, num_classes=5) for depth in (18, 34))
    extend(shallow, deep)
    assert difference(shallow, deep, torch.randn(2, 3, 64, 64)) <= 1e-5


def test_a_trained_network_and_its_extension_have_equal_logits() -> None:
    data = load("digits")
    few = Dataset("digits", "digits", data.train_x[:192], data.train_y[:192], data.test_x, data.test_y, 10, False)
    *_, last = train_cell("plain", 20, 0, few, Recipe(3, 64), None)
    shallow, deep = (networks.plain(depth, in_channels=1) for depth in (20, 56))
    load_state(shallow, last.state)

    extend(shallow, deep)

    assert difference(shallow, deep, data.test_x) <= 1e-5
    logits = deep.train()(data.test_x)  # batch statistics replace the running ones
    assert difference(shallow, deep, data.test_x) > 1e-2
    F.cross_entropy(logits, data.test_y).backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in deep.parameters())  # every layer still learns


@pytest.mark.parametrize(
    ("shallow", "deep", "message"),
    [
        (networks.plain(8), networks.resnet(14), "needed plain networks, got a residual one"),
        (networks.plain(14), networks.plain(8), r"needed stages.0.1.* as in the shallow network, got nothing"),
        (
            networks.plain(8),
            networks.plain(14, width=8),
            r"needed stem.0.weight of \(16, 3, 3, 3\) as in the shallow network",
        ),
        (networks.plain(8), networks.plain(14, num_classes=5), r"needed fc.weight of \(10, 64\)"),
        (nn.Sequential(), nn.Conv2d(3, 8, 3), "changes the shape"),
    ],
    ids=["residual", "shallower", "width", "classes", "shape"],
)
def test_a_network_that_cannot_be_extended_is_rejected(shallow: nn.Module, deep: nn.Module, message: str) -> None:
    deep = nn.Sequential(deep) if isinstance(deep, nn.Conv2d) else deep
    before = {name: value.clone() for name, value in deep.state_dict().items()}
    with pytest.raises(ArgumentError, match=f"^deep: .*{message}"):
        extend(shallow, deep)
    assert all(torch.equal(value, before[name]) for name, value in deep.state_dict().items())


GOOD = NetErrors(0.01, 0.5, 2.0)
PARADOX = Paradox(
    shallow_depth=20,
    deep_depth=56,
    parameters=853_018,
    epochs=20,
    further_epochs=6,
    largest_logit_difference=2e-6,
    shallow=GOOD,
    constructed=GOOD,
    by_batch=NetErrors(0.9, 21.0, 24.0),
    trained_on=NetErrors(0.02, 0.7, 2.5),
    scratch=NetErrors(2.0, 67.0, 70.0),
)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, "(largest difference 2e-06) and errors: a plain-56 exists that is as good as plain-20."),
        ({"constructed": NetErrors(0.9, 7.0, 9.0)}, "but a training error of 7.0 % instead of 0.5 %."),
        ({}, "plain-56 does not find one: 67.0 % against 0.5 % training error."),
        ({"scratch": NetErrors(0.0, 1.4, 3.0)}, "plain-56 is as good: 1.4 % against 0.5 %"),
        ({"shallow": NetErrors(0.2, 9.0, 9.0), "scratch": GOOD}, "plain-56 is better: 0.5 % against 9.0 %"),
        ({}, "under which the added layers are not identities: 21.0 % before the first step."),
        ({}, "6 more epochs at the last learning rate take the constructed network's training error from 0.5 to 0.7 %"),
        ({}, "training stays within 1 point of the better solution."),
        ({"trained_on": NetErrors(2.0, 60.0, 61.0)}, "training leaves the better solution."),
    ],
)
def test_the_conclusions_on_the_paradox_follow_from_its_numbers(change: dict[str, Any], said: str) -> None:
    assert said in " ".join(replace(PARADOX, **change).conclusions)


def test_no_conclusion_is_stated_that_does_not_hold() -> None:
    text = " ".join(replace(PARADOX, scratch=GOOD, by_batch=GOOD, trained_on=GOOD).conclusions)
    for claim in ("does not find", "overfitting", "not identities", "leaves", "is better"):
        assert claim not in text
    assert "exists" not in " ".join(replace(PARADOX, constructed=NetErrors(0.9, 7.0, 9.0)).conclusions)


def stacks(plain_loss: float, residual_loss: float) -> Stacks:
    return Stacks(
        steps=10,
        width=16,
        constant_loss=0.36,
        stacks=(
            Stack(4, "plain", "he", 1.0, plain_loss, 1.7, 1.5),
            Stack(4, "residual", "he", 20.0, residual_loss, 1.4, 1.3),
            Stack(4, "residual", "zero", 0.0, 0.0, 0.0, 0.0),
        ),
    )


@pytest.mark.parametrize(
    ("plain_loss", "residual_loss", "said", "not_said"),
    [
        (0.5, 0.1, ["Plain stacks of 4 layers end no better", "0.1 at the end, less than"], "no less"),
        (0.1, 3.0, ["Every plain stack ends better", "3 at the end, no less than"], "end no better"),
        (math.nan, 0.1, ["Plain stacks of 4 layers end no better"], "Every"),
    ],
    ids=["residual-better", "plain-better", "not-finite"],
)
def test_the_conclusions_on_the_stacks_follow_from_their_numbers(
    plain_loss: float, residual_loss: float, said: list[str], not_said: str
) -> None:
    text = " ".join(stacks(plain_loss, residual_loss).conclusions)
    assert all(part in text for part in said)
    assert not_said not in text


@pytest.mark.soak
def test_stacks_learn_and_deeper_ones_learn_less() -> None:
    result = train_stacks(depths=[1, 8])
    assert 0.3 < result.constant_loss < 0.42  # the variance of |N(0, 1)| is 1 - 2 / pi
    for kind in ("plain", "residual"):
        shallow, deep = result.of(kind, "he")
        assert shallow.final_loss < shallow.start_loss
        assert deep.final_loss < deep.start_loss
        assert shallow.final_loss < deep.final_loss
        assert shallow.distance < shallow.start_distance
    plain, residual = (result.of(kind, "he")[1].start_distance for kind in ("plain", "residual"))
    assert plain == pytest.approx(math.sqrt(3), rel=0.1)  # He: ||W||^2 is 2 for each row, and I adds 1
    assert residual == pytest.approx(math.sqrt(2), rel=0.1)
    assert [one.final_loss for one in result.of("residual", "zero")] == [0, 0]
    assert train_stacks(depths=[1], steps=5) == train_stacks(depths=[1], steps=5)
    assert train_stacks(seed=1, depths=[1], steps=1).stacks[0] != train_stacks(depths=[1], steps=1).stacks[0]


def test_stacks_learn_on_one_thread_and_restore_the_callers_threads() -> None:
    threads, seen = torch.get_num_threads(), []
    torch.set_num_threads(3)
    try:
        train_stacks(depths=[1], steps=1, advance=lambda depth: seen.append(torch.get_num_threads()))
        assert (seen, torch.get_num_threads()) == ([1, 1, 1], 3)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": -1}, "seed: needed a whole number from 0"),
        ({"epochs": 2}, "epochs: needed at least 3, got 2"),
        ({"steps": 0}, "steps: needed at least 1, got 0"),
        ({"depths": (56, 20)}, "depths: needed a smaller and then a larger depth, got 56, 20"),
        ({"depths": (20,)}, "depths: needed a smaller and then a larger depth, got 20"),
        ({"depths": (20, 57)}, "depth: needed 6n"),
        ({"depths": (20, 34)}, "depths: needed 6n.2 of the CIFAR layout .* got 34, which is an ImageNet depth"),
        ({"depths": (20, 50)}, "depths: needed 6n.2 of the CIFAR layout .* got 50, which is an ImageNet depth"),
        ({"stack_depths": (4, 2)}, "stack depths: needed whole numbers of at least 1 in rising order"),
    ],
    ids=["seed", "epochs", "steps", "order", "one", "no-depth", "imagenet", "both", "stacks"],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=f"^{message}"):
        identity(**options)


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Trains in this process, which is faster than starting others."""

    def run(
        jobs: Sequence[engines.Job], workers: int, checkpoint: Callable[[int], bytes | None]
    ) -> Iterator[tuple[engines.Job, EpochResult]]:
        for job in jobs:
            for result in job.run(checkpoint(job.cell.id)):
                yield job, result

    threads = torch.get_num_threads()
    monkeypatch.setattr(engines, "run_local", run)
    yield
    torch.set_num_threads(threads)


@pytest.mark.soak
@pytest.mark.usefixtures("in_process")
def test_the_whole_experiment() -> None:
    screen, page = io.StringIO(), io.StringIO()
    result = identity(
        depths=(8, 14),
        epochs=3,
        steps=5,
        stack_depths=(1, 2),
        console=Console(file=screen, force_terminal=True, width=140),
    )

    paradox = result.paradox
    assert paradox.largest_logit_difference <= 1e-5
    assert (paradox.constructed.train_error_pct, paradox.constructed.test_error_pct) == (
        paradox.shallow.train_error_pct,
        paradox.shallow.test_error_pct,
    )
    assert paradox.parameters == networks.count_parameters(networks.plain(14, in_channels=1))
    assert paradox.shallow.train_error_pct < 80
    assert paradox.trained_on != paradox.constructed
    assert paradox.further_epochs == 1
    assert "100%" in screen.getvalue()
    assert "left" in screen.getvalue()
    assert "plain-14: epoch " in screen.getvalue()
    Console(file=page, width=120).print(result)
    words = " ".join(page.getvalue().split())
    for part in (*paradox.conclusions, *result.stacks.conclusions, "digits: 1,347 training", "seed 0", "3 epochs"):
        assert " ".join(part.split()) in words
    for plain, residual in zip(result.stacks.of("plain", "he"), result.stacks.of("residual", "he"), strict=True):
        losses = f"{plain.final_loss:.2g}│{plain.distance:.2g}│{residual.final_loss:.2g}│{residual.distance:.2g}"
        assert f"│{plain.depth}│{losses}│" in page.getvalue().replace(" ", "")


@pytest.mark.usefixtures("in_process")
def test_the_command() -> None:
    result = CliRunner().invoke(
        app, ["identity", "--depths", "8,14", "--epochs", "3", "--steps", "1", "--seed", "3", "--json"]
    )
    assert result.exit_code == 0
    values = json.loads(result.stdout)
    assert values["seed"] == 3
    assert values["paradox"]["constructed"]["test_error_pct"] == values["paradox"]["shallow"]["test_error_pct"]
    assert len(values["paradox"]["conclusions"]) == 3
    assert [one["depth"] for one in values["stacks"]["stacks"] if one["init"] == "zero"] == [1, 2, 4, 8, 16, 32]


@pytest.mark.soak
def test_its_workers_do_not_wait_for_threads_of_their_parent() -> None:
    """In a process of its own, without other threads, as from a shell: then the workers are forked."""
    options = ["--depths", "8,14", "--epochs", "3", "--steps", "10"]
    command = [sys.executable, "-m", "gradprobe.cli", "identity", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "plain-14" in done.stdout
