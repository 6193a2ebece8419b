"""How long launches take: by CUDA events around replays of a graph of them, by the host's clock on lanes without a GPU.

    clock = clock_of(lane)
    seconds = clock.samples([lambda: lane.ops.embed(...), ...], repeats=30)

Two things are compared fairly when their turns alternate: a, b = clock.timed(launches), clock.timed(others), then
a.samples(1), b.samples(1), and so on.
"""

import time
from itertools import pairwise

WARMUPS = 3             # replays before the first that counts: clocks rise, caches and the allocator settle
WARM_S = 0.02           # for so long at least, on a GPU: what the host did meanwhile let its clocks fall


def clock_of(lane):
    """The Clock of a lane."""
    return CudaClock(lane) if lane.name == "cuda" else HostClock(lane)


class Clock:
    """is_real   False on the emulated lane: what it takes says nothing of a GPU, so it is not reported"""

    def __init__(self, lane):
        self.lane = lane

    def samples(self, launches, repeats, warmups=WARMUPS):
        """`repeats` times in seconds, each of calling every one of `launches` once, in order.

        launches  functions that take nothing; on cuda they put work on the lane's stream and nothing else: no copy from
                  the host, no allocation (else they run eagerly: see Timed.why_eager)
        """
        return self.timed(launches, warmups).samples(repeats)


class HostClock(Clock):
    """time.perf_counter around the calls."""

    @property
    def is_real(self):
        return self.lane.name != "emulated"

    def timed(self, launches, warmups=WARMUPS):
        """The launches, warm, as something that has samples(repeats)."""
        return TimedCalls(launches, warmups)


class TimedCalls:
    """Launches on the host. why_eager: what kept them out of a graph; here nothing did, there is none."""

    why_eager = ""

    def __init__(self, launches, warmups):
        self._launches = list(launches)
        for _ in range(warmups):
            self._run()

    def _run(self):
        for launch in self._launches:
            launch()

    def samples(self, repeats):
        """Seconds of calling each launch once, `repeats` times."""
        seconds = []
        for _ in range(repeats):
            began = time.perf_counter()
            self._run()
            seconds.append(time.perf_counter() - began)
        return seconds


class CudaClock(Clock):
    """CUDA events on the lane's stream, around replays of a CUDA graph of all launches, or, where they cannot be
    captured, around the launches themselves. A replay takes some us to start: of short kernels the list should be long.
    """

    is_real = True

    def timed(self, launches, warmups=WARMUPS, graph=True):
        """The launches, captured and warm; graph=False leaves them eager, as a program without graphs has them."""
        return TimedStream(self.lane, launches, warmups, graph)


class TimedStream:
    """Launches on a GPU's stream. why_eager: "" where they are a graph, else why they are not."""

    def __init__(self, lane, launches, warmups, graph):
        self._lane, self._launches, self._graph = lane, list(launches), None
        self.why_eager = "" if graph else "asked to be"
        with lane.running():
            self._run()                     # kernels compile and modules load before the capture
            if graph:
                try:
                    self._graph = lane.capture(self._run_eagerly)
                except Exception as error:  # whatever it is, eagerly it may run; if not, that raises
                    self.why_eager = f"{type(error).__name__}: {error}"
            began, n = time.perf_counter(), 0
            while n < warmups or time.perf_counter() - began < WARM_S:
                self._run()
                lane.stream.synchronize()
                n += 1

    def _run_eagerly(self):
        for launch in self._launches:
            launch()

    def _run(self):
        if self._graph is None:
            self._run_eagerly()
        else:
            self._graph.launch(self._lane.stream)

    def samples(self, repeats):
        """Seconds of running each launch once, `repeats` times, back to back. Waits for the last."""
        cuda, stream = self._lane.cupy.cuda, self._lane.stream
        with self._lane.running():
            events = [cuda.Event() for _ in range(repeats + 1)]
            events[0].record(stream)
            for event in events[1:]:
                self._run()
                event.record(stream)
            events[-1].synchronize()
            return [cuda.get_elapsed_time(a, b) / 1e3 for a, b in pairwise(events)]
