"""The SM clock of a GPU at work, by the driver's management library, as nvidia-smi has it; reading changes nothing.

    clocks = side_clocks(lane)
    samples = take_turns(sides, rounds, after=clocks)
    row = Row(..., notes=clocks.notes())
"""

import ctypes
from statistics import median

LIBRARY = "libnvidia-ml.so.1"
SM = 1                          # NVML_CLOCK_SM
MOST_APART = 0.03               # of two sides' clocks, where their times are to be compared


class SmClock:
    """Of the GPU at a PCI address. Raises OSError where the library is not there or does not know."""

    def __init__(self, pci_address):
        self._library, self._device = ctypes.CDLL(LIBRARY), ctypes.c_void_p()
        self._call("nvmlInit_v2")
        self._call("nvmlDeviceGetHandleByPciBusId_v2", pci_address.encode(), ctypes.byref(self._device))

    def mhz(self):
        value = ctypes.c_uint()
        self._call("nvmlDeviceGetClockInfo", self._device, SM, ctypes.byref(value))
        return value.value

    def _call(self, function, *args):
        status = getattr(self._library, function)(*args)
        if status:
            raise OSError(f"{function}: status {status}")


class SideClocks:
    """What the clock was after each turn of each side; read() is MHz. why_not: why nobody can say."""

    def __init__(self, read=None, why_not=""):
        self._read, self._why_not, self._mhz = read, why_not, {}

    def __call__(self, side):
        if self._read is not None:
            try:
                self._mhz.setdefault(side, []).append(self._read())
            except OSError as error:
                self._read, self._why_not = None, str(error)

    def notes(self):
        """Of a row that compares "ours" with "theirs"."""
        if self._why_not:
            return f"SM clock not read: {self._why_not}",
        if not self._mhz:
            return ()
        ours, theirs = (median(self._mhz[side]) for side in ("ours", "theirs"))
        if abs(ours - theirs) > MOST_APART * max(ours, theirs):
            return f"no fair comparison: SM clock {ours:.0f} MHz for ours, {theirs:.0f} for theirs",
        return f"SM clock {ours:.0f} MHz",


def side_clocks(lane):
    """The SideClocks of a comparison on a lane; without a GPU they say nothing."""
    if lane.name != "cuda":
        return SideClocks()
    try:
        return SideClocks(SmClock(lane.cupy.cuda.runtime.deviceGetPCIBusId(lane.device.id)).mhz)
    except Exception as error:              # whatever is missing, times are measured all the same
        return SideClocks(why_not=f"{type(error).__name__}: {error}")
