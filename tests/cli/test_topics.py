"""`gradprobe explain`: every topic is whole, and what it says to run shows what it says."""

from __future__ import annotations

import json
import shlex
from typing import get_args

import pytest
from typer.main import get_command
from typer.testing import CliRunner

import gradprobe
from gradprobe.cli.commands import app
from gradprobe.cli.topics import TOPICS, explain
from gradprobe.diagnosis.findings import RULES, Rule

VERDICTS = {"vanishing": "vanishing", "exploding": "exploding", "shortcut": "healthy"}


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.stdout


@pytest.mark.parametrize("name", TOPICS)
def test_a_topic_is_whole(name: str) -> None:
    topic = TOPICS[name]
    assert topic.name == name
    assert topic.problem.endswith(".")
    assert topic.cause.endswith(".")
    assert topic.remedies
    assert topic.sources
    assert topic.commands or topic.code
    code, text = run("explain", name)
    assert code == 0
    words = " ".join(text.split())
    for part in (topic.problem, topic.cause, *topic.remedies, *topic.commands, *topic.code, *topic.sources):
        assert " ".join(part.split()) in words


def test_every_finding_is_explained_once() -> None:
    explained = [rule for topic in TOPICS.values() for rule in topic.rules]
    assert sorted(explained) == sorted(get_args(Rule))
    assert {rule for rule, _ in RULES} == set(get_args(Rule))


@pytest.mark.parametrize("name", VERDICTS)
def test_its_check_shows_it(name: str) -> None:
    (command,) = explain(name).commands
    program, *arguments = shlex.split(command)
    assert program == "gradprobe"
    code, text = run(*arguments, "--json")
    assert json.loads(text)["verdict"] == VERDICTS[name]
    assert code == (0 if VERDICTS[name] == "healthy" else 1)


@pytest.mark.parametrize("command", [command for topic in TOPICS.values() for command in topic.commands])
def test_commands_have_the_options_that_are_shown(command: str) -> None:
    program, name, *arguments = shlex.split(command)
    assert program == "gradprobe"
    known = {option for parameter in get_command(app).commands[name].params for option in parameter.opts}
    assert {argument for argument in arguments if argument.startswith("--")} <= known


@pytest.mark.parametrize("name", [name for name, topic in TOPICS.items() if topic.code])
def test_its_code_runs(name: str) -> None:
    import torch

    torch.manual_seed(0)
    model = gradprobe.networks.resnet(8, width=4)
    names: dict[str, object] = {
        "gradprobe": gradprobe,
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
    }
    attach, *reading = TOPICS[name].code
    exec(attach, names)
    model(torch.randn(2, 3, 16, 16)).square().sum().backward()
    names["optimizer"].step()  # type: ignore[attr-defined]
    for line in reading:
        exec(line, names)


def test_the_list() -> None:
    code, text = run("explain")
    assert code == 0
    assert all(name in text for name in TOPICS)


def test_json() -> None:
    assert json.loads(run("explain", "degradation", "--json")[1])["name"] == "degradation"
    assert [topic["name"] for topic in json.loads(run("explain", "--json")[1])] == list(TOPICS)


def test_an_unknown_topic_lists_those_there_are() -> None:
    with pytest.raises(gradprobe.ArgumentError, match=r"topic: need one of vanishing, exploding, .*; got 'nothing'"):
        explain("nothing")
