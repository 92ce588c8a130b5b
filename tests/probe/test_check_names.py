"""Names of modules are inert in the table of a check, and exact in its data."""

from __future__ import annotations

import re

import pytest
import torch
from helpers.names import NAMES
from torch import nn

import gradprobe
from gradprobe.errors import printable
from gradprobe.probe.flow.report import NAME_WIDTH


class Named(nn.Module):
    """A model whose only layer and whose class have an odd name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.layer = name
        self.add_module(name.replace(".", "_"), nn.Linear(2, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (layer,) = self.children()
        return layer(x) * float("nan")


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES.keys())
def test_the_table_of_a_check(name: str) -> None:
    model = type(name.replace("\0", "") if name.isascii() else "Model", (Named,), {})(name)
    report = gradprobe.check_gradient_flow(model, (2,))
    text = str(report)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\ud800-\udfff]", text)
    assert max(map(len, text.splitlines())) <= 120
    assert len(text.splitlines()) < 40
    site = f"{name.replace('.', '_')}.weight"
    shown = printable(site, NAME_WIDTH)
    assert (shown if len(shown) < 30 else shown[:20]) in text
    assert {layer["name"] for layer in report.as_dict()["layers"]} == {site, site.replace("weight", "bias")}
