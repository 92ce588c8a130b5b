"""Names are inert in every output: each name against each output, compared with a run of ordinary names."""

from __future__ import annotations

import csv
import json
import re
import struct
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.names import NAMES
from helpers.report_cases import Page, Recorded
from rich.console import Console

from gradprobe.errors import printable
from gradprobe.report import html, sweep_charts
from gradprobe.report.export import as_dict, write_csv
from gradprobe.report.summary import summarise
from gradprobe.report.terminal import NAME_WIDTH, render

ACTIVE = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")  # all but newlines

# What could act in a page or its charts, in two names: pages take long to draw.
PAGE_KEYS = ("script", "attribute", "entity", "newline", "escape", "nul", "right-to-left", "surrogate")
PAGE_NAMES = ["".join(NAMES[key] for key in PAGE_KEYS), NAMES["long"]]

every_name = pytest.mark.parametrize("name", NAMES.values(), ids=NAMES.keys())


def named(*names: str) -> Recorded:
    """Returns a run whose families, parameters, residual adds, data and metadata have these names."""
    everything = "".join(names)
    run = Recorded({"data": everything, "epochs": 4}, {"torch_version": everything})
    for place, name in enumerate(names):
        run.config[f"{name}key"] = {name: [name]}
        run.meta[f"{name}meta"] = name
        run.add("resnet", 20, (1.0, 2.0)).add("resnet", 56, (60.0, 70.0), end=(0.0, 0.5, 0.5))
        for cell in (2 * place, 2 * place + 1):
            run.rows[cell] = replace(run.rows[cell], family=name)
            for rows in (run.layer_rows, run.junction_rows):
                for key in [key for key in rows if key[0] == cell + 1]:
                    rows[key] = [replace(row, site=f"{name}{row.position}") for row in rows[key]]  # type: ignore
    return run


def terminal(name: str) -> str:
    console = Console(width=100, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(render(named(name)))
    return capture.get()


@every_name
def test_terminal(name: str) -> None:
    text, ordinary = terminal(name), terminal("ordinary")
    assert not ACTIVE.search(text)
    assert max(map(len, text.splitlines())) <= 100
    assert len(text) < 2 * len(ordinary) + 40 * NAME_WIDTH
    words = printable(f"{name}-56", NAME_WIDTH).split()
    assert all(word in text for word in words if len(word) < NAME_WIDTH)


def test_terminal_shortens_a_long_name_in_its_middle() -> None:
    assert f"{'n' * 20}…{'n' * 16}-56" in terminal(NAMES["long"]).replace("\n", "")


def tags(page: str) -> list[str]:
    """Returns the page's tags, except those that typeset names and powers of ten inside sentences."""
    page = re.sub(r'<span class="net">(.*?)</span>', r"\1", page)
    return [re.sub(r'"[^"]*"', '""', tag) for tag in re.findall(r"<[^>]*>", page) if tag not in ("<sup>", "</sup>")]


@pytest.mark.soak
def test_page() -> None:
    page = html.page(summarise(named(*PAGE_NAMES)))
    assert not ACTIVE.search(page)
    # The same tags with the same attributes, whatever their values.
    assert tags(page) == tags(html.page(summarise(named(*(f"name{place}" for place in range(len(PAGE_NAMES)))))))
    shown = Page(page)
    assert all(shown.row(printable(f"{name}-56")) for name in PAGE_NAMES)


@every_name
def test_csv(name: str, tmp_path: Path) -> None:
    shown = printable(name)
    expected = f"'{shown}" if shown.startswith(("=", "+", "-", "@")) else shown
    paths = write_csv(named(name), tmp_path / "odd")
    ordinary = write_csv(named("ordinary"), tmp_path / "ordinary")
    for path, other in zip(paths, ordinary, strict=True):
        text = path.read_text()
        assert not ACTIVE.search(text)
        rows, same = list(csv.reader(text.splitlines())), list(csv.reader(other.read_text().splitlines()))
        assert [len(row) for row in rows] == [len(row) for row in same]
        assert {row[0] for row in rows[1:]} == {expected}
        for row, twin in zip(rows[1:], same[1:], strict=True):
            for cell, number in zip(row, twin, strict=True):
                if re.fullmatch(r"[-+.\de]+|nan|-?inf", number):
                    assert cell == number
                else:
                    assert not cell.startswith(("=", "+", "-", "@", "\t"))


@every_name
def test_json(name: str) -> None:
    text = json.dumps(as_dict(named(name)), allow_nan=False)
    assert not ACTIVE.search(text)
    report = json.loads(text)
    assert (report["config"]["data"], report["meta"]["torch_version"]) == (name, name)
    assert [net["family"] for net in report["nets"]] == [name, name]
    assert report["nets"][0]["gradient"]["first_step"]["layers"][1]["site"] == f"{name}1"


@pytest.mark.soak
def test_charts(tmp_path: Path) -> None:
    paths = sweep_charts.write_png(named(*PAGE_NAMES), tmp_path)
    assert len(paths) == 4
    for path in paths:
        width, height = struct.unpack(">II", path.read_bytes()[16:24])
        assert max(width, height) < 3000
