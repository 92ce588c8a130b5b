"""Imports go one way: a folder of the package imports only those that its row lists."""

import ast
import shutil
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "gradprobe"

# Folder or module of the package -> those that it may import. `ops.rows`, the layout of a row, needs no torch.
MAY_IMPORT = {
    "errors": "",
    "version": "",
    "text": "errors",  # so low that every object can say in words and in HTML what it holds
    "ops": "errors",
    "nn": "ops errors",
    "networks": "nn errors",
    "snapshot": "text ops.rows errors",
    "observers": "snapshot nn ops text errors",
    "diagnosis": "snapshot text errors",
    "sinks": "diagnosis snapshot errors",
    "log": "diagnosis snapshot ops.rows errors",
    "report": "diagnosis snapshot text errors",  # torch-free as a sink is, so that a probe may draw its own run
    "probe": "observers diagnosis report log sinks snapshot nn ops text errors version",
    "experiments": "probe observers report diagnosis snapshot networks nn ops text errors version",
    "__init__": "probe diagnosis log sinks snapshot networks nn ops errors version",
    "integrations": "probe diagnosis snapshot errors",
    "cli": "experiments report probe log diagnosis snapshot ops errors version",
}
WITHOUT_TORCH = {"errors", "version", "text", "snapshot", "diagnosis", "log", "sinks", "report"}
NATIVE = {"_C", "_hooks"}


def modules(package: Path) -> Iterator[tuple[str, str, set[str]]]:
    """Yields each module's path from the package, its folder and what it imports, in full dotted names."""
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


def folder_of(imported: str, package: Path) -> str | None:
    """Names the folder that an import reaches, None where it leads out of the package."""
    top, _, rest = imported.partition(".")
    if top != package.name:
        return None
    if rest.startswith("ops.rows"):
        return "ops.rows"
    name = rest.partition(".")[0]
    inside = (package / name).is_dir() or (package / f"{name}.py").is_file() or name in NATIVE
    return name if name and inside else "__init__"


def violations(package: Path) -> list[str]:
    """Lists every import that the table does not allow, one line each."""
    found = []
    for path, folder, imports in modules(package):
        if folder not in MAY_IMPORT:
            found.append(f"{path}: {folder} is not in the table")
            continue
        if folder in WITHOUT_TORCH and any(name.partition(".")[0] == "torch" for name in imports):
            found.append(f"{path}: imports torch")
        reached = {one for name in imports if (one := folder_of(name, package)) is not None} - {folder, *NATIVE}
        allowed = {folder, *MAY_IMPORT[folder].split()}
        found += [f"{path}: imports {one}" for one in sorted(reached - allowed) if one.partition(".")[0] not in allowed]
    return found


def test_the_table_has_no_cycle_and_names_folders_that_exist() -> None:
    tuple(TopologicalSorter({folder: may.split() for folder, may in MAY_IMPORT.items()}).static_order())
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert folders | {"errors", "version", "__init__"} == set(MAY_IMPORT)
    for folder in WITHOUT_TORCH:
        assert set(MAY_IMPORT[folder].split()) <= {*WITHOUT_TORCH, "ops.rows"}, folder


def test_folders_without_torch_load_without_it() -> None:
    names = ", ".join(f"gradprobe.{name}" for name in sorted(WITHOUT_TORCH))
    script = f"import sys, {names}, gradprobe.ops.rows, gradprobe.diagnosis.diagnose; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_folders_import_only_what_the_table_allows() -> None:
    assert violations(PACKAGE) == []


def test_no_module_is_in_an_import_cycle() -> None:
    names = {".".join([PACKAGE.name, *Path(path).with_suffix("").parts]): path for path, _, _ in modules(PACKAGE)}
    graph: dict[str, set[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join([PACKAGE.name, *path.relative_to(PACKAGE).with_suffix("").parts])
        at_import = ast.parse(path.read_text()).body
        imported = {
            found
            for node in at_import
            if isinstance(node, ast.ImportFrom) and node.module
            for alias in node.names
            for found in (node.module, f"{node.module}.{alias.name}")
        }
        graph[name] = {found for found in imported if found in names and found != name}
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


PLANTED = [
    ("snapshot/stats.py", "from gradprobe.observers import gradients", "imports observers"),
    ("ops/libraries.py", "import gradprobe.probe", "imports probe"),
    ("ops/dispatch.py", "from ..probe import Probe", "imports probe"),
    ("snapshot/snapshot.py", "import torch.nn", "imports torch"),
    ("diagnosis/diagnose.py", "from gradprobe import ops", "imports ops"),
    ("networks/common.py", "from .. import observers", "imports observers"),
    ("observers/gradients.py", "def late():\n    from gradprobe import attach", "imports __init__"),
    ("stray.py", "", "stray is not in the table"),
]


def test_planted_imports_are_found(tmp_path: Path) -> None:
    package = tmp_path / PACKAGE.name
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for path, line, _ in PLANTED:
        with (package / path).open("a") as module:
            module.write(f"\n{line}\n")
    assert sorted(violations(package)) == sorted(f"{path}: {fault}" for path, _, fault in PLANTED)
