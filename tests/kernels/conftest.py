"""The lane that kernel tests run on: emulated always, --lane cuda where there is a GPU; --check watches memory."""

import numpy as np
import pytest

from engine.cuda_lane import CudaLane
from engine.kernels import host


class EmulatedLane:
    name = "emulated"

    def __init__(self, launches):
        self.is_checked, self._launches = launches is not None, launches

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
        return self._launches[-1].traffic


class GpuLane:
    name = "cuda"
    is_checked = False

    def __init__(self, cuda):
        self._cuda = cuda
        self.put, self.zeros, self.to_host = cuda.to_device, cuda.zeros, cuda.to_host

    def empty(self, shape, dtype):
        array = self._cuda.empty(shape, dtype)
        array.data.memset_async(0xFF, array.nbytes, self._cuda.stream)
        return array

    def traffic(self):
        pytest.skip("traffic is counted by the emulator, under --check")


@pytest.fixture(scope="session")
def lane(request):
    name = request.config.getoption("--lane")
    if name != "emulated":
        cuda = CudaLane(int(name.partition(":")[2] or 0), None, np.float32)
        with cuda.running():
            yield GpuLane(cuda)
        return
    with host.checking(request.config.getoption("--check"), most=1) as launches:
        yield EmulatedLane(launches)
