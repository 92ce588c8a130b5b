"""The public names of `gradprobe.snapshot`, the deprecated ones, and errors of a snapshot."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gradprobe
from gradprobe import snapshot


@pytest.fixture
def one() -> gradprobe.Snapshot:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradprobe.attach(model, optimizer=optimizer, updates=True) as probe:
        model(torch.ones(1, 2))[0, 0].backward()
        optimizer.step()
        latest = probe.latest()
    assert latest is not None
    return latest


def test_all_public_names_are_there() -> None:
    assert {"Snapshot", "SiteTable", "NonFinite", "to_pandas", "finish_rows", "site_stats"} <= set(snapshot.__all__)
    assert all(hasattr(snapshot, name) for name in snapshot.__all__)


def test_changes_is_a_deprecated_name_of_updates(one: gradprobe.Snapshot) -> None:
    with pytest.warns(DeprecationWarning, match="snapshot.Changes is deprecated; use Updates"):
        assert snapshot.Changes is snapshot.Updates
    with pytest.warns(DeprecationWarning, match="Snapshot.changes is deprecated; use parameter_updates"):
        assert one.changes is one.parameter_updates
    assert one.parameter_updates is not None
    with pytest.raises(AttributeError, match=r"'gradprobe\.snapshot' has no attribute 'Nothing'"):
        snapshot.Nothing  # noqa: B018


def test_an_unknown_parameter_is_named(one: gradprobe.Snapshot) -> None:
    with pytest.raises(KeyError, match="no parameter 'wait'; the model has 2: weight, bias"):
        one["wait"]
    assert repr(one).endswith("parameters=2)")
