"""The lane that kernel tests run on: emulated always, --lane cuda where there is a GPU; --check watches every access."""

import numpy as np
import pytest

from engine.kernels import host


class EmulatedLane:
    name = "emulated"

    def __init__(self, is_checked):
        self.is_checked = is_checked

    def put(self, array):
        """A copy of a host array where kernels of this lane can read it."""
        return np.array(array, order="C")

    def empty(self, shape, dtype):
        """Memory full of a pattern that no test expects: NaN in every float type."""
        array = np.empty(shape, dtype)
        array.view(np.uint8).reshape(-1)[...] = 0xFF
        return array

    def zeros(self, shape, dtype):
        return np.zeros(shape, dtype)

    def to_host(self, array):
        return array

    def traffic(self):
        """Traffic of the last launch; a test that asks without --check is skipped."""
        if not self.is_checked:
            pytest.skip("traffic is counted under --check")
        return host.last_traffic()


@pytest.fixture(scope="session")
def lane(request):
    name = request.config.getoption("--lane")
    if name == "emulated":
        is_checked = request.config.getoption("--check")
        with host.checking(is_checked):
            yield EmulatedLane(is_checked)
    else:
        raise pytest.UsageError(f"--lane {name}: not known")
