"""Which parts of gradprobe work on this machine, and what you lose without the others."""

from __future__ import annotations

import platform
import warnings
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from gradprobe import ops
from gradprobe.errors import GradprobeWarning, printable
from gradprobe.ops import libraries
from gradprobe.version import VERSION

_COSTS = {
    "native": "statistics use plain torch operations in float64: several passes over each gradient",
    "triton": "on a GPU without the native part, statistics use plain torch operations",
    "hooks": "hooks run in Python: one call per parameter and backward pass",
}
_COST_OF_NO_CUDA = "nothing on the CPU; on a GPU, statistics use Triton or plain torch operations"


@dataclass(frozen=True, slots=True)
class Installation:
    """The state of this installation; prints as a table.

    Attributes:
        versions: Version of each package or program.
        parts: "ready" for each part of gradprobe, or the reason why it is not.
        costs: What you lose, for each part that is not ready.
    """

    versions: dict[str, str]
    parts: dict[str, str]
    costs: dict[str, str]

    def as_dict(self) -> dict[str, dict[str, str]]:
        """Returns the state as plain data."""
        return asdict(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table("part", "state", "what you lose without it", title="gradprobe doctor", title_justify="left")
        for name, value in self.versions.items():
            table.add_row(name, Text(value), "")
        table.add_section()
        for name, state in self.parts.items():
            style = "green" if state == "ready" else "yellow"
            table.add_row(name, Text(printable(state), style=style), self.costs.get(name, ""))
        yield table


def doctor() -> Installation:
    """Examines this installation, and tries the back ends on every GPU.

    Returns:
        The versions, and the state of each part.

    Example:
        >>> doctor().parts["reference"]
        'ready'
    """
    versions = {"gradprobe": VERSION} | {name: _version(name) for name in ("torch", "triton", "numpy")}
    versions["python"] = platform.python_version()
    versions["cuda of torch"] = torch.version.cuda or "none"
    versions["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GradprobeWarning)  # the table says what cannot run
        for index in range(n_gpus):
            ops.resolve("auto", torch.device("cuda", index))
    parts = {**ops.backends(), "hooks": libraries.native_hooks()[1]}
    costs = {name: _COSTS[name] for name, state in parts.items() if state != "ready"}
    if parts["native"].startswith("ready for cpu"):
        costs["native"] = _COST_OF_NO_CUDA
    return Installation(versions, parts, costs)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
