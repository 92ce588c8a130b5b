"""What the objects show in a notebook and in one line, and notes on findings."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from helpers.names import NAMES
from helpers.run_cases import run
from torch import nn

import gradprobe
from gradprobe.diagnosis.diagnose import diagnose
from gradprobe.text.markup import BAR, BROKEN, HEALTHY, UNKNOWN

TESTS = Path(__file__).resolve().parents[1]
OBJECTS = ("Probe", "Snapshot", "Diagnosis", "Finding", "Coverage", "FlowReport")
_VOID = {"br", "hr", "img"}


class Form(HTMLParser):
    """The text and the elements of a form; every element must be closed in order."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.text, self.tags, self.attributes = "", [], set[str]()
        self._open: list[str] = []
        self.feed(form)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag not in _VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data + "\n"


@cache
def objects() -> dict[str, object]:
    """A run in which a network with a dead ReLU is trained, and the check of an untrained one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3), nn.Linear(3, 3).requires_grad_(False))
    with torch.no_grad():
        model[0].bias.fill_(-100.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradprobe.attach(model, optimizer=optimizer, activations=True, updates=True) as probe:
        for _ in range(60):
            loss = nn.functional.cross_entropy(model(torch.randn(16, 4)), torch.randint(3, (16,)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            probe.step(loss)
    diagnosis, newest = probe.findings(), probe.latest()
    report = gradprobe.check_gradient_flow(nn.Sequential(*[nn.Linear(4, 4) for _ in range(30)]), (4,))
    found = (probe, newest, diagnosis, diagnosis[0], probe.coverage(), report)
    return dict(zip(OBJECTS, found, strict=True))


@pytest.mark.parametrize("name", OBJECTS)
def test_a_repr_is_one_short_line(name: str) -> None:
    text = repr(objects()[name])
    assert text.startswith(f"{name}(")
    assert "\n" not in text
    assert len(text) < 300


WORDS = {
    "Probe": ("60 steps measured", "1. dead ReLU", "Newest step", "Coverage"),
    "Snapshot": ("Step 59: loss ", "total norm", "2.weight", "update / weight", "Outputs of 4 modules"),
    "Diagnosis": ("in 60 steps", "1. dead ReLU: most units of a ReLU are never active", "Try first:", "It explains:"),
    "Finding": ("dead ReLU", "the first is '1',", "Usual cause:", "gradprobe explain 'dead ReLU'"),
    "Coverage": ("frozen", "3.weight, 3.bias", "observed"),
    "FlowReport": ("vanishing", "29.weight", "healthy", "more"),
}


@pytest.mark.parametrize("name", OBJECTS)
def test_a_form_says_what_matters_and_acts_on_nothing(name: str) -> None:
    form = Form(objects()[name]._repr_html_())  # type: ignore[attr-defined]
    for word in WORDS[name]:
        assert word in form.text, form.text
    # No style sheet, which notebooks strip, no script, and nothing from elsewhere.
    assert not {"style", "script", "link", "img", "pre"} & set(form.tags)
    assert form.attributes <= {"style", "scope", "colspan", "aria-hidden", "aria-label", "tabindex", "role"}


@pytest.mark.parametrize("kind", sorted(NAMES))
def test_names_are_inert(kind: str) -> None:
    forms = forms_of_a_broken_run(NAMES[kind])
    harmless = forms_of_a_broken_run("layer")
    assert [(form.tags, form.attributes) for form in forms] == [(form.tags, form.attributes) for form in harmless]
    assert len(forms) > 2
    for form in forms:
        assert not any(bad in form.text for bad in "\x1b\x9b\x00\u202e\u2028\ud800\r\t")


def forms_of_a_broken_run(name: str) -> list[Form]:
    """The forms of the newest step, the diagnosis and its findings of a run in which a gradient vanishes."""
    history = run(40, n_weights=3, name=lambda k: name + str(k))
    for one in history[20:]:
        one.rows[1] = 0.0
    diagnosis = diagnose(history)
    return [Form(shown._repr_html_()) for shown in (history[-1], diagnosis, *diagnosis)]


def test_a_long_table_shows_both_ends() -> None:
    form = Form(run(1, n_weights=110)[0]._repr_html_())
    assert "layer0.weight" in form.text
    assert "layer109.weight" in form.text
    assert "layer50.weight" not in form.text
    assert "… 98 more …" in form.text


def test_a_run_without_a_fault_and_one_without_steps() -> None:
    assert repr(diagnose([])) == "Diagnosis(not judged in 0 steps)"
    assert "nothing is known" in Form(diagnose([])._repr_html_()).text
    with gradprobe.attach(nn.Linear(2, 1)) as probe:
        form = Form(probe._repr_html_())
    assert "Newest step" not in form.text


def test_a_finding_prints_as_a_note() -> None:
    finding = objects()["Diagnosis"][0]  # type: ignore[index]
    lines = str(finding).splitlines()
    assert lines[0] == "dead ReLU: most units of a ReLU are never active"
    assert lines[-1] == "   More: gradprobe explain 'dead ReLU'"
    assert max(map(len, lines)) <= 100


def _luminance(colour: str) -> float:
    channels = (int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5))
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("ground", ["#ffffff", "#111111", "#1e1e1e"])
@pytest.mark.parametrize("colour", [BROKEN, HEALTHY, UNKNOWN, BAR])
def test_marks_show_on_light_and_dark_notebooks(colour: str, ground: str) -> None:
    low, high = sorted(_luminance(one) + 0.05 for one in (colour, ground))
    assert high / low >= 3


def test_forms_of_snapshots_and_diagnoses_need_no_torch() -> None:
    script = (
        f"import sys; sys.path.insert(0, {str(TESTS)!r}); from helpers.run_cases import run;"
        "from gradprobe.diagnosis.diagnose import diagnose; history = run(30);"
        "[one._repr_html_() for one in (*history, diagnose(history), *diagnose(history))];"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
