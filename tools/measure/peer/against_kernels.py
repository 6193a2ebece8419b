"""Kernels side by side: an op of ours and peers that do the same, on the same arrays, in turns."""

import numpy as np

from engine.errors import KernelError, MemoryPlanError, ShapeError
from measure.clock import clock_of
from measure.kernel.kernel_inputs import Data
from measure.peer.torch_arrays import captured, forget_compiled, is_loaded, torch_running, why
from measure.peer.turns import compared, rest_and_wake, take_turns
from measure.report import BenchError, Row, Stat
from measure.sm_clock import side_clocks

SAMPLE_S = 1e-3             # a sample on a GPU is about so long: the few us that a graph's launch takes do not show
BYTES_PER_S, FLOP_PER_S = 3e12, 7e14        # about an H100's, to guess how many launches that is
LEAST_S = 2e-6              # no kernel is shorter
EAGERLY = "ours_eagerly"


def n_passes(prepared):
    """How often each set is launched in one sample."""
    if prepared.lane.name != "cuda":
        return 1
    cost = prepared.cost
    guess = max(LEAST_S, cost.bytes / BYTES_PER_S, cost.flops / FLOP_PER_S)
    return max(1, round(SAMPLE_S / (guess * len(prepared.sets))))


class TheirLaunches:
    """A peer's launches, timed as a clock times ours, within torch's own context. why_eager as theirs."""

    def __init__(self, clock, launches):
        def run():
            for launch in launches:
                launch()
        self._lane = clock.lane
        with torch_running(self._lane):
            replay, self.why_eager = captured(run, self._lane)
            # The graph is torch's: to the clock it is one launch like any other.
            self._timed = clock.timed([replay], graph=False) if self._lane.name == "cuda" else clock.timed([replay])

    def samples(self, n):
        with torch_running(self._lane):
            return self._timed.samples(n)


def eager_notes(sides):
    return tuple(f"{name} runs eagerly: {side.why_eager}" for name, side in sides.items()
                 if side.why_eager and name != EAGERLY)


def measure_peer(prepared, peer, clock, repeats):
    """(Row of one case against one peer, whether the outputs agree). What disagrees is not timed."""
    case = prepared.case
    with torch_running(prepared.lane):
        launches = peer.prepare(prepared)
        error, bound = peer.compare(prepared, launches[0])

    def row(stats, notes=()):
        return Row("against", case.name, {**case.shape, "peer": str(peer)}, stats, notes)
    stats = {"error": Stat("x", error, "lower")} if np.isfinite(error) else {}
    if not error <= bound:                                      # NaN is not
        return row(stats, f"not timed: a row is off ours by {error:.2g} of its length, expected {bound:.2g}"), False
    if not clock.is_real:
        return row(stats, "emulated: compared, not timed"), True
    times = n_passes(prepared)
    n_launches = times * len(launches)
    sides = timed_sides(clock, prepared.launches * times, launches * times)
    clocks = side_clocks(prepared.lane)
    samples = take_turns(sides, repeats, None, None if prepared.lane.name == "cuda" else rest_and_wake, clocks)
    per_launch = {side: [seconds / n_launches for seconds in found] for side, found in samples.items()}
    if EAGERLY in sides:
        stats[EAGERLY] = Stat("s", per_launch[EAGERLY], "lower")
    cold = () if prepared.is_cold else ("caches warm",)
    notes = (*peer.notes(case), *cold, *eager_notes(sides), *clocks.notes())
    return row({**compared(per_launch["ours"], per_launch["theirs"]), **stats}, notes), True


def timed_sides(clock, ours, theirs):
    """{side: what has samples(n)}. Beside a peer that cannot be a CUDA graph, ours is timed without one too."""
    sides = {"ours": clock.timed(ours), "theirs": TheirLaunches(clock, theirs)}
    if sides["theirs"].why_eager:
        sides[EAGERLY] = clock.timed(ours, graph=False)
    return sides


def measure_kernels(cases, peers, lane, args, report):
    """Every case against every peer of its op; returns whether ours was right and all outputs agreed."""
    clock, is_good = clock_of(lane), True
    cases = [case for case in cases if any(peer.op == case.op for peer in peers)]
    with Data(lane, np.random.default_rng(args.seed)) as data:
        for case in report.bar(cases, "kernels"):
            is_good &= measure_case(case, [peer for peer in peers if peer.op == case.op], data, clock, args, report)
    return is_good


def measure_case(case, peers, data, clock, args, report):
    served = []
    for peer in peers:
        reason = peer.refuses(case)
        if reason is None:
            served.append(peer)
        elif reason not in SILENT:
            report.skip(f"{case}: {peer}", reason)
    if not served:
        return True
    is_good = True
    try:
        prepared = case.prepare(data.lane, data.rng, args.sets, data)
        prepared.check()
    except MemoryPlanError as error:
        report.skip(str(case), error)
        return True
    except (BenchError, KernelError, ShapeError) as error:
        report.skip(str(case), f"ours is wrong: {error}")
        return False
    for peer in served:
        try:
            row, agrees = measure_peer(prepared, peer, clock, args.repeats)
        except Exception as error:                              # a peer's failure is the peer's: the others go on
            report.skip(f"{case}: {peer}", why(error))
            continue
        finally:
            if is_loaded():
                forget_compiled()
        report.add(row)
        is_good &= agrees
    return is_good


SILENT = {"it draws", "it draws from the top k only"}           # another peer is there for such a case

