"""Without its library, an integration says how to get it."""

import importlib
import sys

import pytest

import gradprobe


@pytest.mark.parametrize("name", ["lightning", "transformers", "accelerate"])
def test_the_error_names_the_command(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for library in ("lightning.pytorch", "pytorch_lightning", "transformers", "accelerate"):
        monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.delitem(sys.modules, f"gradprobe.integrations.{name}", raising=False)
    with pytest.raises(gradprobe.ArgumentError, match=rf"{name}: .* pip install 'gradprobe\[{name}\]'"):
        importlib.import_module(f"gradprobe.integrations.{name}")
