"""Models instrumented without an example: traced at their first forward, and taken up by the probe."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import MethodType

import pytest
import torch
from helpers.inline_cases import Decoder, TimmBlock, TimmViT
from torch import Tensor, nn

import gradprobe
from gradprobe.nn.first_forward import call_at_first_forward, is_waiting

TOKENS = torch.linspace(-2, 2, 4 * 5 * 8).reshape(4, 5, 8).sin()
WAITING = "to be traced at the first forward"


def net() -> nn.Module:
    torch.manual_seed(0)
    return TimmViT(8)


def trained(model: nn.Module, n_steps: int = 3) -> list[Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    torch.manual_seed(1)
    for _ in range(n_steps):
        optimizer.zero_grad()
        model(TOKENS).square().mean().backward()
        optimizer.step()
    return [*(p.detach().clone() for p in model.parameters()), torch.get_rng_state()]


def are_equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("activations", [False, True])
@pytest.mark.parametrize("attaches_first", [False, True])
def test_a_probe_takes_up_what_the_first_forward_shows(attaches_first: bool, activations: bool) -> None:
    model = net()
    names = gradprobe.instrument(net(), TOKENS).junctions
    if attaches_first:
        probe = gradprobe.attach(model, activations=activations)
    report = gradprobe.instrument(model)
    if not attaches_first:
        probe = gradprobe.attach(model, activations=activations)
    assert (report.is_waiting, str(report)) == (True, WAITING)
    assert are_equal(trained(model), trained(net()))
    assert report.junctions == names
    first, *_, last = probe.history()
    assert set(first.junctions) == set(last.junctions) == set(names)
    plain = net()
    with gradprobe.attach(plain, activations=activations) as other:
        trained(plain)
    assert list(first.activations) == list(other.history()[0].activations)
    assert [one.output.numel for one in first.activations.values()] == [
        one.output.numel for one in other.history()[0].activations.values()
    ]
    report.undo()
    assert not is_waiting(model)


def evaluated(model: nn.Module) -> None:
    model.eval()


@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("change", [nn.Module.train, evaluated])
def test_any_first_forward_will_do(
    mode: Callable[[], AbstractContextManager[None]], change: Callable[[nn.Module], object]
) -> None:
    model, plain = net(), net()
    change(model)
    change(plain)
    report = gradprobe.instrument(model)
    state = torch.get_rng_state()
    with mode():
        seen = model(TOKENS * 1)
        torch.set_rng_state(state)
        assert torch.equal(seen, plain(TOKENS * 1))
    assert len(report.junctions) == 4
    assert are_equal(trained(model.train()), trained(plain.train()))


class Counts(nn.Module):
    """Keeps state of every kind that a forward may write to."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(5)
        self.seen: list[int] = []
        self.by_name: dict[str, int] = {}
        self.average = torch.zeros(8)

    def forward(self, x: Tensor, cache: list[Tensor] | None = None, holder: object = None) -> Tensor:
        self.seen.append(len(x))
        self.by_name[str(len(self.by_name))] = 1
        self.average += x.mean((0, 1))
        if cache is not None:
            cache.append(x)
        if isinstance(holder, Holder):
            holder.items.append(x)
        x *= 2
        return x + self.norm(self.layer(x))


class Holder:
    """A cache of keys and values, as decoders are given."""

    def __init__(self) -> None:
        self.items: list[Tensor] = []


def test_the_model_and_its_arguments_are_written_to_once() -> None:
    model, plain = Counts(), Counts()
    plain.load_state_dict(model.state_dict())
    report = gradprobe.instrument(model)
    for each in (model, plain):
        batch, cache, holder = TOKENS.clone(), [TOKENS], Holder()
        each(batch, cache, holder=holder)
        assert torch.equal(batch, 2 * TOKENS)
        assert (len(cache), len(holder.items), each.seen, each.by_name) == (2, 1, [4], {"0": 1})
    assert torch.equal(model.average, plain.average)
    assert torch.equal(model.norm.running_mean, plain.norm.running_mean)
    assert report.junctions == ("norm+",)


def test_hooks_of_the_model_run_on_their_own_results_once() -> None:
    model, plain = net(), net()
    for each in (model.eval(), plain.eval()):
        each.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    gradprobe.instrument(model)
    assert torch.equal(model(TOKENS), plain(TOKENS))
    model, calls = TimmBlock(8), []
    model.register_forward_pre_hook(lambda module, args: calls.append(args))
    gradprobe.instrument(model)
    model(TOKENS)
    assert len(calls) == 1


def wrapped(model: nn.Module) -> None:
    """Wraps the forward as libraries for mixed precision do."""
    forward = model.forward
    model.forward = functools.wraps(forward)(lambda *args: forward(*args))  # type: ignore[method-assign]


def test_a_forward_that_is_wrapped_meanwhile_stays_wrapped() -> None:
    model, plain = TimmBlock(8), TimmBlock(8)
    plain.load_state_dict(model.state_dict())
    report = gradprobe.instrument(model)
    wrapped(model)
    outer = vars(model)["forward"]
    probe = gradprobe.attach(model)
    for _ in range(2):
        assert torch.equal(model(TOKENS), plain(TOKENS))
    assert vars(model)["forward"] is outer
    model(TOKENS).sum().backward()
    probe.step()
    assert len(report.junctions) == 2
    assert set(probe.latest().junctions) == set(report.junctions)


def test_wrong_arguments_raise_as_ever_and_the_next_call_is_traced() -> None:
    model = net()
    report = gradprobe.instrument(model)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(torch.ones(4, 5, 3))
    assert report.is_waiting
    model(TOKENS)
    assert len(report.junctions) == 4


class Refusing(TimmBlock):
    """Cannot run on stand-ins for its parameters."""

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(self.norm1.weight, nn.Parameter):
            raise TypeError("needed a parameter")
        return super().forward(x)


def test_a_model_that_cannot_be_traced_says_so_once_and_runs() -> None:
    model = Refusing(8)
    report = gradprobe.instrument(model)
    with pytest.warns(gradprobe.GradprobeWarning, match=r"adds of Refusing could not be traced.*needed a param"):
        model(TOKENS)
    model(TOKENS)
    assert "could not be traced: " in report.unseen[""]
    assert (report.is_waiting, report.junctions, is_waiting(model)) == (False, (), False)


def test_undo_and_a_second_call_before_the_first_forward() -> None:
    model = net()
    report = gradprobe.instrument(model)
    with pytest.raises(gradprobe.ArgumentError, match="one that is not instrumented yet"):
        gradprobe.instrument(nn.Sequential(model), TOKENS)
    report.undo()
    assert "forward" not in vars(model)
    model(TOKENS)
    assert (report.junctions, str(report)) == ((), "no residual additions found")


def test_copies_wait_for_their_own_forward_and_pickles_are_plain() -> None:
    model = net()
    report = gradprobe.instrument(model)
    twin, loaded = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    twin(TOKENS)
    assert len([name for name, _ in twin.named_modules() if name.endswith("+")]) == 4
    assert report.is_waiting
    model(TOKENS)
    assert not is_waiting(loaded)
    assert torch.equal(loaded.eval()(TOKENS), model.eval()(TOKENS))


TRANSLATIONS: dict[str, Callable[[nn.Module], object]] = {
    "compiled": lambda model: torch.compile(model, backend="eager", fullgraph=True)(TOKENS),
    "traced": lambda model: torch.jit.trace(model, TOKENS, check_trace=False),
    "exported": lambda model: torch.export.export(model, (TOKENS,)),
    "fx": lambda model: torch.fx.symbolic_trace(model),
    "vmap": lambda model: torch.vmap(model)(TOKENS.unsqueeze(0)),
}


@pytest.mark.parametrize("how", TRANSLATIONS)
def test_translations_run_as_before_and_do_not_count(how: str) -> None:
    torch._dynamo.reset()
    model = TimmBlock(8)
    report = gradprobe.instrument(model)
    TRANSLATIONS[how](model)
    assert report.is_waiting
    model(TOKENS)
    assert len(report.junctions) == 2
    assert torch.equal(model(TOKENS), torch.compile(model, backend="eager", fullgraph=True)(TOKENS))


def test_a_lazy_model_is_traced_once_it_is_whole() -> None:
    model = nn.Sequential(nn.LazyLinear(8), TimmBlock(8))
    report = gradprobe.instrument(model)
    model(TOKENS)
    assert report.is_waiting
    model(TOKENS)
    assert len(report.junctions) == 2


def test_keyword_arguments_and_outputs_that_hold_tensors() -> None:
    model = Decoder(8)
    report = gradprobe.instrument(model)
    mask = torch.zeros(5, 5)
    assert len(model(inputs=TOKENS, attention_mask=mask)) == 2
    assert len(report.junctions) == 4


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("wraps_first", [False, True])
@pytest.mark.usefixtures("one_process")
def test_data_parallel_training(wraps_first: bool) -> None:
    inner = net()
    if wraps_first:
        model = nn.parallel.DistributedDataParallel(inner)
        report = gradprobe.instrument(model)
    else:
        report = gradprobe.instrument(inner)
        model = nn.parallel.DistributedDataParallel(inner)
    probe = gradprobe.attach(model)
    model(TOKENS).square().mean().backward()
    probe.step()
    assert len(report.junctions) == 4
    assert {name.removeprefix("module.") for name in probe.latest().junctions} == {
        name.removeprefix("module.") for name in report.junctions
    }


@pytest.mark.usefixtures("one_process")
def test_a_sharded_model_needs_an_example_before() -> None:
    model = net()
    report = gradprobe.instrument(model)
    torch.distributed.fsdp.fully_shard(model)
    with pytest.warns(gradprobe.GradprobeWarning, match="one that is not sharded yet: instrument it before, with"):
        model(TOKENS)
    assert "not sharded yet" in report.unseen[""]
    with pytest.raises(gradprobe.ArgumentError, match="model: needed one that is not sharded yet"):
        gradprobe.instrument(model, TOKENS)
    model(TOKENS).sum().backward()


@pytest.mark.filterwarnings("ignore:FSDP is switching:UserWarning")
@pytest.mark.parametrize("use_orig_params", [False, True])
@pytest.mark.usefixtures("one_process")
def test_a_model_that_is_sharded_as_a_whole_is_refused(use_orig_params: bool) -> None:
    model, plain = net(), net()
    report = gradprobe.instrument(model)
    sharded, other = (
        torch.distributed.fsdp.FullyShardedDataParallel(
            one, use_orig_params=use_orig_params, device_id=torch.device("cpu")
        )
        for one in (model, plain)
    )
    with pytest.warns(gradprobe.GradprobeWarning, match="one that is not sharded yet: instrument it before, with"):
        sharded(TOKENS)
    other(TOKENS)
    assert "not sharded yet" in report.unseen[""]
    assert are_equal(trained(sharded), trained(other))


def test_residual_adds_that_come_and_go_while_training() -> None:
    model = net()
    with gradprobe.attach(model) as probe:
        trained(model, 2)
        report = gradprobe.instrument(model, TOKENS)
        trained(model, 2)
        report.undo()
        trained(model, 2)
        assert [len(one.junctions) for one in probe.history()] == [0, 0, 4, 4, 0, 0]
        assert probe.findings().n_steps == 6
        assert probe.coverage().failures == {}
        model(TOKENS).sum().backward()
        report = gradprobe.instrument(model, TOKENS)
        model(TOKENS).sum().backward()  # of the same step, which has begun without them
        probe.step()
        trained(model, 3)
        n_junctions = [len(one.junctions) for one in probe.history()][6:]
        assert (n_junctions[0], n_junctions[-1]) == (0, 4), n_junctions


@pytest.mark.parametrize("when", ["auto", "hook", "step"])
def test_a_step_in_which_residual_adds_appear_keeps_its_loss_and_its_updates(
    when: str, recwarn: pytest.WarningsRecorder
) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with gradprobe.attach(model, optimizer=optimizer, updates=True, when=when, strict=True) as probe:
        for step in range(5):
            optimizer.zero_grad()
            loss = model(TOKENS).square().mean()
            loss.backward()
            if step == 2:
                gradprobe.instrument(model, TOKENS)
            optimizer.step()
            probe.step(loss)
        history = probe.history()
    assert [one.step for one in history] == [0, 1, 2, 3, 4]
    assert all(one.loss is not None for one in history)
    n_parameters = len(list(model.parameters()))
    assert [len(one.sites) for one in history] == [n_parameters] * 5
    assert [len(one.updates) for one in history] == [n_parameters] * 5
    assert [len(one.junctions) for one in history] == [0, 0, 0, 0, 4]
    assert not any("returned nothing" in str(one.message) for one in recwarn)


def test_residual_adds_that_are_made_anew_within_a_step_are_followed() -> None:
    model = net()
    report = gradprobe.instrument(model, TOKENS)
    with gradprobe.attach(model) as probe:
        trained(model, 1)
        model(TOKENS).sum().backward()
        report.undo()
        gradprobe.instrument(model, TOKENS)
        probe.step()
        trained(model, 3)
        assert len(probe.history()[-1].junctions) == 4


def test_a_copy_that_cannot_be_traced_keeps_a_forward_of_its_own() -> None:
    def double(self: nn.Module, x: Tensor) -> Tensor:
        return 2.0 * x * self.weight

    model = nn.Linear(1, 1, bias=False)
    vars(model)["forward"] = MethodType(double, model)
    tries = []

    def fail(*_: object) -> None:
        tries.append(1)
        raise RuntimeError("cannot be traced")

    call_at_first_forward(model, fail, lambda called, error: None)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model.weight.fill_(1.0)
        twin.weight.fill_(5.0)
    x = torch.ones(1, 1)
    assert [twin(x).item(), twin(x).item(), model(x).item(), model(x).item()] == [10.0, 10.0, 2.0, 2.0]
    assert len(tries) == 2


def test_undo_restores_the_wrapper_that_was_there_before() -> None:
    model = net()
    original = model.forward

    @functools.wraps(original)
    def wrapper(*args: object, **keywords: object) -> Tensor:
        return original(*args, **keywords)

    vars(model)["forward"] = wrapper
    report = gradprobe.instrument(model)
    model(TOKENS)
    assert report.junctions != ()
    report.undo()
    assert vars(model)["forward"] is wrapper
