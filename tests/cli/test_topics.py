"""`gradprobe explain`: every topic is complete, and its commands and code show what it says."""

from __future__ import annotations

import json
import shlex

import pytest
from typer.main import get_command
from typer.testing import CliRunner

import gradprobe
from gradprobe.cli.commands import app
from gradprobe.cli.topics import TOPICS, explain
from gradprobe.diagnosis.rules import RULES, Rule

VERDICTS = {"vanishing": "vanishing", "exploding": "exploding", "shortcut": "healthy"}


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.stdout


@pytest.mark.parametrize("name", TOPICS)
def test_a_topic_is_complete(name: str) -> None:
    topic = TOPICS[name]
    assert topic.name == name
    assert topic.problem.endswith(".")
    assert topic.problem.startswith(topic.summary)
    assert topic.cause.endswith(".")
    assert topic.remedies
    assert topic.sources
    assert topic.commands or topic.code
    code, text = run("explain", name)
    assert code == 0
    words = " ".join(text.split())
    parts = (*topic.remedies, *topic.formula, *topic.commands, *topic.code, *topic.sources)
    for part in (topic.problem, topic.cause, *parts):
        assert " ".join(part.split()) in words


def test_every_rule_has_the_topic_of_its_name() -> None:
    explained = [title for topic in TOPICS.values() for title in topic.rules]
    assert sorted(explained) == sorted(rule.title for rule in RULES)
    assert {rule.name for rule in RULES} == {name for name, topic in TOPICS.items() if topic.rules}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.title)
def test_a_topic_takes_its_texts_from_its_rule(rule: Rule) -> None:
    topic = TOPICS[rule.name]
    label = f"{rule.where}: " if len(topic.rules) > 1 else ""
    assert (label + rule.cause).lower() in topic.cause.lower()
    assert label + rule.formula in topic.formula
    assert rule.source in topic.sources
    assert [one.removeprefix(label) for one in topic.remedies if one.startswith(label)] == list(rule.remedies)


@pytest.mark.parametrize("name", VERDICTS)
def test_its_check_shows_it(name: str) -> None:
    ((command,),) = [[one for one in topic.commands if one.startswith("gradprobe check")] for topic in explain(name)]
    program, *arguments = shlex.split(command)
    assert program == "gradprobe"
    code, text = run(*arguments, "--json")
    assert json.loads(text)["verdict"] == VERDICTS[name]
    assert code == (0 if VERDICTS[name] == "healthy" else 1)


@pytest.mark.parametrize("command", dict.fromkeys(one for topic in TOPICS.values() for one in topic.commands))
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
        "loss": 0.5,
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


def test_an_unknown_topic_lists_the_known_ones() -> None:
    with pytest.raises(
        gradprobe.ArgumentError,
        match=r"topic: needed one of vanishing, exploding, .*, got 'nothing'",
    ):
        explain("nothing")


@pytest.mark.parametrize(
    ("typed", "name"),
    [("dead-relu", "dead ReLU"), ("DEAD ReLU", "dead ReLU"), ("unstable-loss", "unstable loss"), ("Spike", "spike")],
)
def test_hyphens_and_case_do_not_matter(typed: str, name: str, recwarn: pytest.WarningsRecorder) -> None:
    assert explain(typed) == (TOPICS[name],)
    assert not recwarn.list


@pytest.mark.parametrize(
    ("old", "names"),
    [
        ("dead-units", ["dead ReLU", "dying", "silent parameter"]),
        ("silent site", ["silent parameter"]),
        ("initialisation", ["poor initialisation"]),
        ("precision", ["precision loss"]),
        ("updates", ["updates too large", "updates too small"]),
        ("drift", ["layer drift"]),
    ],
)
def test_an_old_name_still_works_and_says_the_new_one(old: str, names: list[str]) -> None:
    message = f"explain: topic {old!r} is now {', '.join(map(repr, names))}"
    with pytest.warns(DeprecationWarning, match=message):
        assert [topic.name for topic in explain(old)] == names
    result = CliRunner().invoke(app, ["explain", old])
    assert result.exit_code == 0
    assert result.stderr == f"gradprobe: {message}\n"
    assert all(name in result.stdout.splitlines() for name in names)
    found = json.loads(run("explain", old, "--json")[1])
    assert [topic["name"] for topic in (found if len(names) > 1 else [found])] == names
