"""The lane that kernel tests run on: emulated always, --lane cuda where there is a GPU; --check watches every access."""

import numpy as np
import pytest


class EmulatedLane:
    name = "emulated"

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


@pytest.fixture(scope="session")
def lane(request):
    name = request.config.getoption("--lane")
    if name == "emulated":
        return EmulatedLane()
    raise pytest.UsageError(f"--lane {name}: not known")
