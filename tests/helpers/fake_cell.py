"""Trains a ResNet on a device without hardware, whose tensors have shapes and dtypes but no values.

An operator that mixes its tensors with those of the CPU raises an error. A value can be read only by `Tensor.item` and
`Tensor.tolist`, for which a real device would have to finish first; the shapes of the tensors read are printed. The
probe needs values and is replaced. Run it in a process of its own: the device stays registered.

    python -m helpers.fake_cell
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from gradprobe import networks
from gradprobe.experiments import train
from gradprobe.experiments.data import Dataset, load
from gradprobe.experiments.readers.raw import DataSpec

DEVICE = "fake:0"
STEPS = 3  # of an epoch


class _Snapshot(dict[str, Any]):
    junctions: dict[str, Any] = {}  # noqa: RUF012


class _Probe:
    def __enter__(self) -> _Probe:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        pass

    def history(self) -> list[_Snapshot]:
        return [_Snapshot()] * STEPS


def moved(tensor: Tensor) -> Tensor:
    """Returns a tensor of the same kind on the device."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=DEVICE)


def moved_model(model: nn.Module) -> nn.Module:
    """Moves a network to the device; its own `to` cannot replace real parameters by fake ones."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            module._parameters[name] = None if parameter is None else nn.Parameter(moved(parameter))
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else moved(buffer)
    model.to = lambda *_, **__: model  # type: ignore[method-assign, assignment]
    return model


def moved_data(data: Dataset) -> Dataset:
    """Moves a data set to the device."""
    return replace(data, **{name: moved(getattr(data, name)) for name in ("train_x", "train_y", "test_x", "test_y")})


def noted_reads() -> list[tuple[int, ...]]:
    """Lets values be read, all 0.5; returns the list of the shapes that are read from now on."""
    shapes: list[tuple[int, ...]] = []

    def reader(value: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
        def read(tensor: Tensor) -> Any:
            shapes.append(tuple(tensor.shape))
            return value(tensor)

        return read

    torch.Tensor.item = reader(lambda tensor: 0.5)  # type: ignore[method-assign]
    FakeTensor.tolist = reader(  # type: ignore[method-assign]
        lambda tensor: [[0.5] * tensor.shape[1]] * tensor.shape[0]
    )
    return shapes


def main() -> None:
    """Trains the cell and prints what it has read."""
    _setup_privateuseone_for_python_backend("fake")
    shapes = noted_reads()
    small = replace(load(DataSpec("digits", per_class=20)), augmented=True)
    model = networks.resnet(8, in_channels=1).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with FakeTensorMode():
        model, data = moved_model(model), moved_data(small)
        train.build = lambda *_: model
        train.attach = lambda *_, **__: _Probe()  # type: ignore[assignment]
        train.save_state = lambda *_: b""
        recipe = train.Recipe(epochs=2, batch_size=len(data.train_x) // STEPS)
        results = list(train.train_cell("resnet", 8, 0, data, recipe, None, device=DEVICE))
    assert [result.status for result in results] == ["pending", "done"]
    assert all(parameter.grad is not None for parameter in model.parameters())
    print(shapes)


if __name__ == "__main__":
    main()
