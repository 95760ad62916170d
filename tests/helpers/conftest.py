"""One small study of the quick model, for all tests of helpers."""

import pytest

from companion.mediation.study import Study
from helpers import model


@pytest.fixture(scope="session")
def study() -> Study:
    return model.begin("embedded", "embedded", "embedded", profile="smoke")
