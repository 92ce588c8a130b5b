"""The numbers that the probe reports for every kind of gradient, and its exports."""

import json
import math

import numpy as np
import pytest
import torch
from helpers.probe_cases import loss_of, mlp, norms_of, true_norms
from torch import nn

import gradprobe

pytestmark = pytest.mark.usefixtures("probe_warnings_are_errors")


class TestNumbers:
    def test_every_statistic_equals_numpys(self, any_hooks: str) -> None:
        model = mlp()
        with gradprobe.attach(model) as probe:
            loss_of(model).backward()
            probe.step()
        snapshot = probe.latest()
        assert snapshot is not None
        for name, parameter in model.named_parameters():
            truth = parameter.grad.double().numpy().ravel()
            site = snapshot[name]
            assert site.norm == pytest.approx(np.linalg.norm(truth), rel=1e-6)
            assert site.rms == pytest.approx(np.sqrt(np.mean(truth**2)), rel=1e-6)
            assert site.abs_max == np.abs(truth).max()
            assert site.abs_mean == pytest.approx(np.abs(truth).mean(), rel=1e-6)
            assert site.mean == pytest.approx(truth.mean(), rel=1e-5)
            assert site.std == pytest.approx(truth.std(), rel=1e-5, abs=1e-9)
            assert (site.zero_fraction, site.nonfinite, site.numel) == (0.0, 0, truth.size)
        everything = np.concatenate([p.grad.double().numpy().ravel() for p in model.parameters()])
        assert snapshot.total_norm == pytest.approx(np.linalg.norm(everything), rel=1e-6)

    @pytest.mark.parametrize("magnitude", [1e-44, 1e-25, 1e25, 1e38], ids=str)
    def test_norms_outside_the_range_of_a_square(self, magnitude: float, any_hooks: str) -> None:
        weight = nn.Parameter(torch.zeros(4))
        model = nn.ParameterList([weight])
        with gradprobe.attach(model) as probe:
            (weight * torch.full((4,), magnitude)).sum().backward()
            probe.step()
        snapshot = probe.latest()
        assert snapshot is not None
        assert snapshot["0"].norm == pytest.approx(2 * float(torch.tensor(magnitude)), rel=1e-6)
        assert snapshot.total_norm == snapshot["0"].norm

    @pytest.mark.parametrize("magnitude", [1e-300, 1e300], ids=str)
    def test_float64_norms_outside_the_range_of_a_square(self, magnitude: float) -> None:
        weight = nn.Parameter(torch.zeros(4, dtype=torch.float64))
        model = nn.ParameterList([weight])
        with gradprobe.attach(model) as probe:
            (weight * magnitude).sum().backward()
            clipped = probe.clip_grad_norm_(math.inf)
            probe.step()
        snapshot = probe.latest()
        assert snapshot is not None
        assert snapshot.total_norm == pytest.approx(2 * magnitude, rel=1e-12)
        assert snapshot["0"].abs_mean == pytest.approx(magnitude, rel=1e-12)
        assert clipped.item() == pytest.approx(2 * magnitude, rel=1e-12)

    def test_nan_and_infinity_are_counted_and_named(self) -> None:
        model = mlp()
        with gradprobe.attach(model, when="step") as probe:
            loss_of(model).backward()
            model[2].weight.grad[0, :2] = torch.tensor([math.nan, math.inf])
            probe.clip_grad_norm_(1.0)
            probe.step()
        snapshot = probe.latest()
        assert snapshot is not None
        assert snapshot["2.weight"].nonfinite == 2
        assert math.isnan(snapshot["2.weight"].norm)
        assert math.isnan(snapshot.total_norm)
        (finding,) = probe.findings()
        assert (finding.rule, finding.sites, finding.steps) == ("non-finite", ("2.weight",), (0, 0))


class TestOddGradients:
    def test_tied_parameters_count_once_and_answer_to_both_names(self) -> None:
        model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
        model[1].weight = model[0].weight
        with gradprobe.attach(model) as probe:
            model(torch.ones(2, 4)).sum().backward()
            probe.step()
        snapshot = probe.latest()
        assert snapshot is not None
        assert len(snapshot) == 1
        assert snapshot["1.weight"] == snapshot["0.weight"]
        assert snapshot.total_norm == pytest.approx(model[0].weight.grad.norm().item())
        assert probe.coverage().tied == {"0.weight": ("0.weight", "1.weight")}

    def test_sparse_gradients(self, any_hooks: str) -> None:
        model = nn.Sequential(nn.Embedding(50, 4, sparse=True), nn.Linear(4, 1))
        with gradprobe.attach(model) as probe:
            model(torch.tensor([3, 7, 3])).sum().backward()
            assert model[0].weight.grad.is_sparse
            dense = model[0].weight.grad.to_dense()
            total = probe.clip_grad_norm_(0.5)
            probe.step()
        snapshot = probe.latest()
        assert snapshot is not None
        assert snapshot["0.weight"].norm == pytest.approx(dense.norm().item())
        assert snapshot["0.weight"].numel == 2 * 4
        assert total.item() == pytest.approx(snapshot.total_norm)
        after = math.hypot(*(p.grad.to_dense().norm().item() for p in model.parameters()))
        assert after == pytest.approx(0.5, rel=1e-4)

    def test_complex_gradients(self) -> None:
        weight = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
        model = nn.ParameterList([weight])
        with gradprobe.attach(model) as probe:
            (weight * torch.tensor([3 + 4j, 0])).real.sum().backward()
            probe.step()
        snapshot = probe.latest()
        assert snapshot is not None
        assert (snapshot["0"].norm, snapshot["0"].abs_max, snapshot["0"].zero_fraction) == (5.0, 5.0, 0.5)

    def test_mixed_dtypes_and_scalars_and_empty_parameters(self, any_hooks: str) -> None:
        model = nn.ParameterDict(
            {
                "f16": nn.Parameter(torch.ones(3, dtype=torch.float16)),
                "f32": nn.Parameter(torch.ones(2)),
                "empty": nn.Parameter(torch.ones(0)),
                "bf16": nn.Parameter(torch.ones(5, dtype=torch.bfloat16)),
                "scalar": nn.Parameter(torch.tensor(1.0)),
            }
        )
        with gradprobe.attach(model) as probe:
            sum((2 * parameter.float()).sum() for parameter in model.values()).backward()
            probe.step()
        snapshot = probe.latest()
        expected = {"f16": 2 * 3**0.5, "f32": 2 * 2**0.5, "empty": 0.0, "bf16": 2 * 5**0.5, "scalar": 2.0}
        assert norms_of(snapshot) == pytest.approx(expected)
        assert list(norms_of(snapshot)) == [name for name, _ in model.named_parameters()]

    def test_channels_last_and_expanded_gradients(self) -> None:
        conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        model = nn.Sequential(conv)
        with gradprobe.attach(model) as probe:
            conv(torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)).square().mean().backward()
            probe.step()
            assert norms_of(probe.latest()) == pytest.approx(true_norms(model), rel=1e-6)
            conv.bias.grad = torch.tensor(2.0).expand(4)
            with pytest.warns(gradprobe.GradprobeWarning, match="an earlier backward"):
                probe.step()
        snapshot = probe.latest()
        assert snapshot is not None
        assert snapshot["0.bias"].norm == pytest.approx(4.0)


class TestExport:
    def test_pandas_is_tidy(self) -> None:
        model = mlp()
        with gradprobe.attach(model) as probe:
            for step in range(3):
                loss_of(model, step).backward()
                probe.step(loss=float(step))
        table = probe.to_pandas()
        assert list(table.columns[:4]) == ["step", "loss", "site", "kind"]
        assert len(table) == 3 * 6
        assert set(table.kind) == {"parameter"}
        last = table[(table.step == 2) & (table.site == "0.weight")].iloc[0]
        assert last.norm == pytest.approx(true_norms(model)["0.weight"], rel=1e-6)
        assert last.loss == 2.0

    def test_jsonl_is_strict_and_never_overwrites(self, tmp_path: "object") -> None:
        model = mlp()
        path = tmp_path / "history.jsonl"  # type: ignore[operator]
        with gradprobe.attach(model, when="step") as probe:
            loss_of(model).backward()
            model[0].weight.grad[0, 0] = math.nan
            probe.clip_grad_norm_(1.0)
            probe.step()
            probe.to_jsonl(path)
        lines = [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]
        assert [line["site"] for line in lines] == [name for name, _ in model.named_parameters()]
        assert lines[0]["norm"] == "nan"
        assert lines[1]["norm"] == probe.history()[0]["0.bias"].norm
        before = path.read_bytes()
        with pytest.raises(gradprobe.StoreError, match="does not exist yet"):
            probe.to_jsonl(path)
        assert path.read_bytes() == before
