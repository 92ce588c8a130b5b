"""Builds the two native modules and sets the dependency on torch. Everything else is in pyproject.toml."""

from __future__ import annotations

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_backend"))

import native  # noqa: E402
from toolchain import PINNED_TORCH  # noqa: E402

plan = native.make_plan()


class BuildNative(build_ext):
    """Builds the modules with ninja and copies the libraries to where setuptools expects them."""

    def run(self) -> None:
        """Checks the plan, then builds."""
        plan.check()
        super().run()

    def get_ext_filename(self, fullname: str) -> str:
        """Returns a library's path in its package. setuptools may call this without the package's name."""
        package, _, name = fullname.rpartition(".")
        file_names = {module.name.rpartition(".")[2]: module.file_name for module in plan.modules}
        return str(Path(package, file_names[name]))

    def build_extensions(self) -> None:
        """Builds all modules with one run of ninja."""
        for name, library in native.build(plan).items():
            target = Path(self.get_ext_fullpath(name))
            target.parent.mkdir(parents=True, exist_ok=True)
            self.copy_file(str(library), str(target))


class BuildPython(build_py):
    """Copies the package and adds ``_build_info.json``."""

    def run(self) -> None:
        """Copies the package, removes stale libraries and records what was built."""
        plan.check()
        super().run()
        package = (ROOT if self.editable_mode else Path(self.build_lib)) / "gradprobe"
        native.remove_stale(package, plan)
        native.write_info(package, plan.info)


setup(
    ext_modules=[Extension(module.name, module.sources) for module in plan.modules],
    install_requires=[
        plan.torch.requirement if plan.torch else f"torch=={PINNED_TORCH}",
        "numpy>=1.26",
        "rich>=13.7",
        "scipy>=1.11",
        "typer>=0.19",
    ],
    cmdclass={"build_ext": BuildNative, "build_py": BuildPython},
)
