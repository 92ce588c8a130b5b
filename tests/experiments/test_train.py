"""One cell: the recorded rows, bit-identical resumption, and the recording of small gradients."""

import io
import itertools
import math
from dataclasses import astuple, replace
from functools import partial

import numpy as np
import pytest
import torch
from helpers.few_digits import few_digits
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from gradprobe import networks
from gradprobe.errors import ArgumentError
from gradprobe.experiments import step, train
from gradprobe.experiments.evaluation import evaluate
from gradprobe.experiments.train import Recipe, train_cell
from gradprobe.nn import ResidualAdd

RECIPE = Recipe(epochs=3, batch_size=32)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data():
    return few_digits(100, 40)


def without_time(results):
    return [
        ([replace(row, seconds=0.0) for row in result.epochs], result.layers, result.junctions, result.status)
        for result in results
    ]


@pytest.fixture(scope="module")
def undisturbed(data):
    return list(train_cell("resnet", 8, 0, data, RECIPE, None))


def test_every_epoch_is_recorded_from_initialisation_on(undisturbed):
    assert [[row.epoch for row in result.epochs] for result in undisturbed] == [[0, 1], [2], [3]]
    assert [result.status for result in undisturbed] == ["pending", "pending", "done"]
    weights = [name for name, p in networks.resnet(8, in_channels=1).named_parameters() if p.ndim > 1]
    for result in undisturbed:
        for row in result.epochs:
            layers = [layer for layer in result.layers if layer.epoch == row.epoch]
            assert [layer.site for layer in layers] == weights
            assert [layer.position for layer in layers] == list(range(8))
    start, *_, end = [row for result in undisturbed for row in result.epochs]
    assert 70 < start.train_error_pct <= 100
    assert end.train_error_pct < start.train_error_pct
    assert end.train_loss < start.train_loss


@pytest.mark.parametrize("augmented", [False, True], ids=["as-they-are", "augmented"])
@pytest.mark.parametrize("cut", [1, 2])
def test_an_interrupted_cell_resumes_to_the_same_numbers_bit_for_bit(data, cut, augmented):
    data = replace(data, augmented=augmented)
    whole = list(train_cell("plain", 8, 3, data, RECIPE, None))
    rest = list(train_cell("plain", 8, 3, data, RECIPE, whole[cut - 1].state))
    assert without_time(rest) == without_time(whole[cut:])
    assert rest[-1].state == whole[-1].state


def test_the_callers_random_state_is_unchanged(data):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    next(train_cell("plain", 8, 0, data, RECIPE, None))
    assert torch.equal(torch.get_rng_state(), before)


def test_seeds_and_families_give_different_gradients(data, undisturbed):
    other_seed = next(train_cell("resnet", 8, 1, data, RECIPE, None))
    other_family = next(train_cell("plain", 8, 0, data, RECIPE, None))
    assert len({undisturbed[0].layers[0].norm_l2, other_seed.layers[0].norm_l2, other_family.layers[0].norm_l2}) == 3


def test_epoch_0_is_the_first_steps_gradient_and_later_ones_the_median(data):
    """Compares with float64 norms computed in an optimizer hook."""
    seen = []

    def note(optimizer, args, kwargs):
        seen.append([p.grad.double().norm().item() for p in optimizer.param_groups[0]["params"] if p.ndim > 1])

    hook = register_optimizer_step_pre_hook(note)
    result = next(train_cell("resnet", 8, 0, data, RECIPE, None))
    hook.remove()
    assert len(seen) == 3  # 100 images in batches of 32
    recorded = {epoch: [row.norm_l2 for row in result.layers if row.epoch == epoch] for epoch in (0, 1)}
    np.testing.assert_allclose(recorded[0], seen[0], rtol=1e-6)
    np.testing.assert_allclose(recorded[1], np.median(seen, axis=0), rtol=1e-6)


def test_the_residual_adds_are_those_of_each_epochs_first_step(data, monkeypatch):
    """Compares with the two parts of the gradient as computed by autograd."""
    passed = []

    def keep(join, operands, y):
        if torch.is_grad_enabled():
            operands[0].retain_grad()
            y.retain_grad()
            passed.append((operands[0], y))

    def build(*arguments):
        net = networks.resnet(8, in_channels=1)
        for join in (module for module in net.modules() if isinstance(module, ResidualAdd)):
            join.register_forward_hook(keep)
        return net

    monkeypatch.setattr(train, "build", build)
    results = list(train_cell("resnet", 8, 0, data, RECIPE, None))
    assert len(passed) == 3 * 3 * 3  # epochs, steps, residual adds
    names = ["stages.0.0.join", "stages.1.0.join", "stages.2.0.join"]
    for done, result in enumerate(results):
        assert [(row.epoch, row.position, row.site) for row in result.junctions] == [
            (done, position, name) for position, name in enumerate(names)
        ]
        same_shape, *others = result.junctions
        x, y = passed[9 * done]
        shortcut = (y.grad * (y > 0)).double()
        branch = x.grad.double() - shortcut
        norms = shortcut.norm().item(), branch.norm().item()
        cosine = (shortcut * branch).sum().item() / norms[0] / norms[1]
        assert (same_shape.shortcut_norm_l2, same_shape.branch_norm_l2) == pytest.approx(norms, rel=1e-5)
        assert same_shape.cosine == pytest.approx(cosine, abs=1e-5)
        assert same_shape.shortcut_share == pytest.approx(norms[0] / sum(norms), rel=1e-5)
        for row in others:  # behind a shortcut that changes the shape, the branch part is missing
            assert row.shortcut_norm_l2 > 0
            assert math.isnan(row.shortcut_share)


@pytest.mark.parametrize("augmented", [False, True], ids=["as-they-are", "augmented"])
def test_observing_residual_adds_changes_no_bit_of_the_training(data, monkeypatch, augmented):
    data = replace(data, augmented=augmented)
    observed = list(train_cell("resnet", 14, 0, data, RECIPE, None))
    monkeypatch.setattr(train, "attach", partial(train.attach, junctions=False))
    alone = list(train_cell("resnet", 14, 0, data, RECIPE, None))
    assert all(result.junctions for result in observed)
    assert not any(result.junctions for result in alone)
    assert [result.state for result in observed] == [result.state for result in alone]
    assert without_time(replace(result, junctions=()) for result in observed) == without_time(alone)


def test_residual_adds_after_an_interruption_are_the_same_bit_for_bit(data, undisturbed):
    rest = train_cell("resnet", 8, 0, data, RECIPE, undisturbed[0].state)
    for one, other in zip(rest, undisturbed[1:], strict=True):
        np.testing.assert_array_equal(*[[astuple(row)[3:] for row in result.junctions] for result in (one, other)])


def test_a_plain_network_has_no_residual_adds(data):
    assert next(train_cell("plain", 8, 0, data, RECIPE, None)).junctions == ()


@pytest.mark.parametrize(
    ("epochs", "rates"),
    [(4, [0.1, 0.1, 0.01, 0.001]), (8, [0.1] * 4 + [0.01] * 2 + [0.001] * 2), (1, [0.1])],
)
def test_the_learning_rate_drops_at_half_and_three_quarters(epochs, rates):
    recipe = Recipe(epochs=epochs, batch_size=1)
    assert [recipe.learning_rate_at(step, epochs, warming=False) for step in range(epochs)] == pytest.approx(rates)


def rates_after_each_epoch(results):
    states = [torch.load(io.BytesIO(result.state), weights_only=True) for result in results]
    return [state["optimizer"]["param_groups"][0]["lr"] for state in states]


@pytest.mark.parametrize(
    ("warmup_depth", "warmup_error_pct", "rates"),
    [(9, 80.0, [0.1, 0.01, 0.001]), (8, 101.0, [0.01, 0.01, 0.001]), (8, 0.0, [0.01, 0.001, 0.0001])],
    ids=["shallow", "warm-after-one-epoch", "never-warm"],
)
def test_deep_networks_warm_up_until_their_error_is_low_enough(data, warmup_depth, warmup_error_pct, rates):
    recipe = replace(RECIPE, warmup_depth=warmup_depth, warmup_error_pct=warmup_error_pct)
    assert rates_after_each_epoch(train_cell("plain", 8, 0, data, recipe, None)) == pytest.approx(rates)


def test_divergence_is_recorded_and_ends_the_cell(data):
    results = list(train_cell("plain", 8, 0, data, replace(RECIPE, learning_rate=1e30), None))
    assert [result.status for result in results] == ["diverged"]
    assert [row.epoch for row in results[0].epochs] == [0, 1]
    last = results[0].epochs[-1]
    assert math.isnan(last.train_loss)
    assert (last.train_error_pct, last.test_error_pct) == (100.0, 100.0)
    first_step = [row for row in results[0].layers if row.epoch == 0]
    assert all(math.isfinite(row.norm_l2) for row in first_step)
    assert max(row.nonfinite for row in results[0].layers) > 0


class Faint(nn.Module):
    """A linear network whose gradients have a given scale."""

    def __init__(self, scale):
        super().__init__()
        self.fc = nn.Linear(64, 10, bias=False)
        self.scale = scale

    def forward(self, x):
        return self.fc(x.flatten(1)) * self.scale


@pytest.mark.parametrize("scale", [1e-39, 1e-42], ids=["1e-39", "1e-42"])
def test_gradients_below_the_smallest_normal_number_are_recorded_in_every_epoch(data, monkeypatch, scale):
    monkeypatch.setattr(train, "build", lambda *_: Faint(scale))
    results = list(train_cell("plain", 8, 0, data, RECIPE, None))
    norms = [row.norm_l2 for result in results for row in result.layers]
    assert len(norms) == 4
    assert all(0.01 * scale < norm < 100 * scale for norm in norms)
    assert max(row.abs_max for result in results for row in result.layers) < torch.finfo(torch.float32).tiny


def flushes():
    return (torch.tensor([1e-39]) * 1.0).item() == 0.0


@pytest.mark.parametrize(("scale", "expected"), [(1.0, True), (1e-39, False)], ids=["ordinary", "faint"])
def test_denormals_are_flushed_only_after_a_first_step_without_small_gradients(data, monkeypatch, scale, expected):
    seen = []
    net = Faint(scale)
    net.register_forward_pre_hook(lambda *_: seen.append(flushes()) if net.training else None)
    monkeypatch.setattr(train, "build", lambda *_: net)
    for _ in train_cell("plain", 8, 0, data, replace(RECIPE, epochs=1), None):
        assert not flushes()
    # Evaluation comes first (over both sets), then three steps.
    assert seen[-3:] == [False, expected, expected]


@pytest.mark.parametrize("ends", ["closed", "fails"])
def test_a_cell_that_ends_within_an_epoch_leaves_denormals_alone(data, monkeypatch, ends):
    net = Faint(1.0)
    calls = itertools.count()

    def forward(*_):
        if torch.is_grad_enabled() and next(calls) == 2:
            assert flushes()
            raise ValueError("the third step")

    net.register_forward_pre_hook(forward)
    monkeypatch.setattr(train, "build", lambda *_: net)
    results = train_cell("plain", 8, 0, data, RECIPE, None, progress_every_s=0.0)
    assert [next(results).share for _ in range(2)] == [pytest.approx(1 / 3), pytest.approx(2 / 3)]
    if ends == "closed":
        results.close()
    else:
        with pytest.raises(ValueError, match="the third step"):
            next(results)
    assert not flushes()


def test_evaluation_leaves_the_network_unchanged(data):
    model = networks.resnet(8, in_channels=1)
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for by_batch in (True, False):
        evaluate(model, data.test_x, data.test_y, by_batch=by_batch)
        assert model.training
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_error_is_the_share_of_wrong_predictions():
    class Says(nn.Module):
        def forward(self, x):
            return x[:, :, 0, 0]

    logits = torch.eye(4)[torch.tensor([0, 1, 2, 2, 2])][:, :, None, None]
    logits[4] = math.nan
    assert evaluate(Says(), logits, torch.tensor([0, 1, 2, 3, 2])) == (pytest.approx(math.nan, nan_ok=True), 40.0)


def test_fewer_images_than_a_batch_are_one_step(data):
    small = replace(data, train_x=data.train_x[:5], train_y=data.train_y[:5])
    assert [result.status for result in train_cell("plain", 8, 0, small, replace(RECIPE, epochs=1), None)] == ["done"]


@pytest.mark.parametrize("options", [{"epochs": 0}, {"batch_size": 0}, {"epochs": -3}], ids=str)
def test_a_recipe_without_steps_is_rejected(options):
    ((name, value),) = options.items()
    with pytest.raises(ArgumentError, match=f"{name}: needed at least 1, got {value}"):
        Recipe(**{"epochs": 1, "batch_size": 1, **options})


def test_an_unknown_family_is_rejected_with_the_known_ones(data):
    with pytest.raises(ArgumentError, match=r"families: needed one or more of plain, resnet, fixup, .*, got 'vgg'"):
        next(train_cell("vgg", 8, 0, data, RECIPE, None))


def test_the_optimizer_computes_what_torchs_computes(data):
    def trained(make):
        torch.manual_seed(0)
        model = networks.resnet(8, in_channels=1)
        optimizer = make(model)
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(data.train_x), data.train_y).backward()
            optimizer.step()
        return model.state_dict(), optimizer.state_dict()

    (model, ours), (expected, theirs) = (
        trained(make)
        for make in (
            lambda model: train.make_optimizer(model, RECIPE),
            lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, fused=True),
        )
    )
    assert all(torch.equal(model[name], value) for name, value in expected.items())
    assert ours["param_groups"] == theirs["param_groups"]
    for index, state in theirs["state"].items():
        assert torch.equal(ours["state"][index]["momentum_buffer"], state["momentum_buffer"])


def test_the_whole_training_set_is_evaluated_before_the_first_step_and_after_the_last(undisturbed):
    rows = [row for result in undisturbed for row in result.epochs]
    assert [row.is_running for row in rows] == [False, True, True, False]
    assert [math.isnan(row.train_loss) for row in rows] == [False, True, True, False]
    assert [math.isnan(row.running_error_pct) for row in rows] == [True, False, False, False]
    assert all(0 <= row.test_error_pct <= 100 for row in rows)


def test_the_running_error_is_that_of_the_epochs_steps(data, monkeypatch):
    seen, count = [], step.n_right
    monkeypatch.setattr(step, "n_right", lambda *pair: seen.append(pair) or count(*pair))
    row = next(train_cell("resnet", 8, 0, data, RECIPE, None)).epochs[-1]
    logits, labels = map(torch.cat, zip(*seen[:3], strict=True))
    assert len(labels) == 96
    assert row.running_error_pct == pytest.approx(100 * (logits.argmax(dim=1) != labels).double().mean().item())
    assert row.running_loss == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)


def test_evaluating_the_whole_training_set_changes_no_other_number(data, undisturbed):
    every = list(train_cell("resnet", 8, 0, data, RECIPE, None, whole_train_error=True))
    assert [result.state for result in every] == [result.state for result in undisturbed]
    rows, others = ([row for result in results for row in result.epochs] for results in (every, undisturbed))
    assert not any(row.is_running or math.isnan(row.train_loss) for row in rows)
    for row, other in zip(rows, others, strict=True):
        measured = other if not other.is_running else row
        expected = replace(other, train_loss=measured.train_loss, train_error_pct=measured.train_error_pct)
        assert replace(row, seconds=0.0) == replace(expected, seconds=0.0)
