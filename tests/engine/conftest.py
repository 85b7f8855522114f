"""Modules that name BACKENDS run all their tests on each of them, fixtures included."""

from contextlib import nullcontext

import pytest

from qnext.kernels.dispatch import use_backend


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    backends = getattr(metafunc.module, "BACKENDS", None)
    if backends and "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", backends, indirect=True, scope="module")


@pytest.fixture(scope="module", autouse=True)
def backend(request: pytest.FixtureRequest):
    """Name of the backend that the whole model is bound to, None for the fastest."""
    name = getattr(request, "param", None)
    with use_backend(name) if name else nullcontext():
        yield name
