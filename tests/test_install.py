"""Real installs into fresh environments: isolated, not isolated, without a compiler, with code that does not compile.

The environments see this one's torch through links on a .pth path: pip counts them as installed and never touches them.
"""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
HIDDEN = re.compile(
    r"pip|setuptools|wheel|ninja|_distutils_hack|distutils-precedence|gradprobe|__editable__|__pycache__"
)
REPORT = """
import json, pathlib
import torch, gradprobe
folder = pathlib.Path(gradprobe.__file__).parent
print(json.dumps({
    "folder": str(folder),
    "libraries": sorted(path.name.partition(".")[0] for path in folder.glob("*.so")),
    "info": json.loads((folder / "_build_info.json").read_text()),
    "backends": gradprobe.backends(),
    "row": gradprobe.grad_stats([torch.tensor([3.0, -4.0])])[0].tolist(),
}))
"""

pytestmark = pytest.mark.soak


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of what the package is built from."""
    target = tmp_path / "source"
    target.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target)
    for name in ("build_backend", "csrc", "gradprobe"):
        ignored = shutil.ignore_patterns("__pycache__", "*.so", "_build_info.json")
        shutil.copytree(ROOT / name, target / name, ignore=ignored)
    return target


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """The interpreter of a fresh environment that sees torch and the other dependencies, and no setuptools."""
    visible = tmp_path / "visible"
    visible.mkdir()
    for entry in Path(torch.__file__).parent.parent.iterdir():
        if not HIDDEN.match(entry.name) and entry.suffix != ".pth":
            (visible / entry.name).symlink_to(entry)
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    interpreter = environment / "bin" / "python"
    answer = subprocess.run(
        [interpreter, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True,
        capture_output=True,
        text=True,
    )
    Path(answer.stdout.strip(), "visible.pth").write_text(f"{visible}\n")
    subprocess.run([interpreter, "-m", "pip", "uninstall", "--yes", "--quiet", "setuptools"], check=True)
    return interpreter


def pip(python: Path, *arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [python, "-m", "pip", "--disable-pip-version-check", "install", *arguments]
    # One part of the build that these tests leave to `make build`: minutes of nvcc.
    environment = os.environ | {"GRADPROBE_WITHOUT": "cuda"} | variables
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def installed(python: Path, tmp_path: Path) -> dict[str, Any]:
    answer = subprocess.run([python, "-c", REPORT], cwd=tmp_path, check=True, capture_output=True, text=True)
    report = json.loads(answer.stdout)
    assert isinstance(report, dict)
    return report


def test_isolated_build_uses_the_torch_of_the_environment(source: Path, python: Path, tmp_path: Path) -> None:
    done = pip(python, "-v", "-e", source)

    said = done.stdout + done.stderr  # pip tells of the isolated environment on the one or the other
    assert done.returncode == 0, said
    assert re.search(r"Successfully installed .*\bninja-", said)
    assert not re.search(r"Successfully installed .*\btorch-", said)
    report = installed(python, tmp_path)
    assert report["folder"] == str(source / "gradprobe")
    assert report["libraries"] == ["_C", "_hooks"]
    assert report["info"] == report["info"] | {
        "native": "built",
        "hooks": "built",
        "cuda": "left out by GRADPROBE_WITHOUT",
        "torch": importlib.metadata.version("torch"),
    }
    assert report["row"] == [-1.0, 7.0, 25.0, 4.0, 0.0, 0.0]


def test_build_without_isolation_into_site_packages(source: Path, python: Path, tmp_path: Path) -> None:
    assert pip(python, "setuptools>=77", "ninja>=1.11").returncode == 0

    done = pip(python, "--no-build-isolation", source)

    assert done.returncode == 0, done.stdout + done.stderr
    report = installed(python, tmp_path)
    assert Path(report["folder"]).is_relative_to(tmp_path / "environment")
    assert report["libraries"] == ["_C", "_hooks"]
    assert report["backends"]["native"].startswith("ready")


@pytest.mark.parametrize(
    ("hide", "looked_for"),
    [({"CXX": "no-such-compiler"}, "no-such-compiler"), ({"PATH": "/nowhere"}, "c++, g++, clang++")],
    ids=["CXX-points-to-nothing", "nothing-on-PATH"],
)
def test_without_a_compiler_the_package_is_pure_python_and_says_so(
    source: Path, python: Path, tmp_path: Path, hide: dict[str, str], looked_for: str
) -> None:
    done = pip(python, "-e", source, **hide)

    assert done.returncode == 0, done.stdout + done.stderr
    report = installed(python, tmp_path)
    reason = f"no C++ compiler found (looked for {looked_for})"
    assert report["libraries"] == []
    assert {report["info"][part] for part in ("native", "hooks", "cuda")} == {reason}
    assert report["backends"]["native"] == reason
    assert report["row"] == [-1.0, 7.0, 25.0, 4.0, 0.0, 0.0]


def test_code_that_does_not_compile_fails_the_install(source: Path, python: Path) -> None:
    with (source / "csrc" / "register.cpp").open("a") as code:
        code.write("static int never_used(int argument) { return 1; }\n")

    done = pip(python, "-e", source)

    assert done.returncode != 0
    assert "never_used" in done.stdout + done.stderr
    assert "the native build failed" in done.stdout + done.stderr


def test_an_install_without_a_compiler_removes_the_libraries_of_an_earlier_one(
    source: Path, python: Path, tmp_path: Path
) -> None:
    (source / "gradprobe" / "_C.so").write_bytes(b"of an earlier torch")

    assert pip(python, "-e", source, CXX="no-such-compiler").returncode == 0

    assert installed(python, tmp_path)["libraries"] == []


def test_an_unknown_part_to_leave_out_is_refused(source: Path, python: Path) -> None:
    done = pip(python, "-e", source, GRADPROBE_WITHOUT="cuda,kernels")

    assert done.returncode != 0
    assert "GRADPROBE_WITHOUT names ['kernels']; it takes a comma list of native, hooks, cuda" in done.stderr
