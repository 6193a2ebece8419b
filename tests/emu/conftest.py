import pytest

from engine.kernels import host


@pytest.fixture(autouse=True)
def plain():
    """Whatever --check says, a test here chooses its builds itself."""
    with host.checking(False):
        yield


@pytest.fixture(params=["plain", "checked"])
def both(request, plain):
    """Runs a test on plain and on checked builds."""
    with host.checking(request.param == "checked"):
        yield request.param


@pytest.fixture
def checked(plain):
    with host.checking():
        yield
