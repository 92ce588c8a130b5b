"""`doctor` and `backends` report which parts work on this machine."""

import sys
import warnings

import torch
from rich.console import Console

import gradprobe
from gradprobe import ops
from gradprobe.cli.doctor import doctor
from gradprobe.errors import warn_user
from gradprobe.ops import libraries


def test_every_part_is_ready_or_says_why_and_what_you_lose(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(libraries, "native_hooks", lambda: (None, "not built: [Errno 2] [/b]"))
    installation = doctor()
    assert installation.parts["hooks"] == "not built: [Errno 2] [/b]"
    assert "Python" in installation.costs["hooks"]
    for part, state in installation.parts.items():
        assert state
        assert (part in installation.costs) == (state != "ready")
    console = Console(width=200)
    with console.capture() as capture:
        console.print(installation)
    text = " ".join(capture.get().split())
    assert "not built: [Errno 2] [/b]" in text
    assert installation.versions["torch"] in text


def test_hooks_built_against_another_torch_are_not_loaded(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(libraries, "build_info", lambda: {"hooks": "built", "torch": "2.12.1+cpu"})
    module, reason = libraries.native_hooks.__wrapped__()
    assert module is None
    assert "built against torch 2.12.1+cpu, and this is torch" in reason


def test_hooks_that_were_not_built_report_the_builds_reason(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(libraries, "build_info", lambda: {"hooks": "no C++ compiler was found"})
    monkeypatch.setitem(sys.modules, "gradprobe._hooks", None)
    assert libraries.native_hooks.__wrapped__() == (None, "no C++ compiler was found")


def test_doctor_and_backends_agree() -> None:
    parts = doctor().parts
    assert {name: parts[name] for name in gradprobe.backends()} == gradprobe.backends()


def test_the_back_ends_are_tried_on_every_gpu(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    tried = []

    def resolve(backend: str, device: torch.device) -> None:
        tried.append((backend, str(device)))
        warn_user("backend 'native' cannot run")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "played")
    monkeypatch.setattr(ops, "resolve", resolve)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        doctor()
    assert tried == [("auto", "cuda:0"), ("auto", "cuda:1")]
