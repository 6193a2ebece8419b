"""engine/graph.py: eager first, captured second, replayed from then on; a replay computes what an eager step does."""

from pathlib import Path

import numpy as np
import pytest

from engine.backend import HostLane
from engine.cuda_lane import CudaLane
from engine.errors import KernelError
from engine.graph import GraphCache, bucket_sizes
from engine.kernels.source import Kernel

ACCUMULATE = Kernel(str(Path(__file__).with_name("stand_in.cu")), "accumulate")
N = 40


@pytest.fixture
def lane(gpu):
    lane = CudaLane(0, None, np.float32)
    with lane.running():
        yield lane


class Engine:
    """What an engine is to a graph: inputs in a step buffer, kernels between arrays at fixed addresses."""

    def __init__(self, lane):
        self.lane = lane
        self.inputs = lane.step_buffer(4 * (N + 1))
        self.host = self.inputs.host.view(np.float32)           # x, then the factor
        self.device = self.inputs.device.view(np.float32)
        self.y = lane.zeros((N,), np.float32)
        self.n_launches = 0

    def launch(self):
        self.n_launches += 1
        for _ in range(2):
            ACCUMULATE().launch((2,), (32,), (self.device[:N], self.device[N:], self.y, N))

    def step(self, run, x, factor):
        """The sums after one more step."""
        self.host[:N], self.host[N] = x, factor
        self.inputs.send(self.inputs.host.size)
        run(self.launch)
        return self.lane.to_host(self.y)


def steps(seed, n=6):
    rng = np.random.default_rng(seed)
    return [(rng.standard_normal(N, np.float32), rng.standard_normal()) for _ in range(n)]


@pytest.mark.parametrize(("max_seqs", "sizes"), [
    (1, (1,)), (2, (1, 2)), (3, (1, 2, 3)), (4, (1, 2, 4)), (7, (1, 2, 4, 7)), (8, (1, 2, 4, 8)), (9, (1, 2, 4, 8, 9)),
    (20, (1, 2, 4, 8, 16, 20)), (64, (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64))])
def test_bucket_sizes(max_seqs, sizes):
    assert bucket_sizes(max_seqs) == sizes
    cache = GraphCache(None, max_seqs)
    assert [cache.bucket(n) for n in range(1, max_seqs + 1)] == [
        min(size for size in sizes if size >= n) for n in range(1, max_seqs + 1)]


@pytest.mark.parametrize(("most", "buckets"), [(0, [0]), (1, [0, 1]), (3, [0, 1, 2, 3]), (4, [0, 1, 2, 4, 4]),
                                               (6, [0, 1, 2, 4, 4, 6, 6])])
def test_buckets_of_drafts(most, buckets):
    cache = GraphCache(None, 8, most_drafts=most)
    assert [cache.draft_bucket(n) for n in range(most + 1)] == buckets


def test_eager_then_captured_then_replayed(gpu, lane):
    engine, cache = Engine(lane), GraphCache(lane, 8)
    for i, (x, factor) in enumerate(steps(0)):
        before = gpu.counts.copy()
        engine.step(lambda launch: cache.run(2, launch), x, factor)
        assert engine.n_launches == min(i + 1, 2)
        assert gpu.counts["replays"] == max(0, i)
        assert gpu.counts["launches"] - before["launches"] == (2 if i < 2 else 0)
    assert str(cache) == "CUDA graphs: 2 of 1, 2, 4, 8 sequences captured" and not cache.failures


def test_a_replay_after_every_input_changed_equals_the_eager_step(lane):
    """Bit for bit, at every step: nothing that differs between steps is in the graph."""
    eager, graphed, cache = Engine(lane), Engine(lane), GraphCache(lane, 8)
    for x, factor in steps(1):
        np.testing.assert_array_equal(graphed.step(lambda launch: cache.run(1, launch), x, factor),
                                      eager.step(lambda launch: launch(), x, factor))


def test_a_replayed_step_allocates_nothing_copies_once_and_reads_back_once(gpu, lane):
    engine, cache = Engine(lane), GraphCache(lane, 8)
    before = None
    for x, factor in steps(2, 5):
        if engine.n_launches == 2:
            before = before or gpu.counts.copy()
        engine.step(lambda launch: cache.run(1, launch), x, factor)
    assert gpu.counts - before == {"copies in": 3, "copies out": 3, "replays": 3, "waits": 3}


def test_buckets_do_not_mix(lane):
    """Each has a graph of its own; keys may be anything that tells them apart."""
    one, two, cache = Engine(lane), Engine(lane), GraphCache(lane, 8)
    for x, factor in steps(3, 4):
        for key, engine in ((1, one), ((1, "edited"), two)):
            engine.step(lambda launch, key=key: cache.run(key, launch), x, factor)
    assert (one.n_launches, two.n_launches) == (2, 2)
    np.testing.assert_array_equal(lane.to_host(one.y), lane.to_host(two.y))


def test_a_step_that_cannot_be_captured_runs_eagerly_and_says_why(gpu, lane):
    engine, expected, cache = Engine(lane), Engine(lane), GraphCache(lane, 2)

    def allocating():
        lane.empty((4,))
        return engine.launch()
    for x, factor in steps(4, 4):
        np.testing.assert_array_equal(engine.step(lambda launch: cache.run(2, allocating), x, factor),
                                      expected.step(lambda launch: launch(), x, factor))
    assert cache.failures == {2: "Fault: an allocation while a stream is captured"}
    assert str(cache) == "CUDA graphs: none yet of 1, 2 sequences captured; 2 runs eagerly (" + cache.failures[2] + ")"
    assert gpu.faults == ["an allocation while a stream is captured"]       # tried once
    gpu.faults.clear()
    for x, factor in steps(5, 3):                                           # and the stream can still be captured
        engine.step(lambda launch: cache.run(1, launch), x, factor)
    assert list(cache.failures) == [2] and gpu.counts["replays"] == 2


@pytest.mark.parametrize("error", [KernelError("no"), KeyboardInterrupt()])
def test_an_error_in_the_middle_of_a_capture_leaves_the_stream_usable(gpu, lane, error):
    engine, cache = Engine(lane), GraphCache(lane, 2)
    cache.run(1, engine.launch)

    def failing():
        engine.launch()
        if gpu.capturing:
            raise error
    if isinstance(error, Exception):
        cache.run(1, failing)
        assert cache.failures == {1: "KernelError: no"}
    else:
        with pytest.raises(KeyboardInterrupt):
            cache.run(1, failing)
        assert not cache.failures
    assert gpu.capturing is None
    assert lane.to_host(engine.y).shape == (N,)


def test_a_first_step_that_fails_is_not_taken_for_a_warm_one(lane):
    engine, cache = Engine(lane), GraphCache(lane, 2)

    def failing():
        raise KernelError("does not compile")
    with pytest.raises(KernelError):
        cache.run(1, failing)
    cache.run(1, engine.launch)
    assert str(cache) == "CUDA graphs: none yet of 1, 2 sequences captured"


def test_a_host_scalar_that_varies_is_baked_into_the_graph(lane):
    """The fault that the comparison above is there to find, planted: the stand-in shows it as wrong values."""
    engine, expected, cache = Engine(lane), Engine(lane), GraphCache(lane, 2)
    for i, (x, factor) in enumerate(steps(6, 4)):
        def launch(engine=engine, n=N - i):
            ACCUMULATE().launch((2,), (32,), (engine.device[:N], engine.device[N:], engine.y, n))
        got = engine.step(lambda _, launch=launch: cache.run(1, launch), x, factor)
        want = expected.step(lambda _, n=N - i: launch(expected, n), x, factor)
        assert np.array_equal(got, want) == (i < 2)


def test_off():
    cache, ran = GraphCache(HostLane("cpu", None, np.float32), 8, enabled=False), []
    for n in range(4):
        cache.run(1, lambda n=n: ran.append(n))
    assert ran == [0, 1, 2, 3]
    assert str(cache) == "CUDA graphs: off"
