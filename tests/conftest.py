"""What every test shares: settings of hypothesis, and tests for a device only where there is one."""

import pytest
import torch
from hypothesis import settings

# A shared runner stalls now and then: time limits belong to benchmarks.
settings.register_profile("gradprobe", deadline=None, print_blob=True)
settings.load_profile("gradprobe")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="torch sees no CUDA device"))
