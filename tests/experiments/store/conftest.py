"""Where the tests of the sweep's file put it."""

import pytest


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.sqlite"
