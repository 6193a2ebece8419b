"""tools/measure/sm_clock.py: the clock beside each turn of a comparison, by a library that is made up."""

from types import SimpleNamespace

import pytest
from measure import sm_clock
from measure.peer.turns import take_turns
from measure.sm_clock import SideClocks, SmClock, side_clocks


class Library:
    """NVIDIA's, of one GPU; `refuses` names a function that fails."""

    def __init__(self, mhz, refuses=None):
        self._mhz, self._refuses, self.calls = list(mhz), refuses, []

    def __getattr__(self, name):
        def call(*args):
            self.calls.append((name, *args))
            if name == "nvmlDeviceGetClockInfo" and self._refuses != name:
                args[2]._obj.value = self._mhz.pop(0)
            return 3 * (name == self._refuses)
        return call


@pytest.fixture
def lane():
    runtime = SimpleNamespace(deviceGetPCIBusId=lambda index: f"0000:0{index}:00.0")
    return SimpleNamespace(name="cuda", device=SimpleNamespace(id=4),
                           cupy=SimpleNamespace(cuda=SimpleNamespace(runtime=runtime)))


def clocks_of(lane, monkeypatch, library):
    monkeypatch.setattr(sm_clock.ctypes, "CDLL", lambda name: library)
    clocks = side_clocks(lane)
    take_turns({side: SimpleNamespace(samples=lambda n: [1.0] * n) for side in ("ours", "theirs")}, 2, after=clocks)
    return clocks.notes()


def test_the_clock_is_read_after_each_turn_and_only_read(lane, monkeypatch):
    library = Library([1980, 1965, 1965, 1980])
    assert clocks_of(lane, monkeypatch, library) == ("SM clock 1972 MHz",)
    names = [name for name, *_ in library.calls]
    assert names == ["nvmlInit_v2", "nvmlDeviceGetHandleByPciBusId_v2", *4 * ["nvmlDeviceGetClockInfo"]]
    assert library.calls[1][1] == b"0000:04:00.0" and all(call[2] == sm_clock.SM for call in library.calls[2:])


@pytest.mark.parametrize("theirs, is_fair", [(1921, True), (1920, False), (2050, False)])
def test_sides_at_unequal_clocks_are_no_fair_comparison(lane, monkeypatch, theirs, is_fair):
    [note] = clocks_of(lane, monkeypatch, Library([1980, theirs, 1980, theirs]))
    assert note == ("SM clock 1980 MHz" if is_fair else
                    f"no fair comparison: SM clock 1980 MHz for ours, {theirs} for theirs")


@pytest.mark.parametrize("refuses", ["nvmlInit_v2", "nvmlDeviceGetHandleByPciBusId_v2", "nvmlDeviceGetClockInfo"])
def test_what_the_library_refuses_is_said_and_times_are_taken_all_the_same(lane, monkeypatch, refuses):
    [note] = clocks_of(lane, monkeypatch, Library([], refuses))
    assert note.startswith("SM clock not read: ") and f"{refuses}: status 3" in note


def test_without_the_library_a_row_says_so(lane, monkeypatch):
    monkeypatch.setattr(sm_clock, "LIBRARY", "libno-such-thing.so.1")
    [note] = side_clocks(lane).notes()
    assert "libno-such-thing.so.1" in note
    with pytest.raises(OSError, match="libno-such-thing"):
        SmClock("0000:04:00.0")


def test_without_a_gpu_nothing_is_said():
    clocks = side_clocks(SimpleNamespace(name="cpu"))
    clocks("ours")
    assert clocks.notes() == SideClocks().notes() == ()
