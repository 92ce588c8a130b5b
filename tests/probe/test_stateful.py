"""A training with probes against the same training without: any order of calls, bit for bit, and float64 numbers.

A failure prints the calls that lead to it. `STATEFUL_EXAMPLES` and `STATEFUL_SEED` choose another number of runs and
other runs: `STATEFUL_EXAMPLES=10000 STATEFUL_SEED=7 pytest tests/probe/test_stateful.py`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.probe_twins import (
    KINDS,
    Gradients,
    Kind,
    Twin,
    Version,
    Watch,
    Wrapped,
    deep_copied,
    gradients_of,
    in_thread,
    named_versions_of,
    parametrized,
    pickled,
    versions_of,
)
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import gradprobe
from gradprobe.ops import libraries
from gradprobe.probe import step_gradients

N_EXAMPLES = int(os.environ.get("STATEFUL_EXAMPLES", "2000" if os.environ.get("CI") else "100"))
SEED = int(os.environ.get("STATEFUL_SEED", "0"))

SEEDS = st.integers(0, 7)
OPTIONS = st.fixed_dictionaries(
    {
        "given": st.sampled_from(["none", "one", "list", "wrapped"]),
        "knows_scaler": st.booleans(),
        "when": st.sampled_from(["auto", "auto", "auto", "step", "backward", "hook"]),
        "every": st.sampled_from([1, 1, 1, 2, 3]),
        "activations": st.sampled_from([False, True, ["blocks.*", "*"]]),
        "junctions": st.booleans(),
        "updates": st.booleans(),
        "capacity": st.sampled_from([1, 2, 3, 1024]),
    }
)
PATHS = ("", "blocks", "extra")


class Planted(RuntimeError):
    """Raised by the user's hooks."""


def _raise(*_: object) -> None:
    raise Planted("planted")


class Training(RuleBasedStateMachine):
    """The calls of a training loop, on both twins."""

    def __init__(self) -> None:
        super().__init__()
        self.watches: list[Watch] = []
        self.given: dict[int, Gradients] = {}  # what the bare optimizers got last, by position
        self.given_versions: dict[str, Version] = {}  # of the gradients at the last step of a bare optimizer
        self.native_hooks, self.any_in_use = libraries.native_hooks, step_gradients.any_in_use
        step_gradients.any_in_use = lambda: False  # it searches the whole heap
        self.handle = register_optimizer_step_pre_hook(self._note_given)

    @initialize(
        kind=st.sampled_from(KINDS),
        start=SEEDS,
        optimizer=st.sampled_from(["sgd", "adamw", "nesterov", "lbfgs"]),
        n=st.sampled_from([1, 1, 2]),
        native=st.booleans(),
        reads=st.booleans(),
        options=OPTIONS,
    )
    def begin(
        self, kind: Kind, start: int, optimizer: str, n: int, native: bool, reads: bool, options: dict[str, Any]
    ) -> None:
        if not native:
            libraries.native_hooks = lambda: (None, "switched off by a test")
        self.bare, self.observed = Twin(kind, start), Twin(kind, start)
        for twin in (self.bare, self.observed):
            twin.make_optimizers(optimizer, 1 if optimizer == "lbfgs" else n)
        self.reads_always = reads
        self._attach("", **options)

    def teardown(self) -> None:
        libraries.native_hooks, step_gradients.any_in_use = self.native_hooks, self.any_in_use
        self.handle.remove()
        for watch in self.watches:
            watch.probe.detach()

    # ------------------------------------------------------------------ probes

    @precondition(lambda self: len(self.watches) < 2)
    @rule(
        path=st.sampled_from(PATHS),
        options=OPTIONS,
    )
    def attach(self, path: str, options: dict[str, Any]) -> None:
        self._attach(path, **options)

    @precondition(lambda self: self.watches)
    @rule(which=SEEDS)
    def detach(self, which: int) -> None:
        watch = self.watches.pop(which % len(self.watches))
        watch.probe.detach()
        watch.probe.detach()
        watch.read()
        watch.pauses.clear()

    @precondition(lambda self: self.watches)
    @rule(which=SEEDS)
    def pause(self, which: int) -> None:
        watch = self.watches[which % len(self.watches)]
        pause = watch.probe.paused()
        pause.__enter__()
        watch.pauses.append(pause)
        watch.forget()

    @precondition(lambda self: any(watch.pauses for watch in self.watches))
    @rule(which=SEEDS)
    def resume(self, which: int) -> None:
        paused = [watch for watch in self.watches if watch.pauses]
        watch = paused[which % len(paused)]
        watch.pauses.pop().__exit__(None, None, None)
        watch.forget()

    @precondition(lambda self: self.watches)
    @rule(which=SEEDS, what=st.sampled_from(["history", "latest", "coverage", "findings", "first_nonfinite", "repr"]))
    def read(self, which: int, what: str) -> None:
        watch = self.watches[which % len(self.watches)]
        if what == "history":
            watch.read()
        elif what == "repr":
            repr(watch.probe)
        else:
            getattr(watch.probe, what)()

    # ------------------------------------------------------------------ gradients

    @rule(start=SEEDS, uses_extra=st.booleans(), factor=st.sampled_from([1.0, 1.0, 1e3, 1e-3]))
    def backward(self, start: int, uses_extra: bool, factor: float) -> None:
        self._backward(lambda twin: (loss_of(twin, start, uses_extra) * factor).backward())

    @rule(
        start=SEEDS,
        uses_extra=st.booleans(),
        how=st.sampled_from(["thread", "inputs", "grad", "twice", "no_grad", "forward only", "checkpointed", "eval"]),
    )
    def unusual_backward(self, start: int, uses_extra: bool, how: str) -> None:
        def act(twin: Twin) -> None:
            model = twin.model
            if how == "thread":
                in_thread(lambda: loss_of(twin, start, uses_extra).backward())
            elif how == "inputs":
                loss_of(twin, start, uses_extra).backward(inputs=[model.blocks[0].weight, *model.extra.parameters()])
            elif how == "grad":
                torch.autograd.grad(loss_of(twin, start, uses_extra), model.blocks[0].weight)
            elif how == "twice":
                loss = loss_of(twin, start, uses_extra)
                loss.backward(retain_graph=True)
                loss.backward()
            elif how == "no_grad":
                with torch.no_grad():
                    loss_of(twin, start, uses_extra)
            elif how == "forward only":
                loss_of(twin, start, uses_extra)
            elif how == "checkpointed":
                torch.utils.checkpoint.checkpoint(loss_of, twin, start, uses_extra, use_reentrant=False).backward()
            elif how == "eval":
                model.eval()
                try:
                    loss_of(twin, start, uses_extra).backward()
                finally:
                    model.train()

        self._backward(act, n=2 if how == "twice" else 1)

    @rule(start=SEEDS, where=st.sampled_from(["forward", "backward", "module backward"]), block=SEEDS)
    def failing_backward(self, start: int, where: str, block: int) -> None:
        def act(twin: Twin) -> None:
            module = twin.model.blocks[block % len(twin.model.blocks)]
            if where == "forward":
                handle = module.register_forward_hook(_raise)
            elif where == "backward":
                handle = next(p for p in twin.model.stem.parameters() if p.requires_grad).register_hook(_raise)
            else:
                handle = module.register_full_backward_hook(_raise)
            try:
                loss_of(twin, start, True).backward()
            finally:
                handle.remove()

        self._backward(act)

    @rule(to_none=st.booleans())
    def zero_grad(self, to_none: bool) -> None:
        self.both(lambda twin: twin.model.zero_grad(set_to_none=to_none))

    @rule(max_norm=st.sampled_from([1e-3, 0.1, 1e6]))
    def clip_norm(self, max_norm: float) -> None:
        self.both(lambda twin: nn.utils.clip_grad_norm_(twin.model.parameters(), max_norm))

    @rule(value=st.sampled_from([1e-4, 1e-2, 1e6]))
    def clip_value(self, value: float) -> None:
        self.both(lambda twin: nn.utils.clip_grad_value_(twin.model.parameters(), value))

    @precondition(lambda self: any(not watch.is_gone for watch in self.watches))
    @rule(which=SEEDS, max_norm=st.sampled_from([1e-3, 0.1, 1e6]))
    def clip_by_probe(self, which: int, max_norm: float) -> None:
        alive = [watch for watch in self.watches if not watch.is_gone]
        watch = alive[which % len(alive)]
        if watch.has_failed:
            return  # the probe does not know which gradients a failed backward pass has reached
        if watch.at_end is None and not watch.is_murky:
            watch.at_end = gradients_of(self.bare.model.get_submodule(watch.path))
        total = watch.probe.clip_grad_norm_(max_norm)
        bare, observed = self.bare.model.get_submodule(watch.path), self.observed.model.get_submodule(watch.path)
        expected = nn.utils.clip_grad_norm_(bare.parameters(), max_norm)
        gradients = [p.grad for p in bare.parameters() if p.grad is not None]
        rounding = max([1e-5, *(8 * torch.finfo(gradient.dtype).eps for gradient in gradients)])
        torch.testing.assert_close(total.double(), expected.double(), rtol=rounding, atol=1e-30, equal_nan=True)
        for theirs, ours in zip(bare.parameters(), observed.parameters(), strict=True):
            assert (theirs.grad is None) == (ours.grad is None)
            if theirs.grad is not None and ours.grad is not None:
                tiny = torch.finfo(ours.grad.dtype).smallest_normal
                torch.testing.assert_close(ours.grad, theirs.grad, rtol=rounding, atol=tiny, equal_nan=True)
                theirs.grad.copy_(ours.grad)  # the two sum in another order

    # ------------------------------------------------------------------ steps

    @rule(which=SEEDS)
    def step(self, which: int) -> None:
        chosen = range(len(self.bare.optimizers)) if which % 4 else [which % len(self.bare.optimizers)]
        for k in chosen:
            self._step(k, lambda twin, k=k: twin.optimizers[k].step())

    @rule(which=SEEDS, start=SEEDS, uses_extra=st.booleans(), clips=st.booleans(), n=st.sampled_from([1, 1, 2]))
    def step_with_closure(self, which: int, start: int, uses_extra: bool, clips: bool, n: int) -> None:
        k = which % len(self.bare.optimizers)

        def act(twin: Twin) -> None:
            optimizer = twin.optimizers[k]

            def closure() -> torch.Tensor:
                optimizer.zero_grad()
                for part in range(n):
                    loss = loss_of(twin, start + part, uses_extra)
                    before = versions_of(twin.model)
                    loss.backward()
                    if twin is self.bare:
                        self._note_backward(before)
                if clips:
                    nn.utils.clip_grad_norm_(twin.model.parameters(), 0.01)
                if twin is self.bare:
                    self._note_given(optimizer)
                return loss

            optimizer.step(closure)

        self._step(k, act, has_closure=True)

    @rule(
        start=SEEDS,
        uses_extra=st.booleans(),
        overflows=st.booleans(),
        unscales=st.booleans(),
        clips=st.booleans(),
        reads=st.booleans(),
        n=st.sampled_from([1, 1, 2]),
    )
    def scaled_step(
        self, start: int, uses_extra: bool, overflows: bool, unscales: bool, clips: bool, reads: bool, n: int
    ) -> None:
        scale = float(self.bare.scaler.get_scale())
        self.both(lambda twin: twin.model.zero_grad())
        for part in range(n):
            is_bad = overflows and part == n - 1

            def act(twin: Twin, part: int = part, is_bad: bool = is_bad) -> None:
                loss = loss_of(twin, start + part, uses_extra) * (float("inf") if is_bad else 1.0)
                twin.scaler.scale(loss).backward()

            self._backward(act, scale=scale)
        if unscales:
            for k in range(len(self.bare.optimizers)):
                self.both(lambda twin, k=k: twin.scaler.unscale_(twin.optimizers[k]))
            if clips:
                self.clip_norm(0.1)
        for k in range(len(self.bare.optimizers)):
            self._step(k, lambda twin, k=k: twin.scaler.step(twin.optimizers[k]), is_scaled=True)
        if reads:
            self._read_all()
        self.both(lambda twin: twin.scaler.update())
        for watch in self.watches:
            watch.is_murky = True  # a step that was skipped is closed when it is noticed
            watch.n_skipped += 1

    @precondition(lambda self: any(not watch.is_gone for watch in self.watches))
    @rule(which=SEEDS, loss=st.sampled_from([None, 0.5, "tensor"]))
    def step_of_probe(self, which: int, loss: Any) -> None:
        alive = [watch for watch in self.watches if not watch.is_gone]
        self._step_of_probe(alive[which % len(alive)], loss)

    @rule(
        start=SEEDS,
        uses_extra=st.booleans(),
        n=st.sampled_from([1, 1, 1, 2]),
        clip=st.sampled_from([0.0, 0.0, 0.01]),
        loss=st.booleans(),
        to_none=st.booleans(),
    )
    def whole_step(self, start: int, uses_extra: bool, n: int, clip: float, loss: bool, to_none: bool) -> None:
        self.zero_grad(to_none)
        for part in range(n):
            self.backward(start + part, uses_extra, 1.0)
        if clip:
            self.clip_norm(clip)
        self.step(1)
        if loss:
            for watch in self.watches:
                if not watch.is_gone:
                    self._step_of_probe(watch, 0.5)

    # ------------------------------------------------------------------ the model changes

    @rule(dtype=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]))
    def cast(self, dtype: torch.dtype) -> None:
        def act(twin: Twin) -> None:
            twin.model.to(dtype)
            for parameter in twin.model.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(1.0)  # a cast back and forth rounds the gradients and leaves no trace

        self._change(act)

    @rule(which=SEEDS, trains=st.booleans())
    def freeze(self, which: int, trains: bool) -> None:
        def act(twin: Twin) -> None:
            parameters = list(twin.model.parameters())
            parameters[which % len(parameters)].requires_grad_(trains)

        self._change(act)

    @rule(how=st.sampled_from(["replace", "add", "remove", "parametrize", "tie"]), which=SEEDS, rebuilds=st.booleans())
    def surgery(self, how: str, which: int, rebuilds: bool) -> None:
        def act(twin: Twin) -> None:
            blocks = twin.model.blocks
            k = which % len(blocks)
            if how == "replace":
                blocks[k] = nn.Linear(4, 4)
            elif how == "add" and len(blocks) < 4:
                blocks.append(nn.Linear(4, 4))
            elif how == "remove" and len(blocks) > 1:
                # `del` alone gives a probe no sign; it looks from time to time
                twin.model.blocks = nn.ModuleList(block for block in blocks if block is not blocks[k])
            elif how == "parametrize":
                parametrized(blocks[k])
            elif how == "tie":
                blocks[k].bias = blocks[0].bias
            if rebuilds:
                twin.make_optimizers("sgd", 1)

        self._change(act, rebuilds)
        for watch in self.watches:
            watch.is_gone |= how == "remove" and watch.path == "blocks"  # it observes the old list

    @rule(optimizer=st.sampled_from(["sgd", "adamw", "nesterov", "lbfgs"]))
    def rebuild_optimizer(self, optimizer: str) -> None:
        self._change(lambda twin: twin.make_optimizers(optimizer, 1), rebuilds=True)

    @rule()
    def save(self) -> None:
        def act(twin: Twin) -> None:
            twin.saved = {name: part.clone() for name, part in twin.model.state_dict().items()}

        self.both(act)

    @rule(assign=st.booleans())
    def load(self, assign: bool) -> None:
        def act(twin: Twin) -> None:
            saved = {name: part.clone() for name, part in twin.saved.items()}
            twin.model.load_state_dict(saved, assign=assign, strict=False)

        self._change(act)

    @rule(how=st.sampled_from([deep_copied, pickled]), detaches=st.booleans())
    def go_on_with_a_copy(self, how: Callable[[Twin], None], detaches: bool) -> None:
        before = self.observed.model
        self.both(how)
        if self.observed.model is before:
            return  # it cannot be copied
        for watch in self.watches:
            if detaches:
                watch.probe.detach()
            watch.read()
            watch.is_gone = True

    # ------------------------------------------------------------------ what must hold

    @invariant()
    def twins_are_equal(self) -> None:
        bare, observed = self.bare.state(), self.observed.state()
        assert bare.keys() == observed.keys()
        different = [name for name, value in bare.items() if observed[name] != value]
        assert different == [], f"not as without a probe: {different}"

    @invariant()
    def numbers_are_right(self) -> None:
        if self.reads_always:
            self._read_all()

    def both(self, action: Callable[[Twin], Any]) -> Exception | None:
        """Runs an action on both twins; they must raise the same, which is returned."""
        _, expected = self.bare.run(action)
        _, error = self.observed.run(action)
        if (type(error), str(error)) != (type(expected), str(expected)):
            raise AssertionError(f"raised {error!r}, without a probe {expected!r}") from error
        return expected

    def _attach(self, path: str, given: str, knows_scaler: bool, **options: Any) -> None:
        module = self.observed.model.get_submodule(path)
        optimizers = self.observed.optimizers
        chosen = {
            "none": None,
            "one": optimizers[0],
            "list": optimizers,
            "wrapped": Wrapped(optimizers[0]),
        }[given]
        positions = {"none": (), "list": tuple(range(len(optimizers)))}.get(given, (0,))
        if path and options["activations"]:
            options["activations"] = path == "blocks"
        if knows_scaler:
            options["grad_scaler"] = self.observed.scaler
        stepped = {id(p) for k in positions for group in optimizers[k].param_groups for p in group["params"]}
        is_known = any(watch.path == path and not watch.is_gone for watch in self.watches)
        is_frozen = not any(p.requires_grad for p in module.parameters())
        steps_none = not any(id(p) in stepped for p in module.parameters() if p.requires_grad)
        if is_known or is_frozen or (positions and steps_none):
            with pytest.raises(gradprobe.ArgumentError):
                gradprobe.attach(module, optimizer=chosen, strict=True, **options)
            return
        probe = gradprobe.attach(module, optimizer=chosen, strict=True, **options)
        self.watches.append(Watch(probe, path, options, positions))

    def _read_all(self) -> None:
        for watch in self.watches:
            watch.read()

    def _backward(self, action: Callable[[Twin], Any], *, scale: float = 1.0, n: int = 1) -> None:
        before = versions_of(self.bare.model)
        error = self.both(action)
        self._note_backward(before, error is not None, scale, n)

    def _note_backward(
        self, before: list[tuple[int, int] | None], has_failed: bool = False, scale: float = 1.0, n: int = 1
    ) -> None:
        changed = {
            id(p)
            for p, was, now in zip(self.bare.model.parameters(), before, versions_of(self.bare.model), strict=True)
            if was != now
        }
        for watch in self.watches:
            module = self.bare.model.get_submodule(watch.path)
            if not watch.is_gone and any(id(p) in changed for p in module.parameters()):
                watch.end_backward(module, has_failed, scale)
                watch.is_scale_unknown |= scale == 1.0 and self.bare.scaler._scale is not None
                watch.n_backwards += 0 if has_failed else n - 1

    def _note_given(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        if any(optimizer is mine for mine in self.bare.optimizers):
            self.given[self.bare.optimizers.index(optimizer)] = gradients_of(self.bare.model)
            self.given_versions = named_versions_of(self.bare.model)

    def _step(
        self, k: int, action: Callable[[Twin], Any], *, has_closure: bool = False, is_scaled: bool = False
    ) -> None:
        self.given.pop(k, None)
        numbers = [watch.number for watch in self.watches]
        error = self.both(action)
        stepped = {id(p) for group in self.bare.optimizers[k].param_groups for p in group["params"]}
        for watch, number in zip(self.watches, numbers, strict=True):
            if watch.is_gone:
                continue
            module = self.bare.model.get_submodule(watch.path)
            names = {name for name, p in module.named_parameters() if id(p) in stepped}
            prefix = f"{watch.path}." if watch.path else ""
            is_concerned = k in watch.given if watch.given else bool(names)
            n_closed = watch.number - number
            if not is_concerned and not has_closure:
                assert n_closed == 0 or watch.is_murky, "an optimizer closed a step of a model that it does not step"
            merges = watch.closed_by_user and not watch.has_stepped  # what the user closed may belong to this step
            if (
                is_concerned
                and not merges
                and not watch.is_murky
                and watch.n_backwards
                and error is None
                and k in self.given
            ):
                assert n_closed == 1, f"{n_closed} steps closed by one step of an optimizer"
            if n_closed <= 0:
                if is_concerned and merges:  # the steps that the user closed were a part of this one
                    watch.forget_superseded()
                    watch.forget()
                    watch.has_stepped = watch.has_stepped or n_closed < 0
                continue
            if error is not None and has_closure:
                watch.forget()
            if not watch.has_stepped:
                watch.forget_superseded()
            watch.has_stepped = True
            given = self.given.get(k)
            if watch.at_end is None and self.bare.scaler._scale is not None:
                watch.is_scale_unknown = True
            if given is not None:
                given = {name: given[prefix + name] for name in names if prefix + name in given}
            is_written = any(watch.versions.get(name) != self.given_versions.get(prefix + name) for name in names)
            watch.close(given, 1.0, None if is_scaled else False, watch.number - 1, is_written)

    def _step_of_probe(self, watch: Watch, loss: Any) -> None:
        number, module = watch.number, self.bare.model.get_submodule(watch.path)
        given = gradients_of(module)
        # gradients of an earlier backward pass: nobody knows whether its loss was scaled
        watch.is_scale_unknown |= watch.at_end is None and self.bare.scaler._scale is not None
        watch.probe.step(torch.tensor(0.25) if loss == "tensor" else loss)
        if watch.number == number + 1 and not watch.has_stepped and watch.n_skipped == 0:
            watch.close(given, watch.scale, None, number)
        elif watch.number != number:
            watch.start_step()
            watch.forget()
        watch.closed_by_user = True

    def _change(self, action: Callable[[Twin], Any], rebuilds: bool = False) -> None:
        self.both(action)
        for watch in self.watches:
            watch.forget()
            if rebuilds:
                watch.lose_optimizers()


def loss_of(twin: Twin, start: int, uses_extra: bool) -> torch.Tensor:
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(start))
    loss: torch.Tensor = twin.model(x, uses_extra)
    return loss


@pytest.mark.timeout(7200)
@pytest.mark.filterwarnings("ignore")
def test_a_training_is_the_same_with_and_without_probes() -> None:
    run_state_machine_as_test(
        seed(SEED)(Training),
        settings=settings(
            max_examples=N_EXAMPLES,
            stateful_step_count=30,
            deadline=None,
            database=None,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
