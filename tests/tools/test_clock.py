"""tools/measure/clock.py: what is launched how often, in a graph where it can be, and whose seconds come back."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from measure import clock as clocks
from measure.clock import clock_of

from engine.backend import HostLane
from engine.cuda_lane import CudaLane
from engine.kernels.source import Kernel

SCALE = Kernel(str(Path(__file__).parents[1] / "stand_in.cu"), "scale")


@pytest.fixture
def lane(gpu):
    return CudaLane(0, None, ml_dtypes.bfloat16)


def launches_on(lane, n):
    """n launches y = 2 x, and their y."""
    with lane.running():
        x, ys = lane.to_device(np.arange(4, dtype=np.float32)), [lane.zeros((4,), np.float32) for _ in range(n)]
    return [lambda y=y: SCALE().launch((1,), (32,), (x, y, 4, 2.0)) for y in ys], ys


def test_a_host_calls_each_launch_in_order_and_times_the_whole_list(monkeypatch):
    called, now = [], [0.0]

    def launch(name, seconds):
        def run():
            called.append(name)
            now[0] += seconds
        return run
    monkeypatch.setattr(clocks.time, "perf_counter", lambda: now[0])
    clock = clock_of(HostLane("cpu", None, np.float32))
    assert clock.samples([launch("a", 1), launch("b", 2)], 4, warmups=2) == [3.0] * 4
    assert called == ["a", "b"] * 6
    assert clock.is_real and not clock_of(HostLane("emulated", None, np.float32)).is_real


def test_a_gpu_replays_a_graph_of_the_list(gpu, lane, monkeypatch):
    monkeypatch.setattr(clocks, "WARM_S", 0)
    launches, ys = launches_on(lane, 3)
    timed = clock_of(lane).timed(launches, warmups=2)
    assert timed.why_eager == "" and gpu.counts["launches"] == 6        # eagerly once, and once into the graph
    assert timed.samples(5) == [0.003] * 5                              # the stand-in takes 1 ms a launch
    assert gpu.counts["replays"] == 2 + 5 and gpu.counts["launches"] == 6
    for y in ys:
        np.testing.assert_array_equal(lane.to_host(y), [0, 2, 4, 6])


def test_a_gpu_is_kept_busy_until_its_clocks_are_up(gpu, lane, monkeypatch):
    monkeypatch.setattr(clocks, "WARM_S", 10)
    now = iter(range(100))
    monkeypatch.setattr(clocks.time, "perf_counter", lambda: next(now))     # a replay seems to take a second
    clock_of(lane).timed(launches_on(lane, 1)[0], warmups=2)
    assert gpu.counts["replays"] == 2 + 9                              # two in any case, then nine looks at the clock


def test_samples_of_two_may_alternate(lane):
    (one, _), (two, _) = launches_on(lane, 1), launches_on(lane, 2)
    a, b = (clock_of(lane).timed(launches) for launches in (one, two))
    assert [timed.samples(1) for timed in (a, b, a, b)] == [[0.001], [0.002]] * 2


def test_what_cannot_be_captured_runs_eagerly(gpu, lane):
    launches, _ = launches_on(lane, 2)

    def refused():
        if gpu.capturing:
            raise NotImplementedError("no cuBLAS while a stream is captured")
        launches[0]()
    timed = clock_of(lane).timed([refused, launches[1]])
    assert timed.why_eager == "NotImplementedError: no cuBLAS while a stream is captured"
    assert timed.samples(3) == [0.002] * 3
    assert gpu.counts["replays"] == 0 and gpu.capturing is None


def test_eager_launches_on_request(gpu, lane):
    timed = clock_of(lane).timed(launches_on(lane, 2)[0], graph=False)
    assert timed.samples(2) == [0.002] * 2 and gpu.counts["replays"] == 0 and timed.why_eager


def test_a_launch_that_fails_is_not_timed(lane):
    def fails():
        raise RuntimeError("no such kernel")
    with pytest.raises(RuntimeError, match="no such kernel"):
        clock_of(lane).samples([fails], 1)
