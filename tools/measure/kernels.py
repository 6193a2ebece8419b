"""Each kernel at the shapes of released models: how long it takes, and how far that is from the machine's limit.

    bench.py kernels --preset gemma-4-31b --op linear,attention --n-tokens 1,16,64,8192 --context 1024,32768

Inputs are random, outputs are compared with their twin before anything is timed, and sets of inputs take turns so that
a launch finds nothing of its own in a cache ("warm" says where the sets are too small for that). The time is that of
one launch among many in a CUDA graph, with the gap to the next. bytes and flops are what any implementation must move
and compute; percent_of_roof is the time they take at the ceilings, over the measured time.

With --lane emulated nothing is timed: what kernels move is counted, see tools/measure/kernel/traffic.py.
"""

import numpy as np

from engine.backend import open_lane
from engine.errors import KernelError, MemoryPlanError, ShapeError
from measure.cases import int_list, whole
from measure.ceilings import ceilings_of
from measure.clock import clock_of
from measure.kernel.goals import goal_of
from measure.kernel.kernel_cases import OPS, cases_of, some
from measure.kernel.kernel_inputs import Data
from measure.report import BenchError, Row, Stat

GPU = {"preset": ["gemma-3-1b", "gemma-4-31b"], "n_tokens": [1, 16, 64, 8192], "context": [1024, 32768],
       "batch": [1, 8, 64]}
CPU = {"preset": ["gemma-3-270m"], "n_tokens": [1, 128], "context": [1024], "batch": [1, 8]}
SAMPLE_S, LAUNCH_S = 1e-3, 2e-6         # a sample is to take so long; a launch does at least
MOST_LAUNCHES = 1024                    # of a sample


def add_arguments(parser):
    parser.add_argument("--op", type=ops, metavar="A,B", help="ops to measure (default: all): " + ", ".join(OPS))
    for name, what in (("n-tokens", "tokens of a step, and lengths of prompts"),
                       ("context", "positions that decoding attention sees"),
                       ("batch", "sequences of a decode step, and rows of logits")):
        key = name.replace("-", "_")
        parser.add_argument(f"--{name}", type=int_list, metavar="LIST",
                            help=f"{what} (default: {_list(GPU[key])}, on a CPU {_list(CPU[key])})")
    parser.add_argument("--sets", type=whole(1), metavar="N", help="sets of inputs that take turns "
                        "(default: at least 3 and 180 MB in all, at most 64)")


def _list(numbers):
    return ",".join(map(str, numbers))


def ops(text):
    """An argparse type: names of the op table."""
    names = text.split(",")
    for name in names:
        if name not in OPS:
            raise BenchError(f"no op {name!r}, expected some of {','.join(OPS)}")
    return names


def run(args, report):
    """A row a case. 1 where an output is not its twin's, or on the emulated lane where a count is above its bound."""
    lane = open_lane(args.lane, "auto")
    if lane.name == "emulated":
        from measure.kernel import traffic
        return traffic.run(args, report, lane)
    default = GPU if lane.name == "cuda" else CPU
    cases = some(cases_of(args.preset or default["preset"], args.n_tokens or default["n_tokens"],
                          args.context or default["context"], args.batch or default["batch"], args.op), args.op)
    ceilings = ceilings_of(args, lane, report)
    status = 0
    with Data(lane, np.random.default_rng(args.seed)) as data:
        for case in report.bar(cases, "kernels"):
            try:
                report.add(measured(case, lane, data, ceilings, args))
            except MemoryPlanError as error:
                report.skip(case, error)
            except (BenchError, KernelError, ShapeError) as error:
                report.tell(error)
                report.add(Row("kernels", case.name, case.shape, {}, [f"not timed: {error}"]))
                status = 1
            except Exception as error:      # after a fault on the GPU nothing runs in this process: say whose it was
                report.skip(case, f"{type(error).__name__}: {error}")
                raise
    return status


def measured(case, lane, data, ceilings, args):
    """The Row of one case, checked and timed. Raises BenchError where the output is not its twin's."""
    prepared = case.prepare(lane, data.rng, args.sets, data)
    prepared.check()
    floor_s, n_sets = prepared.cost.time_s(ceilings), len(prepared.sets)
    n_turns = 1
    if lane.name == "cuda":                             # on a host a call is timed well by itself
        n_turns = min(int(SAMPLE_S / (n_sets * max(floor_s, LAUNCH_S))) + 1, max(1, MOST_LAUNCHES // n_sets))
    timed = clock_of(lane).timed(prepared.launches * n_turns)
    seconds = [s / (n_turns * n_sets) for s in timed.samples(args.repeats)]
    notes = [f"eager: {timed.why_eager}"] if timed.why_eager else []
    if not prepared.is_cold:
        notes.append("warm: all sets together fit a cache")
    goal = goal_of(case, ceilings) if lane.name == "cuda" else None
    return Row("kernels", case.name, case.shape, stats_of(prepared.cost, seconds, ceilings), notes, goal)


def stats_of(cost, seconds, ceilings):
    """The figures of a launch that costs `cost` and took `seconds`."""
    floor_s = cost.time_s(ceilings)
    stats = {"time": Stat("s", seconds, "lower"),
             "percent_of_roof": Stat("%", [100 * floor_s / s for s in seconds], "higher"),
             "bytes_per_s": Stat("bytes/s", [cost.bytes / s for s in seconds], "higher")}
    if cost.flops:
        stats["flops_per_s"] = Stat("flop/s", [cost.flops / s for s in seconds], "higher")
    return {**stats, "bytes": Stat("bytes", cost.bytes), "flops": Stat("flop", cost.flops)}
