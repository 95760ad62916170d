"""One fit and one experiment on the compiled model, for all tests of steering."""

import pytest
from steering_lab import experiment_of, fitted

from companion.steering.experiment import SteeringExperiment
from companion.steering.extraction import Fit


@pytest.fixture(scope="session")
def fit() -> Fit:
    return fitted()


@pytest.fixture(scope="session")
def experiment(fit: Fit) -> SteeringExperiment:
    return experiment_of(fit)
