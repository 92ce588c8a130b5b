"""Errors that He et al. 2015 publish for the networks that a sweep trains, with the conditions of measurement."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gradprobe.report.summary import Summary

CITATION = "He et al. 2015 (arXiv:1512.03385)"


@dataclass(frozen=True)
class PublishedTable:
    """A table of errors in the paper.

    Attributes:
        what: The kind of error, and its place in the paper.
        data: Prefix of the data name of the sweeps that the table may be shown beside; empty for any data.
        conditions: Conditions of measurement, in sentences.
        error_pct: Errors by family and depth, in percent, as printed.
    """

    what: str
    data: str
    conditions: str
    error_pct: Mapping[tuple[str, int], str]


CIFAR = PublishedTable(
    what="test error on CIFAR-10 (Table 6)",
    data="cifar10",
    conditions=(
        "64,000 iterations of batch 128 on augmented images, shortcuts without parameters (option A), a single view at "
        "test; ResNet-110 is the best of five runs, whose mean is 6.61 ± 0.16. A shorter run or another recipe does "
        "not reach these errors. The paper prints no numbers for plain networks."
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
# No sweep trains on ImageNet: only the effect of depth can be compared.
IMAGENET = PublishedTable(
    what="top-1 error on the validation images of ImageNet (Tables 2 and 3)",
    data="",
    conditions=(
        "1,000 classes of photographs, the mean over 10 crops at test; ResNet-18 with shortcuts without parameters "
        "(option A), the deeper ones, like all of them here, with projections where the shape changes (option B). The "
        "data differ from those of this sweep: compare the order of the networks, not the numbers."
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


def matching_tables(summary: Summary) -> list[PublishedTable]:
    """Selects the paper's tables that have at least one of a sweep's networks and suit its data."""
    nets = {(net.family, net.depth) for net in summary.nets}
    data = str(summary.config.get("data", ""))
    return [table for table in (CIFAR, IMAGENET) if data.startswith(table.data) and nets & set(table.error_pct)]


def published_paragraphs(summary: Summary) -> list[str]:
    """States the paper's errors for a sweep's networks, one paragraph per table."""
    paragraphs = []
    for table in matching_tables(summary):
        nets = [net for net in summary.nets if (net.family, net.depth) in table.error_pct]
        errors = ", ".join(f"{net.name} {table.error_pct[net.family, net.depth]} %" for net in nets)
        paragraphs.append(f"{CITATION} report this {table.what}: {errors}. Their conditions: {table.conditions}")
    return paragraphs
