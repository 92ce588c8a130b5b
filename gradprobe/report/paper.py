"""What He et al. 2015 print of the nets that a sweep trains, with the conditions under which it was measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gradprobe.report.summary import Summary

PAPER = "He et al. 2015 (arXiv:1512.03385)"


@dataclass(frozen=True)
class PaperTable:
    """Errors that the paper prints.

    Attributes:
        what: The errors, and their place in the paper.
        data: The start of the name of the data that a sweep must have for them to stand beside it; empty for any.
        conditions: How they were measured, in sentences.
        error_pct: In per cent, as printed, by family and depth.
    """

    what: str
    data: str
    conditions: str
    error_pct: Mapping[tuple[str, int], str]


CIFAR = PaperTable(
    what="test error on CIFAR-10 (Table 6)",
    data="cifar10",
    conditions=(
        "64,000 iterations of batch 128 on augmented images, shortcuts without parameters (option A), a single view at "
        "test; ResNet-110 is the best of five runs, with a mean of 6.61 ± 0.16. A shorter run or another recipe does "
        "not reach these. Of plain nets no numbers are printed."
    ),
    error_pct={
        ("resnet", 20): "8.75",
        ("resnet", 32): "7.51",
        ("resnet", 44): "7.17",
        ("resnet", 56): "6.97",
        ("resnet", 110): "6.43",
        ("resnet", 1202): "7.93",
    },
)
# No sweep trains on ImageNet: what can be compared is what depth does.
IMAGENET = PaperTable(
    what="top-1 error on the validation images of ImageNet (Tables 2 and 3)",
    data="",
    conditions=(
        "1,000 classes of photographs, the mean over 10 crops at test; ResNet-18 with shortcuts without parameters "
        "(option A), the deeper ones, as all of them here, with projections where the shape changes (option B). The "
        "data are not those of this sweep: what can be compared is the order of the nets, not the numbers."
    ),
    error_pct={
        ("plain", 18): "27.94",
        ("plain", 34): "28.54",
        ("resnet", 18): "27.88",
        ("resnet", 34): "24.52",
        ("resnet", 50): "22.85",
        ("resnet", 101): "21.75",
        ("resnet", 152): "21.43",
    },
)


def tables_beside(summary: Summary) -> list[PaperTable]:
    """Chooses the tables of the paper that have a net of a sweep.

    Args:
        summary: The sweep.

    Returns:
        Those whose errors may stand beside the sweep's own.
    """
    nets = {(net.family, net.depth) for net in summary.nets}
    data = str(summary.config.get("data", ""))
    return [table for table in (CIFAR, IMAGENET) if data.startswith(table.data) and nets & set(table.error_pct)]


def beside_the_paper(summary: Summary) -> list[str]:
    """What the paper prints of a sweep's nets, a paragraph for each table."""
    paragraphs = []
    for table in tables_beside(summary):
        nets = [net for net in summary.nets if (net.family, net.depth) in table.error_pct]
        told = ", ".join(f"{net.name} {table.error_pct[net.family, net.depth]} %" for net in nets)
        paragraphs.append(f"{PAPER} print as {table.what}: {told}. There: {table.conditions}")
    return paragraphs
