"""`doctor` and `backends` say what works here."""

from rich.console import Console

import gradprobe
from gradprobe import hooks
from gradprobe.doctor import doctor


def test_every_part_is_ready_or_says_why_and_what_it_costs(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(hooks, "native_hooks", lambda: (None, "not built"))
    diagnosis = doctor()
    assert diagnosis.parts["hooks"] == "not built"
    assert "Python" in diagnosis.costs["hooks"]
    for part, state in diagnosis.parts.items():
        assert state
        assert (part in diagnosis.costs) == (state != "ready")
    console = Console(width=200)
    with console.capture() as capture:
        console.print(diagnosis)
    text = " ".join(capture.get().split())
    assert "not built" in text
    assert diagnosis.versions["torch"] in text


def test_doctor_and_backends_agree() -> None:
    parts = doctor().parts
    assert {name: parts[name] for name in gradprobe.backends()} == gradprobe.backends()
