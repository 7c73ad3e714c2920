"""Data of the tests that train."""

from pathlib import Path

import pytest

from tests.support.runs import build_streets


@pytest.fixture(scope="module")
def streets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the shards of a few drawn streets, in which runs are made."""
    folder = tmp_path_factory.mktemp("streets")
    build_streets(folder)
    return folder
