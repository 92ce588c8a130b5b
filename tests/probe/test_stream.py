"""Finished steps stream to a run folder, to sinks and to a callback; what fails there never reaches the training."""

from __future__ import annotations

import gc
import math
import os
import signal
import threading
import time
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.full_disk import full_disk
from torch import nn

import gradprobe
from gradprobe.diagnosis.diagnose import diagnose
from gradprobe.errors import ArgumentError, StoreError
from gradprobe.log import read_run
from gradprobe.log.writer import RunWriter
from gradprobe.probe import stream


class Sink:
    """Collects what it gets."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.losses: list[float | None] = []
        self.titles: list[str] = []
        self.about: Any = None
        self.is_closed = False

    def open(self, about: Any) -> None:
        self.about = about

    def write(self, step: int, snapshot: gradprobe.Snapshot) -> None:
        self.steps.append(step)
        self.losses.append(snapshot.loss)

    def tell(self, step: int, finding: gradprobe.Finding) -> None:
        self.titles.append(finding.title)

    def close(self) -> None:
        self.is_closed = True


def build() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def train(
    probe: gradprobe.Probe,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    n_steps: int,
    factor: Callable[[int], float] = lambda step: 1.0,
) -> None:
    generator = torch.Generator().manual_seed(0)
    for step in range(n_steps):
        optimizer.zero_grad()
        loss = model(torch.randn(8, 4, generator=generator)).square().mean() * factor(step)
        loss.backward()
        optimizer.step()
        probe.step(loss)


def steps_in(folder: Path) -> list[int]:
    return [one.step for one in read_run(folder).snapshots()]


def same(one: gradprobe.Snapshot, other: gradprobe.Snapshot) -> bool:
    return (one.step, one.loss, one.rows.tobytes()) == (other.step, other.loss, other.rows.tobytes())


def test_every_step_comes_once_to_log_sink_and_drain(tmp_path: Path) -> None:
    (model, optimizer), sink = build(), Sink()
    probe = gradprobe.attach(
        model, optimizer=optimizer, activations=True, updates=True, log_dir=tmp_path / "run", sinks=[sink], strict=True
    )
    train(probe, model, optimizer, 300)
    drained = probe.drain()
    history = probe.history()
    probe.detach()
    read = read_run(tmp_path / "run")
    assert [one.step for one in drained] == sink.steps == list(range(300))
    assert all(same(one, other) for one, other in zip(read.snapshots(), history, strict=True))
    assert sink.losses == [one.loss for one in history]
    assert sink.is_closed
    assert repr(list(diagnose(read.snapshots()))) == repr(list(diagnose(history)))
    assert {finding.title for finding in read.findings} == set(sink.titles)
    assert sink.about["parameters"] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    (session,) = read.about["sessions"]
    assert session["options"]["updates"] is True
    assert session["versions"]["torch"] == torch.__version__


def test_a_short_history_loses_nothing_in_the_log(tmp_path: Path) -> None:
    model, optimizer = build()
    with gradprobe.attach(model, optimizer=optimizer, capacity=2, log_dir=tmp_path / "run") as probe:
        for _ in range(20):
            train(probe, model, optimizer, 5)
            time.sleep(0.02)
        assert [one.step for one in probe.history()] == [98, 99]
    assert steps_in(tmp_path / "run") == list(range(100))


def test_flush_stores_what_is_finished(tmp_path: Path) -> None:
    model, optimizer = build()
    with gradprobe.attach(model, optimizer=optimizer, log_dir=tmp_path / "run") as probe:
        assert probe.stored_step is None
        train(probe, model, optimizer, 7)
        assert probe.flush() == probe.stored_step == 6
        assert steps_in(tmp_path / "run") == list(range(7))


def test_a_model_that_changes_is_followed_in_the_log(tmp_path: Path) -> None:
    model, _ = build()
    with gradprobe.attach(model, log_dir=tmp_path / "run") as probe:
        train(probe, model, torch.optim.SGD(model.parameters(), lr=0.1), 5)
        model[2] = nn.Linear(8, 3)  # type: ignore[operator]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", gradprobe.GradprobeWarning)
            train(probe, model, torch.optim.SGD(model.parameters(), lr=0.1), 5)
    assert [one["2.bias"].numel for one in read_run(tmp_path / "run").snapshots()] == [2] * 5 + [3] * 5


def test_micro_batches_before_the_first_optimizer_step_are_one_step(tmp_path: Path) -> None:
    model, optimizer = build()
    with gradprobe.attach(model, log_dir=tmp_path / "run") as probe:
        for k in range(6):
            loss = model(torch.ones(8, 4)).square().mean()
            loss.backward()
            probe.step(loss)
            probe.flush()
            if k % 3 == 2:
                optimizer.step()
                optimizer.zero_grad()
        history = probe.history()
    assert [one.step for one in read_run(tmp_path / "run").snapshots()] == [one.step for one in history]


def test_a_new_finding_reaches_the_callback_once_in_another_thread(tmp_path: Path) -> None:
    model, optimizer = build()
    found: list[tuple[str, threading.Thread]] = []

    def note(finding: gradprobe.Finding) -> None:
        found.append((finding.rule, threading.current_thread()))

    with gradprobe.attach(model, optimizer=optimizer, on_finding=note) as probe:
        train(probe, model, optimizer, 40, lambda step: math.nan if step > 20 else 1.0)
        probe.flush()
        titles = [rule for rule, _ in found]
        assert "non-finite" in titles
        train(probe, model, optimizer, 40, lambda step: math.nan)
    assert len(titles) == len(set(titles))
    assert all(thread is not threading.current_thread() for _, thread in found)


@pytest.mark.parametrize("error", [ValueError("mine"), SystemExit(3)], ids=repr)
def test_what_the_callback_raises_is_only_reported(tmp_path: Path, error: BaseException) -> None:
    model, optimizer = build()
    calls = []

    def fail(finding: gradprobe.Finding) -> None:
        calls.append(finding)
        raise error

    probe = gradprobe.attach(model, optimizer=optimizer, log_dir=tmp_path / "run", on_finding=fail)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(probe, model, optimizer, 40, lambda step: math.nan)
        probe.detach()
    (warning,) = caught
    assert "on_finding failed and is no longer called" in str(warning.message)
    assert len(calls) == 1
    assert steps_in(tmp_path / "run") == list(range(40))


def test_a_callback_can_dump(tmp_path: Path) -> None:
    model, optimizer = build()
    probes: list[gradprobe.Probe] = []

    def dump(finding: gradprobe.Finding) -> None:
        probes[0].dump(tmp_path / finding.rule, batch_ids=[1, 2])

    probes.append(gradprobe.attach(model, optimizer=optimizer, on_finding=dump))
    train(probes[0], model, optimizer, 40, lambda step: math.nan)
    probes[0].flush()
    dumped = steps_in(tmp_path / "non-finite")
    assert dumped == list(range(len(dumped)))
    assert len(dumped) > 0
    probes[0].detach()


def test_a_full_disk_stops_the_log_with_one_warning_and_not_the_training(tmp_path: Path) -> None:
    (model, optimizer), (bare, bare_optimizer) = build(), build()
    sink = Sink()
    probe = gradprobe.attach(model, optimizer=optimizer, log_dir=tmp_path / "run", sinks=[sink], strict=True)
    train(probe, model, optimizer, 5)
    stored = probe.flush()
    size = max(path.stat().st_size for path in (tmp_path / "run").rglob("*-*"))
    with warnings.catch_warnings(record=True) as caught, full_disk(size + 10):
        warnings.simplefilter("always")
        train(probe, model, optimizer, 200)
        assert probe.flush() == stored == 4
        train(probe, model, optimizer, 5)
        probe.detach()
    (warning,) = caught
    assert "is switched off; the training goes on. StoreError" in str(warning.message)
    assert "steps 5 to 204 are not stored, nor are later ones" in str(warning.message)
    assert steps_in(tmp_path / "run") == list(range(5))
    assert sink.steps == list(range(210))
    without = gradprobe.attach(bare, optimizer=bare_optimizer)
    for n_steps in (5, 200, 5):
        train(without, bare, bare_optimizer, n_steps)
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), bare.parameters(), strict=True))


def test_steps_that_the_log_cannot_keep_up_with_are_counted_in_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = build()
    slow, write = threading.Event(), RunWriter.write

    def block(writer: RunWriter, snapshots: Any) -> None:
        slow.wait(30)
        write(writer, snapshots)

    monkeypatch.setattr(RunWriter, "write", block)
    monkeypatch.setattr(stream, "_MOST_PENDING", 64)
    probe = gradprobe.attach(model, optimizer=optimizer, capacity=300, log_dir=tmp_path / "run")
    train(probe, model, optimizer, 900)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        slow.set()
        probe.detach()
    steps = steps_in(tmp_path / "run")
    assert steps[-1] == 899
    assert len(caught) == 1
    assert f"{900 - len(steps)} steps before step" in str(caught[0].message)
    assert read_run(tmp_path / "run").about["sessions"][0]["lost_steps"] == 900 - len(steps) > 0


def test_two_probes_need_two_folders(tmp_path: Path) -> None:
    (one, first), (other, second) = build(), build()
    with gradprobe.attach(one, optimizer=first, log_dir=tmp_path / "a") as a:
        with pytest.raises(StoreError, match="another probe is writing in this folder"):
            gradprobe.attach(other, log_dir=tmp_path / "a")
        with gradprobe.attach(other, optimizer=second, log_dir=tmp_path / "b") as b:
            for _ in range(10):
                train(a, one, first, 2)
                train(b, other, second, 1)
    assert (steps_in(tmp_path / "a"), steps_in(tmp_path / "b")) == (list(range(20)), list(range(10)))


def test_a_failed_attach_frees_the_folder(tmp_path: Path) -> None:
    model, optimizer = build()
    with pytest.raises(ArgumentError, match="steps none of them"):
        gradprobe.attach(model, optimizer=build()[1], log_dir=tmp_path / "run")
    gradprobe.attach(model, optimizer=optimizer, log_dir=tmp_path / "run").detach()


def test_a_training_resumes_in_the_same_folder(tmp_path: Path) -> None:
    model, optimizer = build()
    with gradprobe.attach(model, optimizer=optimizer, every=2, log_dir=tmp_path / "run") as probe:
        train(probe, model, optimizer, 11)
        state = probe.state_dict()
        train(probe, model, optimizer, 6)
    assert state == {"step": 11}
    with gradprobe.attach(model, optimizer=optimizer, every=2, log_dir=tmp_path / "run") as probe:
        probe.load_state_dict(state)
        train(probe, model, optimizer, 10)
        assert [one.step for one in probe.history()] == [12, 14, 16, 18, 20]
    assert steps_in(tmp_path / "run") == list(range(0, 21, 2))
    with gradprobe.attach(model, optimizer=optimizer, every=2, log_dir=tmp_path / "run", start_step=21) as probe:
        train(probe, model, optimizer, 4)
    assert steps_in(tmp_path / "run") == list(range(0, 25, 2))


def test_loading_an_earlier_state_drops_the_steps_after_it() -> None:
    model, optimizer = build()
    probe = gradprobe.attach(model, optimizer=optimizer, updates=True, activations=True, strict=True)
    train(probe, model, optimizer, 4)
    state = probe.state_dict()
    train(probe, model, optimizer, 4)
    probe.load_state_dict(state)
    train(probe, model, optimizer, 2)
    assert [one.step for one in probe.history()] == [0, 1, 2, 3, 4, 5]
    assert all(one.updates and one.activations for one in probe.history())


def test_a_first_step_that_is_not_due_is_not_measured() -> None:
    model, optimizer = build()
    probe = gradprobe.attach(model, optimizer=optimizer, activations=True, every=10, start_step=5, strict=True)
    train(probe, model, optimizer, 10)
    assert [one.step for one in probe.history()] == [10]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"log_dir": 3}, "log_dir: needed a path or None, got 3"),
        ({"sinks": Sink()}, "sinks: needed a list of sinks, got Sink"),
        ({"sinks": [Sink]}, "sinks: needed sinks such as"),
        ({"sinks": ["wandb"]}, "sinks: needed sinks such as"),
        ({"on_finding": 3}, "on_finding: needed a callable or None, got int"),
        ({"start_step": -1}, "start_step: needed an integer of at least 0, got -1"),
        ({"start_step": True}, "start_step: needed an integer of at least 0, got True"),
    ],
)
def test_invalid_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        gradprobe.attach(build()[0], **options)


def test_invalid_states_and_arguments_are_named(tmp_path: Path) -> None:
    probe = gradprobe.attach(build()[0])
    for state in ({}, {"step": -1}, {"step": "3"}, None):
        with pytest.raises(ArgumentError, match="state: needed one of Probe"):
            probe.load_state_dict(state)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="batch_ids: needed a value that JSON can hold"):
        probe.dump(tmp_path / "dump", batch_ids={object()})
    with pytest.raises(ArgumentError, match="n_steps: needed an integer of at least 1 or None, got 0"):
        probe.dump(tmp_path / "dump", n_steps=0)
    with pytest.raises(ArgumentError, match="timeout_s: needed a number above 0"):
        probe.flush(0)
    assert not (tmp_path / "dump").exists()


def test_a_dump_holds_the_last_steps_the_batch_and_the_random_states(tmp_path: Path) -> None:
    model, optimizer = build()
    probe = gradprobe.attach(model, optimizer=optimizer)
    train(probe, model, optimizer, 30, lambda step: math.nan if step > 15 else 1.0)
    torch.manual_seed(7)
    expected = torch.get_rng_state()
    probe.dump(tmp_path / "dump", batch_ids=torch.tensor([5, 6]), n_steps=20)
    run = read_run(tmp_path / "dump")
    assert [one.step for one in run.snapshots()] == list(range(10, 30))
    assert "non-finite" in {finding.rule for finding in run.findings}
    assert (run.about["sessions"][0]["batch_ids"], run.about["sessions"][0]["step"]) == ([5, 6], 30)
    states = torch.load(tmp_path / "dump" / "random_states.pt", weights_only=True)
    assert torch.equal(states["torch"], expected)
    assert set(states) >= {"torch", "numpy", "python"}
    with pytest.raises(StoreError, match="needed a folder that is new or empty"):
        probe.dump(tmp_path / "dump")


def test_dropping_probe_and_model_frees_both_and_stores_the_last_steps(tmp_path: Path) -> None:
    model, optimizer = build()

    def look(finding: gradprobe.Finding, held: list[gradprobe.Probe] = []) -> None:  # noqa: B006
        held[0].latest()

    probe = gradprobe.attach(model, optimizer=optimizer, log_dir=tmp_path / "run", on_finding=look)
    look.__defaults__[0].append(probe)  # type: ignore[index]
    train(probe, model, optimizer, 20)
    alive = [weakref.ref(one) for one in (probe, model)]
    thread = probe._stream._thread  # type: ignore[union-attr]
    del probe, model, optimizer, look
    gc.collect()
    thread.join(60)
    gc.collect()
    assert [one() for one in alive] == [None, None]
    assert steps_in(tmp_path / "run") == list(range(20))


def test_detach_ends_the_thread_and_waits_no_longer_than_it_must(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = build()
    never = threading.Event()
    monkeypatch.setattr(RunWriter, "write", lambda *_: never.wait(60))
    monkeypatch.setattr(stream.Stream.close, "__defaults__", (0.3,))
    probe = gradprobe.attach(model, optimizer=optimizer, log_dir=tmp_path / "run")
    train(probe, model, optimizer, 3)
    start = time.monotonic()
    with pytest.warns(gradprobe.GradprobeWarning, match=r"still being written after 0\.3 s"):
        probe.detach()
    assert time.monotonic() - start < 5
    never.set()
    thread = probe._stream._thread  # type: ignore[union-attr]
    thread.join(60)
    assert not thread.is_alive()


def test_the_numbers_and_the_training_are_the_same_with_a_log(tmp_path: Path) -> None:
    results = []
    for options in ({}, {"log_dir": tmp_path / "run", "sinks": [Sink()], "on_finding": print}):
        model, optimizer = build()
        with gradprobe.attach(model, optimizer=optimizer, **options) as probe:  # type: ignore[arg-type]
            train(probe, model, optimizer, 30)
            rows = np.stack([one.rows for one in probe.history()])
        bits = torch.cat([parameter.reshape(-1) for parameter in model.parameters()])
        results.append((rows.tobytes(), bits.detach().numpy().tobytes(), torch.get_rng_state().numpy().tobytes()))
    assert results[0] == results[1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_writes_nothing_and_can_go_on(tmp_path: Path) -> None:
    model, optimizer = build()
    probe = gradprobe.attach(model, optimizer=optimizer, log_dir=tmp_path / "run")
    train(probe, model, optimizer, 50)
    for _ in range(5):
        train(probe, model, optimizer, 5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of fork in a process with threads
            child = os.fork()
        if child == 0:
            signal.alarm(20)
            status = 1
            try:
                train(probe, model, optimizer, 50)
                probe.flush()
                probe.history()
                probe.detach()
                status = 0
            finally:
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
    probe.detach()
    assert steps_in(tmp_path / "run") == list(range(75))


class Blocks(Sink):
    """Never returns from its first write."""

    def __init__(self) -> None:
        super().__init__()
        self.never = threading.Event()

    def write(self, step: int, snapshot: gradprobe.Snapshot) -> None:
        self.never.wait(60)


class Fails(Sink):
    """Cannot write."""

    def write(self, step: int, snapshot: gradprobe.Snapshot) -> None:
        raise OSError(28, "No space left on device")


def test_a_sink_that_blocks_and_one_that_fails_stop_neither_log_nor_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = build()
    blocks, good = Blocks(), Sink()
    monkeypatch.setattr(stream.Stream.close, "__defaults__", (3.0,))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        probe = gradprobe.attach(
            model, optimizer=optimizer, log_dir=tmp_path / "run", sinks=[blocks, Fails(), good], strict=True
        )
        train(probe, model, optimizer, 30)
        start = time.monotonic()
        probe.detach()
    assert time.monotonic() - start < 10
    blocks.never.set()
    assert sorted(str(one.message).split(" is switched off")[0] for one in caught) == [
        "gradprobe: the sink Blocks",
        "gradprobe: the sink Fails",
    ]
    assert good.steps == steps_in(tmp_path / "run") == list(range(30))
