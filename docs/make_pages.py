"""Adds the pages of the site that are made of what is written elsewhere: the findings and the changelog.

A hook of mkdocs. The findings are the topics of `gradprobe explain`, which cite the rules; the runs that show them are
those of benchmarks/finding_pictures.py.
"""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from gradprobe.cli.topics import TOPICS, Topic

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

ROOT = Path(__file__).resolve().parents[1]
RUNS = json.loads((ROOT / "docs" / "img" / "findings" / "findings.json").read_text(encoding="utf-8"))
# Topics that are no findings, and their pictures in the lesson.
IN_THE_LESSON = {"degradation": "error.png", "shortcut": "shortcut.png"}
INTRODUCTION = """# What goes wrong, and what to do

Each finding of `probe.findings()` has a page here, with the fault in words, its usual cause, what to try first, when
exactly it is reported, a run that has it, and where rule and limits come from. Names in formulas such as
`vanishing_norm` are fields of `Thresholds`; [how far to trust the diagnosis](diagnosis.md) shows how to set them, and
how often the rules are right. `gradprobe explain TOPIC` prints the same in a terminal.
"""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Puts the pages of the findings into the navigation, behind their list."""
    assert config.nav is not None
    (part,) = [part["Findings"] for part in config.nav if "Findings" in part]
    part[1:1] = [{topic.name: address(topic)} for topic in TOPICS.values()]
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Adds the pages."""
    from mkdocs.structure.files import File

    pages = {address(topic): page(topic) for topic in TOPICS.values()}
    pages |= {"findings.md": findings(), "changelog.md": (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")}
    for path, content in pages.items():
        files.append(File.generated(config, path, content=content))
    return files


def findings() -> str:
    """Returns the list of all topics."""
    listed = [f"- [{topic.name}]({address(topic)}): {_text(topic.summary)}" for topic in TOPICS.values()]
    return "\n".join([INTRODUCTION, *listed]) + "\n"


def address(topic: Topic) -> str:
    """Returns the path of a topic's page."""
    return f"findings/{slug(topic.name)}.md"


def slug(name: str) -> str:
    """Returns the name of a topic's page and picture."""
    return name.replace(" ", "-")


def page(topic: Topic) -> str:
    """Returns the page of a topic."""
    parts = [f"# {topic.name}", _text(topic.problem), f"**Why.** {_text(topic.cause)}"]
    parts += ["**What to do**, the most likely to help first:"]
    parts += ["\n".join(f"{k}. {_text(remedy)}" for k, remedy in enumerate(topic.remedies, start=1))]
    if topic.formula:
        parts += ["**Reported if**", "\n".join(f"- {_text(formula)}" for formula in topic.formula)]
    parts += _picture(topic)
    parts += ["## See it in your run"] * bool(topic.code or topic.commands)
    parts += ["```python\n" + "\n".join(topic.code) + "\n```"] * bool(topic.code)
    parts += ["```sh\n" + "\n".join(topic.commands) + "\n```"] * bool(topic.commands)
    parts += ["## Sources", "\n".join(f"- {_linked(_text(source))}" for source in topic.sources)]
    return "\n\n".join(parts) + "\n"


def _picture(topic: Topic) -> list[str]:
    """Returns the run that shows a topic; nothing if there is none."""
    if topic.name in IN_THE_LESSON:
        return [f"![{topic.name}](../img/{IN_THE_LESSON[topic.name]})", "*From [the lesson](../lesson.md).*"]
    run = RUNS.get(topic.name)
    if run is None:
        return []
    drawn = f"python benchmarks/finding_pictures.py --topics '{topic.name}'"
    return [
        "## A run that has it",
        f"![The chart {run['chart']} of a run with the fault](../img/findings/{slug(topic.name)}.png)",
        f'*`probe.plot("{run["chart"]}")` of {run["n_steps"]} steps on handwritten digits: {_text(run["run"])} '
        f"(`benchmarks/_faulty.py`, drawn by `{drawn}`).* The probe says of it:",
        f"```text\n{run['note']}\n```",
    ]


def _text(plain: str) -> str:
    """Returns plain text so that Markdown shows it as it is."""
    return re.sub(r"([\\`*_{}\[\]#])", r"\\\1", html.escape(plain, quote=False))


def _linked(source: str) -> str:
    return re.sub(r"arXiv (\d{4}\.\d{4,5})", r"[arXiv \1](https://arxiv.org/abs/\1)", source)
