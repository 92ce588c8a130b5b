"""Imports go one way: a stage of the data flow never imports a later one."""

import ast
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "gradprobe"

# In the order of the data flow. Modules of one stage may import each other; a package stands for all that is in it.
STAGES = (
    {"errors", "measured", "strict_json"},
    {"ops"},
    {"sites", "hooks", "amp", "boundaries", "arguments", "branch", "module_hooks", "nn", "networks", "inline"},
    {"instrumentation"},
    {"collector", "row_log", "graph_rows", "board", "compiled"},
    {"activations", "junctions"},
    {"record"},
    {"stats", "line"},
    {"signals", "changes"},
    {"snapshot"},
    {"update_log"},
    {"history", "passing"},
    {"coverage"},
    {"findings"},
    {"rules"},
    {"diagnose"},
    {"sinks"},
    {"report"},
    {"probe"},
    {"flow", "doctor", "explain"},
    {"__init__"},
    {"experiments"},
    {"cli"},
)
RANK = {name: rank for rank, stage in enumerate(STAGES) for name in stage}
# Stages that users take by themselves: what they may import of ours.
ALONE = {"ops": {"errors"}, "inline": {"errors"}, "nn": {"errors", "ops"}, "networks": {"errors", "nn"}}
WITHOUT_TORCH = {
    "errors",
    "measured",
    "strict_json",
    "stats",
    "line",
    "signals",
    "changes",
    "snapshot",
    "findings",
    "rules",
    "diagnose",
    "sinks",
    "report",
    "explain",
}


def modules(package: Path) -> Iterator[tuple[str, str, set[str]]]:
    """Yields each module's path from the package, its stage's name and what it imports, in full dotted names."""
    for path in sorted(package.rglob("*.py")):
        relative = path.relative_to(package)
        parents = [package.name, *relative.parent.parts]
        imports: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text(), filename=str(path))):
            if isinstance(node, ast.Import):
                imports |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                base = ".".join(parents[: len(parents) - node.level + 1]) if node.level else ""
                source = ".".join(filter(None, [base, node.module]))
                imports |= {f"{source}.{alias.name}" for alias in node.names}
        yield str(relative), relative.parts[0].removesuffix(".py"), imports


def stage_of(imported: str, package: Path) -> str | None:
    """Names the stage that an import reaches, None where it leads out of the package."""
    top, _, rest = imported.partition(".")
    if top != package.name:
        return None
    name = rest.partition(".")[0]
    inside = (package / name).is_dir() or (package / f"{name}.py").is_file() or name in {"_hooks", "_C"}
    return name if name and inside else "__init__"


def faults(package: Path) -> list[str]:
    """Lists every import that goes the wrong way, one line each."""
    found = []
    for path, stage, imports in modules(package):
        if stage not in RANK:
            found.append(f"{path}: has no place in the table of stages")
            continue
        if stage in WITHOUT_TORCH and any(name.partition(".")[0] == "torch" for name in imports):
            found.append(f"{path}: imports torch")
        for reached in sorted({stage_of(name, package) for name in imports} - {None, stage, "_hooks", "_C"}):
            if reached not in RANK:
                found.append(f"{path}: imports {reached}, which has no place in the table of stages")
            elif RANK[reached] > RANK[stage]:
                found.append(f"{path}: imports {reached}, a later stage")
            elif stage in WITHOUT_TORCH and reached not in WITHOUT_TORCH:
                found.append(f"{path}: imports {reached}, which imports torch")
            elif stage in ALONE and reached not in ALONE[stage]:
                found.append(f"{path}: imports {reached}, but may import only {', '.join(sorted(ALONE[stage]))}")
    return found


def test_no_stage_imports_a_later_one() -> None:
    assert faults(PACKAGE) == []


@pytest.mark.parametrize(
    ("path", "line", "fault"),
    [
        ("record.py", "from gradprobe.snapshot import Snapshot", "imports snapshot, a later stage"),
        ("ops/native.py", "import gradprobe.sites", "imports sites, a later stage"),
        ("ops/native.py", "from ..probe import Probe", "imports probe, a later stage"),
        ("snapshot.py", "import torch.nn", "imports torch"),
        ("diagnose.py", "from gradprobe import ops", "imports ops, which imports torch"),
        ("networks.py", "from . import hooks", "imports hooks, but may import only errors, nn"),
        ("collector.py", "def late():\n    from gradprobe import attach", "imports __init__, a later stage"),
        ("stray.py", "", "has no place in the table of stages"),
    ],
    ids=["later", "plain-import", "relative", "torch", "torch-behind", "networks", "in-a-function", "unknown-module"],
)
def test_a_planted_import_is_found(tmp_path: Path, path: str, line: str, fault: str) -> None:
    package = tmp_path / PACKAGE.name
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    with (package / path).open("a") as module:
        module.write(f"\n{line}\n")

    assert sorted(set(faults(package)) - set(faults(PACKAGE))) == [f"{path}: {fault}"]
