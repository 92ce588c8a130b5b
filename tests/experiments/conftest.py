"""Images that the tests of the experiments share."""

import pytest
from helpers.sweep_commands import write_images


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A folder of small images in CIFAR-10's layout."""
    folder = tmp_path_factory.mktemp("cifar")
    write_images(folder)
    return folder
