"""Every kernel test runs in hostile memory; one that takes ``run`` is repeated on each back end and instruction set."""

from __future__ import annotations

from collections.abc import Generator, Iterator

import pytest
import torch
from common import device_of, hostile_memory, placing, running, runs, skip_if_not_offered
from hypothesis import HealthCheck, settings
from interpreter import quicken

# The fixtures only set where things run, which does not change between hypothesis's examples.
settings.register_profile(
    "kernels",
    deadline=None,
    derandomize=True,
    max_examples=25,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("kernels")
quicken()


@pytest.fixture(autouse=True)
def _hostile_memory() -> Iterator[None]:
    torch.manual_seed(0)
    with hostile_memory():
        yield


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test file is named after its operation, or says in RUNS what to run."""
    if "run" in metafunc.fixturenames:
        named = getattr(metafunc.module, "RUNS", None)  # perhaps none can run here: then nothing is
        if named is None:
            named = runs(metafunc.module.__name__.removeprefix("test_"))
        metafunc.parametrize("run", named, indirect=True)


@pytest.fixture
def run(request: pytest.FixtureRequest) -> Iterator[str]:
    """A back end, and for the native one an instruction set: in use, on its own device, while the test runs."""
    with running(request.param), placing(device_of(request.param)):
        yield request.param


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None]:
    try:
        return (yield)
    except Exception as error:
        skip_if_not_offered(error)
        raise
