"""Adds the pages of the site that are made of what is written elsewhere: the findings and the changelog.

A hook of mkdocs. The findings are the topics of `gradprobe explain`, which cite the rules.
"""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import TYPE_CHECKING

from gradprobe.cli.topics import TOPICS, Topic

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

ROOT = Path(__file__).resolve().parents[1]
INTRODUCTION = """# What goes wrong, and what to do

Each finding of `probe.findings()` has a section here, with the fault in words, its usual cause, what to try first, when
exactly it is reported, and where rule and limits come from. Names in formulas such as `vanishing_norm` are fields of
`Thresholds`; [how far to trust the diagnosis](diagnosis.md) shows how to set them, and how often the rules are right.
`gradprobe explain TOPIC` prints the same in a terminal.
"""


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Adds the pages."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, "findings.md", content=findings()))
    files.append(File.generated(config, "changelog.md", content=(ROOT / "CHANGELOG.md").read_text(encoding="utf-8")))
    return files


def findings() -> str:
    """Returns the page of all topics."""
    return "\n".join([INTRODUCTION, *map(_section, TOPICS.values())])


def _section(topic: Topic) -> str:
    parts = [f"## {topic.name}", _text(topic.problem), f"**Why.** {_text(topic.cause)}"]
    parts += ["**What to do**, the most likely to help first:"]
    parts += ["\n".join(f"{k}. {_text(remedy)}" for k, remedy in enumerate(topic.remedies, start=1))]
    if topic.formula:
        parts += ["**Reported if**", "\n".join(f"- {_text(formula)}" for formula in topic.formula)]
    parts += ["**See it**"] * bool(topic.code or topic.commands)
    parts += ["```python\n" + "\n".join(topic.code) + "\n```"] * bool(topic.code)
    parts += ["```sh\n" + "\n".join(topic.commands) + "\n```"] * bool(topic.commands)
    parts += ["**Sources**", "\n".join(f"- {_linked(_text(source))}" for source in topic.sources)]
    return "\n\n".join(parts) + "\n"


def _text(plain: str) -> str:
    """Returns plain text so that Markdown shows it as it is."""
    return re.sub(r"([\\`*_{}\[\]#])", r"\\\1", html.escape(plain, quote=False))


def _linked(source: str) -> str:
    return re.sub(r"arXiv (\d{4}\.\d{4,5})", r"[arXiv \1](https://arxiv.org/abs/\1)", source)
