"""Installs the package into fresh environments: with and without isolation, without a compiler, with broken code.

The environments see this one's torch through links on a .pth path. pip treats it as installed and does not touch it; uv
does not look there, so it is told to install no dependencies.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

import gradprobe

ROOT = Path(__file__).resolve().parents[2]
HIDDEN = re.compile(
    r"pip|setuptools|wheel|ninja|_distutils_hack|distutils-precedence|gradprobe|__editable__|__pycache__"
)
PINNED_TORCH = re.findall(r'^PINNED_TORCH = "(.*)"', (ROOT / "build_backend/toolchain.py").read_text(), re.MULTILINE)[0]
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

FILES = (
    *("setup.py", "pyproject.toml", "MANIFEST.in", "Makefile", "mkdocs.yml", ".clang-format"),
    *("README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md"),
)

pytestmark = pytest.mark.soak


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of the files that the package is built from."""
    target = tmp_path / "source"
    target.mkdir()
    for name in FILES:
        shutil.copy(ROOT / name, target)
    for name in ("build_backend", "csrc", "docs", "examples", "gradprobe"):
        ignored = shutil.ignore_patterns("__pycache__", "*.so", "_build_info.json")
        shutil.copytree(ROOT / name, target / name, ignore=ignored)
    return target


def show_packages(environment: Path) -> None:
    """Makes torch and its neighbours visible in an environment, except for packaging tools."""
    visible = environment.parent / "visible"
    visible.mkdir()
    for entry in Path(torch.__file__).parent.parent.iterdir():
        if not HIDDEN.match(entry.name) and entry.suffix != ".pth":
            (visible / entry.name).symlink_to(entry)
    (purelib(environment) / "visible.pth").write_text(f"{visible}\n")


def purelib(environment: Path) -> Path:
    return next(environment.glob("lib/python*/site-packages"))


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """The interpreter of a fresh environment with torch and the other dependencies but without setuptools."""
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    show_packages(environment)
    interpreter = environment / "bin" / "python"
    subprocess.run([interpreter, "-m", "pip", "uninstall", "--yes", "--quiet", "setuptools"], check=True)
    return interpreter


def pip(python: Path, *arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [python, "-m", "pip", "--disable-pip-version-check", "install", *arguments]
    # Leaves nvcc, which takes minutes, to `make build`.
    environment = os.environ | {"GRADPROBE_WITHOUT": "cuda"} | variables
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def installed(python: Path, tmp_path: Path) -> dict[str, Any]:
    answer = subprocess.run([python, "-c", REPORT], cwd=tmp_path, check=True, capture_output=True, text=True)
    report = json.loads(answer.stdout)
    assert isinstance(report, dict)
    return report


def test_isolated_build_uses_the_torch_of_the_environment(source: Path, python: Path, tmp_path: Path) -> None:
    done = pip(python, "-v", "-e", source)

    said = done.stdout + done.stderr  # pip reports the isolated environment on either
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
        "torch": torch.__version__,
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


def test_a_wheel_built_from_the_sdist_works_in_an_empty_environment(source: Path, python: Path, tmp_path: Path) -> None:
    pytest.importorskip("build.__main__")  # `build` alone may be the folder
    command = [sys.executable, "-m", "build", "--outdir", tmp_path / "dist", source]
    environment = os.environ | {"CXX": "no-such-compiler"}  # a native build is tested above
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (sdist,), (wheel,) = ((tmp_path / "dist").glob(pattern) for pattern in ("*.tar.gz", "*.whl"))
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    files = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
    assert {name for name in files - packed if ".egg-info" not in name} == set()
    with zipfile.ZipFile(wheel) as archive:
        inside = archive.namelist()
    assert {name.partition("/")[0].partition("-")[0] for name in inside} == {"gradprobe"}  # no tests, no docs
    assert any(name.endswith("licenses/LICENSE") for name in inside)

    assert pip(python, wheel).returncode == 0
    report = installed(python, tmp_path)
    assert Path(report["folder"]).is_relative_to(tmp_path / "environment")
    assert report["row"] == [-1.0, 7.0, 25.0, 4.0, 0.0, 0.0]
    assert report["backends"]["reference"] == "ready"
    asked = subprocess.run([python.with_name("gradprobe"), "--version"], capture_output=True, text=True, check=True)
    assert asked.stdout == f"gradprobe {gradprobe.__version__}\n"
    metadata = next(purelib(tmp_path / "environment").glob("gradprobe-*.dist-info/METADATA")).read_text()
    assert f"\nVersion: {gradprobe.__version__}\n" in metadata


def test_code_that_does_not_compile_fails_the_install(source: Path, python: Path) -> None:
    with (source / "csrc" / "stable" / "register.cpp").open("a") as code:
        code.write("static int never_used(int argument) { return 1; }\n")

    done = pip(python, "-e", source, GRADPROBE_WERROR="1")

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
    assert "GRADPROBE_WITHOUT: needed a comma-separated list of native, hooks, cuda, got ['kernels']" in done.stderr


class Uv:
    """Runs uv in a folder, with the variables of a shell outside any environment."""

    def __init__(self, program: str, variables: dict[str, str]) -> None:
        self._program = program
        self._variables = variables

    def __call__(
        self, *arguments: str | Path, folder: Path, **variables: str | Path
    ) -> subprocess.CompletedProcess[str]:
        environment = self._variables | {name: str(value) for name, value in variables.items()}
        command = [self._program, *arguments]
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)

    def environment(self, folder: Path, *, with_torch: bool) -> Path:
        """Creates a fresh environment without setuptools: empty, or with torch and the other dependencies visible."""
        made = self("venv", "--python", sys.executable, folder, folder=folder.parent)
        assert made.returncode == 0, made.stderr
        if with_torch:
            show_packages(folder)
        return folder


@pytest.fixture
def uv(tmp_path: Path) -> Uv:
    """A uv that fails if a build tries to install torch."""
    program = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if program is None:
        pytest.skip("uv is not installed")
    no_torch = tmp_path / "no-torch.txt"
    no_torch.write_text("torch==0.0.1\n")
    hidden = ("VIRTUAL_ENV", "CONDA_PREFIX", "UV_PYTHON")
    variables = {name: value for name, value in os.environ.items() if name not in hidden}
    return Uv(program, variables | {"GRADPROBE_WITHOUT": "cuda", "UV_BUILD_CONSTRAINT": str(no_torch)})


def required_torch(environment: Path) -> list[str]:
    (metadata,) = purelib(environment).glob("gradprobe-*.dist-info/METADATA")
    return re.findall(r"^Requires-Dist: (torch.*)", metadata.read_text(), re.MULTILINE)


def test_uv_builds_against_the_torch_of_the_environment(uv: Uv, source: Path, tmp_path: Path) -> None:
    environment = uv.environment(tmp_path / "environment", with_torch=True)

    done = uv("pip", "install", "--no-deps", "--python", environment, "-e", source, folder=tmp_path)

    assert done.returncode == 0, done.stderr
    report = installed(environment / "bin" / "python", tmp_path)
    assert report["folder"] == str(source / "gradprobe")
    assert report["libraries"] == ["_C", "_hooks"]
    assert report["info"]["torch"] == torch.__version__
    assert report["row"] == [-1.0, 7.0, 25.0, 4.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("arguments", "inside"),
    [
        (["."], True),
        (["{source}"], False),
        (["--python={environment}/bin/python", "{source}"], False),
        (["-p", "{environment}", "{source}"], False),
        (["--no-build-isolation", "."], True),
    ],
    ids=["beside-the-source", "activated", "its-python", "its-folder", "no-isolation"],
)
def test_uv_finds_the_environment_however_it_is_chosen(
    uv: Uv, source: Path, tmp_path: Path, arguments: list[str], inside: bool
) -> None:
    environment = uv.environment(source / ".venv", with_torch=True)
    if "--no-build-isolation" in arguments:
        needs = uv("pip", "install", "setuptools>=77", "ninja>=1.11", folder=source)
        assert needs.returncode == 0, needs.stderr
    variables = {"GRADPROBE_WITHOUT": "cuda,hooks,native"}  # the metadata shows which torch was found, without a build
    if not inside and len(arguments) == 1:
        variables |= {"VIRTUAL_ENV": str(environment)}

    filled = [argument.format(source=source, environment=environment) for argument in arguments]
    done = uv("pip", "install", "--no-deps", *filled, folder=source if inside else tmp_path, **variables)

    assert done.returncode == 0, done.stderr
    assert required_torch(environment) == ["torch<2.16,>=2.11"]
    assert installed(environment / "bin" / "python", tmp_path)["row"] == [-1.0, 7.0, 25.0, 4.0, 0.0, 0.0]


def test_uv_requires_the_pinned_torch_for_an_empty_environment(uv: Uv, source: Path, tmp_path: Path) -> None:
    environment = uv.environment(tmp_path / "environment", with_torch=False)

    done = uv("pip", "install", "--python", environment, "-e", source, folder=tmp_path)

    assert done.returncode != 0
    # The fixture's constraint forbids this version, so nothing large is downloaded.
    assert f"torch=={PINNED_TORCH}" in done.stderr


def test_uv_installs_pure_python_without_a_compiler(uv: Uv, source: Path, tmp_path: Path) -> None:
    environment = uv.environment(tmp_path / "environment", with_torch=False)

    done = uv("pip", "install", "--no-deps", "--python", environment, source, folder=tmp_path, CXX="no-such-compiler")

    assert done.returncode == 0, done.stderr
    package = purelib(environment) / "gradprobe"
    assert list(package.glob("*.so")) == []
    assert "no-such-compiler" in json.loads((package / "_build_info.json").read_text())["native"]
    assert required_torch(environment) == [f"torch=={PINNED_TORCH}"]
