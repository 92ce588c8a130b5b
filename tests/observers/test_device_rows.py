"""The C++ rows for any device, here on the CPU; test_signals and others run with them too (fixture `any_rows`)."""

import threading

import pytest
import torch
from helpers.rows import make_device_rows
from torch import nn

from gradprobe.observers.activations import ActivationHooks
from gradprobe.observers.event_rows import EventRows, make_junction_hooks, make_output_hooks
from gradprobe.observers.signal_buffer import SignalBuffer
from gradprobe.ops import libraries

pytestmark = pytest.mark.skipif(libraries.native_hooks()[0] is None, reason="needs the C++ hooks")
CPU = torch.device("cpu")


def rows_of(n_sites: int = 2, capturing: list[bool] | None = None) -> EventRows:
    return make_device_rows(CPU, "auto", n_sites, True, None if capturing is None else lambda: capturing[-1])


def test_rows_grow_and_never_move() -> None:
    rows = rows_of()
    given = [rows.next(k % 2, k, 0.5) for k in range(200)]
    for k, row in enumerate(given):
        row.fill_(k)
    sites, numels, smallest, pool = rows.events()
    assert (sites == [k % 2 for k in range(200)]).all()
    assert (numels == range(200)).all()
    assert (smallest == 0.5).all()
    assert not pool[0].any()
    assert torch.equal(pool[1:201, 3], torch.arange(200, dtype=torch.float64))
    rows.clear()
    assert rows.n_events == 0
    assert rows.next(0, 1, 0.5).data_ptr() == given[0].data_ptr()


def test_a_row_is_reused_until_its_tensor_changes() -> None:
    rows = rows_of()
    x = torch.ones(3)
    row = rows.next(0, 3, 0.5)
    rows.remember(x, row)
    assert rows.known(x).data_ptr() == row.data_ptr()
    assert rows.known(x.view(3)) is None
    x.add_(1)
    assert rows.known(x) is None
    rows.remember(x, row)
    rows.clear()
    assert rows.known(x) is None


def test_events_of_many_threads_have_rows_of_their_own() -> None:
    rows = rows_of()
    pointers: list[int] = []
    threads = [
        threading.Thread(target=lambda: pointers.extend(rows.next(0, 1, 0.5).data_ptr() for _ in range(500)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(pointers)) == 2000
    assert rows.n_events == 2000


def test_outputs_are_observed_in_cpp_unless_a_graph_is_captured() -> None:
    """During a capture, an output and a gradient go to Python, also if the step itself is not observed."""
    capturing = [False]
    rows, seen = rows_of(capturing=capturing), []
    hooks = make_output_hooks(rows, 1, lambda site, gradient: seen.append(site))
    x = torch.ones(2, requires_grad=True)

    def observed_in_cpp() -> bool:
        return bool(hooks.observe(0, x * 2))

    assert observed_in_cpp()
    assert rows.n_events == 1
    rows.enabled = False
    assert observed_in_cpp()
    assert rows.n_events == 1
    capturing.append(True)
    assert not observed_in_cpp()
    rows.enabled = True
    assert not observed_in_cpp()

    capturing.append(False)
    y = x * 3
    assert hooks.observe(0, y)
    for enabled, captures, expected in ((True, False, []), (False, True, [1]), (True, True, [1]), (False, False, [])):
        rows.enabled = enabled
        capturing.append(captures)
        seen.clear()
        y.sum().backward(retain_graph=True)
        assert seen == expected


def test_residual_adds_stay_in_python() -> None:
    assert make_junction_hooks(rows_of(7), 1, 0) is None


def test_a_graph_may_outlive_the_rows_in_a_thread_without_python() -> None:
    """Dropping the last reference to the function that tells of captures needs the interpreter's lock."""
    layer = nn.Linear(2, 2)
    buffer = SignalBuffer(2, CPU, "auto")
    buffer.rows = rows_of(capturing=[False])
    hooks = ActivationHooks([layer], buffer)
    loss = layer(torch.ones(1, 2)).sum()
    hooks.remove()
    del hooks, buffer
    loss.backward()
    del loss
