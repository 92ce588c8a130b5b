"""Every file in examples/ runs and prints what it promises."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

# Arguments, libraries that it needs, and what it prints.
SCRIPTS = {
    "plain_loop.py": ((), (), ("step 79: loss ", "4.add: ", "No fault in 80 steps.")),
    "small_gpt_with_a_fault.py": ((), (), ("1. dead ReLU: ", "the first is blocks.2.relu")),
    "small_gpt_with_a_fault.py --fault nan": (("--fault", "nan"), (), ("forward pass, output of blocks.2.up",)),
    "small_gpt_with_a_fault.py --fault none": (("--fault", "none"), (), ("No fault in 60 steps",)),
    "compiled.py": (("--backend", "aot_eager"), (), ("in steps [0, 5, 10, 15]", "No fault in 20 steps")),
    "lightning_callback.py": ((), ("lightning",), ("went on with step 40 and ended with step 59", "No fault in 20 ")),
    "transformers_trainer.py": ((), ("transformers", "accelerate"), ("step 40: loss ", "No fault in 40 steps.")),
    "accelerate_loop.py": ((), ("accelerate",), ("steps 20 to 39: loss ", "No fault in 20 steps")),
}
SLOWER = {
    "compiled.py",
    "small_gpt_with_a_fault.py --fault none",
    "small_gpt_with_a_fault.py --fault nan",
    "lightning_callback.py",
    "transformers_trainer.py",
}
ON_TWO_PROCESSES = {
    "ddp.py": ("gradients averaged", "No fault in 40 steps"),
    "fsdp2.py": ("gradients global", "2048 elements, of which this rank holds 1024", "No fault in 20 steps"),
}


def test_no_example_is_left_out() -> None:
    tested = {name.partition(" ")[0] for name in SCRIPTS} | set(ON_TWO_PROCESSES) | {"tour.ipynb"}
    assert {path.name for path in EXAMPLES.iterdir() if path.is_file()} == tested


@pytest.mark.filterwarnings("ignore")  # those of the trainers
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.soak if name in SLOWER else ()) for name in SCRIPTS]
)
def test_example_prints_what_it_promises(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    if name == "compiled.py":
        request.getfixturevalue("fresh_dynamo")
    arguments, libraries, expected = SCRIPTS[name]
    for library in libraries:
        pytest.importorskip(library)
    monkeypatch.chdir(tmp_path)
    script = EXAMPLES / name.partition(" ")[0]
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])

    runpy.run_path(str(script), run_name="__main__")

    printed = capsys.readouterr().out
    assert [part for part in expected if part not in printed] == [], printed


@pytest.mark.soak
@pytest.mark.parametrize("name", ON_TWO_PROCESSES)
def test_example_runs_on_two_processes(name: str, tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for _ in range(2):
        done = subprocess.run([*launch, EXAMPLES / name], cwd=tmp_path, capture_output=True, text=True, check=False)
        # gloo's threads outlive destroy_process_group; one that needs the GIL while the interpreter ends aborts
        if "terminate called without an active exception" not in done.stderr:
            break

    assert done.returncode == 0, done.stderr
    assert [part for part in ON_TWO_PROCESSES[name] if part not in done.stdout] == [], done.stdout
    (norms,) = (line.partition(": ")[2] for line in done.stdout.splitlines() if line.startswith("total norm"))
    first, second = norms.strip("[]").split(", ")
    assert first == second


@pytest.mark.soak
def test_notebook_runs(tmp_path: Path) -> None:
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(EXAMPLES / "tour.ipynb", 4)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # kept out of the repository

    nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()

    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    shown = "\n".join(output.get("text") or output["data"].get("text/html", "") for output in outputs)
    assert "vanishing" in shown
    assert "dead ReLU (50, 59) ('layer3.relu',)" in shown
    assert "vegaEmbed" in shown  # the chart
