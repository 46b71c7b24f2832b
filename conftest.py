"""The option ``--backend``, for tests and benchmarks."""

import pytest

import bench  # noqa: F401  before anything imports NumPy
from kernels import backend_names, get_backend


def pytest_addoption(parser):
    parser.addoption(
        "--backend",
        action="append",
        metavar="NAME",
        help="test or measure only this backend; may be repeated (default: all)",
    )


def pytest_configure(config):
    for name in config.getoption("--backend") or []:
        try:
            get_backend(name)
        except ValueError as error:
            raise pytest.UsageError(str(error)) from error


def pytest_generate_tests(metafunc):
    names = metafunc.config.getoption("--backend") or backend_names()
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", names, indirect=True, scope="session")
    if "full_batch_backend" in metafunc.fixturenames:
        fast = [name for name in names if not get_backend(name).too_slow_for_full_batches]
        metafunc.parametrize("full_batch_backend", fast, indirect=True, scope="session")


@pytest.fixture(scope="session")
def backend(request):
    """Each selected backend."""
    return get_backend(request.param)


@pytest.fixture(scope="session")
def full_batch_backend(request):
    """Each selected backend that is fast enough for full batches."""
    return get_backend(request.param)
