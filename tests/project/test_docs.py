"""The pages of docs/: their code runs, their commands exist, and the site is complete and works offline."""

from __future__ import annotations

import dis
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import pytest
import torch
from helpers.scripts import load_script
from torch import nn
from typer.main import get_command
from typer.testing import CliRunner

import gradprobe
from gradprobe.cli import exit_status
from gradprobe.cli.commands import app
from gradprobe.cli.topics import TOPICS

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(path.name for path in DOCS.glob("*.md") if not path.name.endswith(".template.md"))
ELSEWHERE = {"lesson.md": "test_lesson.py", "trainers.md": "test_trainers_page.py"}  # where their Python blocks run
SLOWER = {"compile.md", "numbers.md"}  # one compiles, the other draws
BLOCK = re.compile(r"(?:^<!-- not run: (.+) -->\n)?^```(python|sh)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
# Commands that run here, on runs/a and runs/b: they only read, and are fast.
READING = {"compare", "diagnose", "doctor", "explain", "report", "watch"}


def blocks(page: str, language: str) -> list[tuple[str, str]]:
    """Returns the blocks of a page, each after the reason why it does not run, which is mostly empty."""
    return [(why, code) for why, kind, code in BLOCK.findall((DOCS / page).read_text("utf-8")) if kind == language]


class Given:
    """What a reader has, made on first use: a model, its optimizer, data, and a probe that has seen some steps."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.gradprobe: ModuleType = gradprobe
        self.torch: ModuleType = torch
        self.loss_function = nn.functional.cross_entropy
        self.model = nn.Sequential()
        self.model.add_module("stem", nn.Linear(12, 16))
        self.model.add_module("blocks", nn.Sequential(Block(), Block()))
        self.model.add_module("head", nn.Linear(16, 3))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.images, self.labels = self.batch = torch.randn(8, 12), torch.randint(3, (8,))
        self.loader = [self.batch] * 12

    def train(self, probe: gradprobe.Probe) -> gradprobe.Probe:
        for images, labels in self.loader:
            self.optimizer.zero_grad()
            loss = self.loss_function(self.model(images), labels)
            loss.backward()
            self.optimizer.step()
            probe.step(loss)
        return probe

    @property
    def probe(self) -> gradprobe.Probe:
        return self.train(gradprobe.attach(self.model, optimizer=self.optimizer, activations=True, updates=True))

    @property
    def snapshot(self) -> gradprobe.Snapshot | None:
        with self.probe as probe:
            return probe.latest(wait=True)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
        self.add = gradprobe.nn.ResidualAdd()

    def forward(self, x: torch.Tensor) -> Any:
        return self.add(x, self.body(x))


def names_read_first(code: CodeType, made: frozenset[str] = frozenset()) -> Iterator[str]:
    """Yields the names that a block reads before it makes them; its functions are called at its end."""
    seen = set(made)
    for instruction in dis.get_instructions(code):
        if instruction.opname == "STORE_NAME":
            seen.add(instruction.argval)
        elif instruction.opname in ("LOAD_NAME", "LOAD_GLOBAL") and instruction.argval not in seen:
            yield instruction.argval
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from names_read_first(inner, frozenset(seen))


def run_block(code: str, title: str, names: dict[str, Any], given: Given) -> None:
    """Runs a block as a reader would: beside nothing else, and with what they have where the page does not make it."""
    program = compile(code, title, "exec")
    for name in names_read_first(program):
        if name not in names and name in dir(given):
            names[name] = getattr(given, name)
    if "attach(" in code and isinstance(names.get("probe"), gradprobe.Probe):
        names["probe"].detach()
    exec(program, names)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=pytest.mark.soak if page in SLOWER else ())
        for page in PAGES
        if page not in ELSEWHERE and blocks(page, "python")
    ],
)
def test_python_blocks_run_one_after_another(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if page == "compile.md":
        request.getfixturevalue("fresh_dynamo")
    monkeypatch.chdir(tmp_path)
    given, names = Given(), {}
    for number, (why_not, code) in enumerate(blocks(page, "python"), start=1):
        title = f"docs/{page}, block {number}"
        if why_not:
            compile(code, title, "exec")
        else:
            run_block(code, title, names, given)
    if isinstance(names.get("probe"), gradprobe.Probe):
        names["probe"].detach()


def test_few_blocks_are_left_out() -> None:
    left_out = [(page, why) for page in PAGES for why, _ in blocks(page, "python") if why]
    assert left_out == [
        ("check.md", "no model takes all of these"),
        ("compile.md", "needs a GPU"),
        ("run_folder.md", "needs polars and duckdb"),
    ]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "sh")])
def test_commands_exist_and_those_that_only_read_run(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [line for _, code in blocks(page, "sh") for line in code.splitlines() if line.strip()]
    if any("runs/" in line for line in lines):
        for name in ("a", "b"):
            given = Given()
            with gradprobe.attach(given.model, optimizer=given.optimizer, log_dir=f"runs/{name}") as probe:
                given.train(probe)
    for line in lines:
        program, *arguments = shlex.split(line, comments=True)
        if program == "gradprobe":
            get_command(app).commands[arguments[0]].make_context(arguments[0], arguments[1:])
            if arguments[0] in READING and "--html" not in arguments and ".sqlite" not in line:
                done = CliRunner().invoke(app, arguments, catch_exceptions=False)
                assert done.exit_code in (0, 1), f"{line}\n{done.output}"
        elif program in ("python", "pytest"):
            scripts = [argument for argument in arguments if "/" in argument]
            assert scripts, line
            assert all((ROOT / script).exists() for script in scripts), line
        else:
            assert program in ("pip", "make"), line


def test_commands_in_tables_name_what_is_there() -> None:
    text = (DOCS / "reliability.md").read_text("utf-8")
    makefile = (ROOT / "Makefile").read_text("utf-8")
    commands = re.findall(r"`([^`]*(?:pytest|python|make) [^`]+)`", text)
    assert len(commands) > 12
    for command in commands:
        assert all((ROOT / path).exists() for path in re.findall(r"(?:tests|benchmarks)/[\w/.]+", command)), command
        for target in re.findall(r"^make ([\w-]+)", command):
            assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), command


def test_the_page_of_the_command_line_has_every_command_and_exit_status() -> None:
    table, statuses = (DOCS / "command_line.md").read_text("utf-8").split("## Exit status")
    assert sorted(re.findall(r"`gradprobe (\w+)", table)) == sorted(get_command(app).commands)
    rows = re.findall(r"^\| (\d[\d, ]*) \|", statuses, flags=re.MULTILINE)
    numbers = {int(value) for name, value in vars(exit_status).items() if name.isupper()}
    assert {int(number) for row in rows for number in row.split(",")} == {0, *numbers}


def test_examples_that_are_named_exist() -> None:
    named = re.findall(r"^\| `([\w.]+)` \|", (DOCS / "examples.md").read_text("utf-8"), flags=re.MULTILINE)
    assert sorted(named) == sorted(path.name for path in (ROOT / "examples").iterdir() if path.is_file())


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text("utf-8").partition("\nnav:\n")[2]
    assert sorted(re.findall(r": ([\w.]+\.md)$", navigation, flags=re.MULTILINE)) == sorted(
        [*PAGES, "findings.md", "changelog.md"]
    )


@pytest.fixture
def make_pages() -> ModuleType:
    return load_script(DOCS / "make_pages.py")


def test_each_topic_has_a_page_with_all_its_remedies(make_pages: ModuleType) -> None:
    listed = re.findall(r"^- \[(.+)\]\((.+)\): ", make_pages.findings(), flags=re.MULTILINE)
    assert listed == [(topic.name, make_pages.address(topic)) for topic in TOPICS.values()]
    for topic in TOPICS.values():
        page = make_pages.page(topic)
        assert page.startswith(f"# {topic.name}\n")
        shown = page.replace("\\", "").replace("&lt;", "<").replace("&gt;", ">")
        assert [text for text in (topic.problem, *topic.remedies, *topic.formula) if text not in shown] == []


def test_each_finding_is_shown_by_a_run_that_has_it(make_pages: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    pictures = load_script(ROOT / "benchmarks" / "finding_pictures.py")
    with_rules = [name for name, topic in TOPICS.items() if topic.rules]
    assert sorted([*pictures.PICTURES, "replicas differ"]) == sorted(with_rules)  # which takes several processes
    for name, (run, chart) in pictures.PICTURES.items():
        noted = make_pages.RUNS[name]
        assert (noted["run"], noted["chart"]) == (run, chart)
        assert pictures.run_of(name).fault in TOPICS[name].rules
        assert (DOCS / "img" / "findings" / f"{make_pages.slug(name)}.png").exists()
        assert noted["note"] in make_pages.page(TOPICS[name])
    for name in ("non-finite", "dead ReLU", "spike"):
        note = pictures.note_of(name, pictures.train(pictures.run_of(name), pictures.SEED))
        stored = make_pages.RUNS[name]["note"]
        assert note.partition("\n")[0] == stored.partition("\n")[0]
        assert note.partition("Usual cause")[2] == stored.partition("Usual cause")[2]


@pytest.mark.soak
def test_the_site_is_built_without_warnings_and_loads_nothing_from_the_net(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings_handlers.python")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"]
    done = subprocess.run(
        build, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr

    site = tmp_path / "site"
    pages = {str(path.relative_to(site)): path.read_text("utf-8") for path in site.rglob("*.html")}
    loaded = re.compile(r"<(?:script|img|iframe|link rel=.?(?:stylesheet|preconnect))[^>]*(?:src|href)=\"?https?:")
    assert [name for name, text in pages.items() if loaded.search(text)] == []
    assert "../img/findings/dead-ReLU.png" in pages["findings/dead-ReLU.html"]
    assert 'href="findings/dead-ReLU.html"' in pages["index.html"]
    assert 'id="gradprobe.probe.probe.Probe.clip_grad_norm_"' in pages["api.html"]
    assert "clip" in (tmp_path / "site" / "search" / "search_index.js").read_text("utf-8")
