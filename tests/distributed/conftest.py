"""The numbers of ranks that a test of several processes runs on."""

import pytest
from support.ranks import LARGEST_WORLD


@pytest.fixture(params=range(1, LARGEST_WORLD + 1), ids="{} ranks".format, scope="module")
def world(request: pytest.FixtureRequest) -> int:
    return request.param
