"""The script that benchmarks/sweep.py compares the sweep with: the same networks, and a table from both."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from _plain_sweep import Net, digits
from _plain_sweep import main as plain_sweep

from gradprobe import networks
from gradprobe.experiments.data import load
from gradprobe.experiments.models import build


@pytest.mark.parametrize("family", networks.NORMALISED_FAMILIES)
def test_the_plain_scripts_networks_are_those_of_the_sweep(family):
    ours = build(family, 14, load("digits"))
    other = Net(14, family == "resnet", 1)
    other.load_state_dict(dict(zip(other.state_dict(), ours.state_dict().values(), strict=True)))
    x = torch.randn(8, 1, 8, 8)
    torch.testing.assert_close(other(x), ours(x))
    torch.testing.assert_close(other.eval()(x), ours.eval()(x))


def test_the_plain_script_trains_on_the_images_of_the_sweep():
    ours = load("digits")
    for one, (images, labels) in zip(digits(), ((ours.train_x, ours.train_y), (ours.test_x, ours.test_y)), strict=True):
        assert torch.equal(one.tensors[0], images)
        assert torch.equal(one.tensors[1], labels)


def test_the_plain_script_reports_both_errors_of_every_epoch(capsys):
    plain_sweep("digits", "plain", "8", "0", "2")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" train")[0] for line in lines] == ["plain-8 seed 0 epoch 1", "plain-8 seed 0 epoch 2"]
    assert float(lines[-1].split()[-1]) < 20


@pytest.mark.soak
def test_the_quick_comparison_prints_ratio_and_errors():
    command = [sys.executable, str(Path(__file__).parents[2] / "benchmarks" / "sweep.py"), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "plain script over" in done.stdout
    assert "sweep, float32" in done.stdout
    assert "plain-8 seed 0" in done.stdout
