"""What the machine can do: the limits that every percentage is of.

On a GPU: reads, copies and writes of its memory, matrix products on random numbers (on zeros a GPU draws less power and
reads 13 % too fast), copies over the bus, and what a launch costs by itself. On a CPU: NumPy's copy, sums and products.
The limits are the fastest read-only stream and the fastest matrix product: on a GPU by their medians, on a CPU by their
best samples, for other work on its cores slows down most of the rest.
"""

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import numpy as np

from engine.backend import open_lane
from engine.kernels import ceilings as kernels
from engine.kernels import cublas
from engine.roofline import Ceilings
from measure.cases import whole
from measure.clock import clock_of
from measure.kernel.kernel_cases import KernelCase
from measure.kernel.kernel_inputs import Data
from measure.machine import machine
from measure.report import BenchError, Row, Stat

GPU_BYTES, CPU_BYTES = 8 << 30, 512 << 20       # far beyond any cache
MEMORY_SHARE = 0.6              # of a GPU's free memory, where that is less than GPU_BYTES
GPU_SIZE = 8192                                 # n of an n x n x n product
CPU_SIZES = 512, 1024, 2048     # other work on one core keeps all waiting, and hits long products for certain
PINNED_BYTES = 256 << 20
NODES = 1000                    # of the graph whose nodes' gap is measured


def add_arguments(parser):
    parser.add_argument("--bytes", type=whole(4096), metavar="N",
                        help=f"to stream (default: {GPU_BYTES >> 30} GiB on a GPU or {MEMORY_SHARE:.0%}% of what is "
                        f"free, {CPU_BYTES >> 20} MiB on a CPU)")
    parser.add_argument("--size", type=whole(1), metavar="N", help="of matrix products, N x N x N (default: "
                        f"{GPU_SIZE} on a GPU, {', '.join(map(str, CPU_SIZES))} in turns on a CPU)")


def run(args, report):
    """Every ceiling there is on the lane; 0."""
    lane = open_lane(args.lane, "auto")
    if lane.name == "emulated":
        raise BenchError("ceilings: the emulated lane has no clock; bench.py kernels --lane emulated counts traffic")
    (Gpu if lane.name == "cuda" else Cpu)(lane, args, report).measure()
    _found(report, lane)
    return 0


def ceilings_of(args, lane, report):
    """engine.cost.Ceilings as --bandwidth and --flops or --ceilings give them, else measured now, with their rows in
    the report; None on the emulated lane, unless they are given. They are in report.facts too."""
    if args.bandwidth is not None or args.ceilings is not None:
        from measure.floors import given_ceilings
        ceilings = given_ceilings(args)
        report.facts["ceilings"] = vars(ceilings).copy()
        return ceilings
    if lane.name == "emulated":
        return None
    report.tell("measuring the machine's ceilings")
    (Gpu if lane.name == "cuda" else Cpu)(lane, args, report).measure_limits()
    return _found(report, lane)


def _found(report, lane):
    """The Ceilings of the rows measured, put into report.facts."""
    def fastest(name):
        rates = [row.stats["rate"] for row in report.rows if row.section == "ceilings" and row.name.startswith(name)]
        return max((rate.median if lane.name == "cuda" else rate.best for rate in rates), default=None)
    bytes_per_s, flops_per_s = fastest("read"), fastest("matrix product")
    if bytes_per_s is None or flops_per_s is None:
        raise BenchError(f"ceilings: no {'read' if bytes_per_s is None else 'matrix product'} ran on {lane.name}: "
                         + report.why_skipped())
    report.facts["ceilings"] = {"bytes_per_s": bytes_per_s, "flops_per_s": flops_per_s, "source": "measured"}
    return Ceilings(bytes_per_s, flops_per_s, "measured")


class Machine:
    """What both lanes share: a row a measurement, and what cannot run is skipped with its reason."""

    n_bytes_default = size_default = None

    def __init__(self, lane, args, report):
        self.lane, self.report, self.clock, self.repeats = lane, report, clock_of(lane), args.repeats
        self.rng = np.random.default_rng(args.seed)
        self.n_bytes, self.size = getattr(args, "bytes", None), getattr(args, "size", None)

    @contextmanager
    def attempt(self, name):
        """A part that may fail without the others."""
        try:
            with self.lane.running():
                yield
        except Exception as error:
            self.report.skip(name, f"{type(error).__name__}: {error}")

    def add(self, name, shape, seconds, amount, unit, notes=()):
        """A row of `seconds`, each of which `amount` bytes or operations took."""
        self.report.add(Row("ceilings", name, shape, {
            "time": Stat("s", seconds, "lower"), "rate": Stat(unit, [amount / s for s in seconds], "higher")}, notes))

    def add_time(self, name, shape, seconds, notes=()):
        self.report.add(Row("ceilings", name, shape, {"time": Stat("s", seconds, "lower")}, notes))


class Gpu(Machine):
    """By CUDA events; what goes to the stream in one call is timed without a graph."""

    def seconds(self, launch, n=1):
        """Of one of `n` calls, `repeats` times."""
        return [s / n for s in self.clock.timed([launch] * n, graph=False).samples(self.repeats)]

    def measure(self):
        self.measure_limits(is_all=True)
        self.measure_bus()
        self.measure_launches()

    def measure_limits(self, is_all=False):
        """What _found() asks for, or with is_all everything that memory and tensor cores do."""
        with Data(self.lane, self.rng) as data:
            self._memory(data, is_all)
        self._products(is_all)

    def _memory(self, data, is_all):
        n_words = (self.n_bytes or min(GPU_BYTES, int(MEMORY_SHARE * self.lane.memory_bytes()))) // 32 * 8
        n_bytes, half = 4 * n_words, n_words // 2
        with self.attempt("memory"):
            x = data.words(n_words)
            for name, most in (("read, few blocks", kernels.N_BLOCKS), ("read, many blocks", n_words)):
                out = self.lane.empty((kernels.n_blocks(n_words, most),), np.uint32)
                self._check_sum(x[:min(n_words, 1 << 24)], out)
                launch = partial(kernels.read_sum, x, out)
                self.add(name, {"bytes": n_bytes}, self.seconds(launch), n_bytes, "bytes/s")
            if is_all:
                with self.attempt("copy, our kernel"):
                    launch = partial(kernels.copy, x[:half], x[half:])
                    self.add("copy, our kernel", {"bytes": n_bytes}, self.seconds(launch), n_bytes, "bytes/s",
                             ["read and written bytes"])
                with self.attempt("copy, the driver's"):
                    launch = partial(cublas.copy, x[half:], x[:half])
                    self.add("copy, the driver's", {"bytes": n_bytes}, self.seconds(launch), n_bytes, "bytes/s",
                             ["read and written bytes"])
                with self.attempt("write"):
                    launch = partial(x.data.memset_async, 1, n_bytes, self.lane.stream)
                    self.add("write, memset", {"bytes": n_bytes}, self.seconds(launch), n_bytes, "bytes/s")

    def _check_sum(self, x, out):
        kernels.read_sum(x, out)
        got, want = (self.lane.to_host(array).sum(dtype=np.uint32) for array in (out, x))
        if got != want:
            raise BenchError(f"ceilings: read_sum of {len(x)} words is {got}, expected {want}")

    def _products(self, is_all):
        n = self.size or GPU_SIZE
        shape, flops, calls = {"size": f"{n} x {n} x {n}"}, 2 * n**3, max(1, min(8, (8192 // n) ** 3))
        with self.attempt("matrix products"):
            product = KernelCase("linear", "", "", {"n_tokens": n, "n_in": n, "n_out": n}).prepare(self.lane, self.rng)
            x, weight, out, scratch = (product.sets[0][name] for name in ("x", "weight", "out", "scratch"))
            has_cublas = False
            with self.attempt("matrix product by cuBLAS"):
                launch = partial(cublas.linear, x, weight, out, scratch)
                self.add("matrix product, cuBLAS", shape, self.seconds(launch, calls), flops, "flop/s")
                has_cublas = True
            if is_all or not has_cublas:
                product.check()
                self.add("matrix product, our kernel", shape, self.seconds(product.launches[0], calls), flops, "flop/s")

    def measure_bus(self):
        """Copies between pinned host memory and the GPU."""
        n_bytes = min(PINNED_BYTES, self.n_bytes or PINNED_BYTES)
        with self.attempt("pinned copies"):
            pinned = self.lane.cupy.cuda.alloc_pinned_memory(n_bytes)
            there = self.lane.empty((n_bytes,), np.uint8)
            np.frombuffer(pinned, np.uint8, n_bytes)[...] = 1
            address, stream = pinned.ptr, self.lane.stream
            for name, copy in (("pinned to GPU", there.data.copy_from_host_async),
                               ("GPU to pinned", getattr(there.data, "copy_to_host_async", None))):
                with self.attempt(name):
                    self.add(name, {"bytes": n_bytes}, self.seconds(partial(copy, address, n_bytes, stream)), n_bytes,
                             "bytes/s")

    def measure_launches(self):
        """An empty kernel, often: in a graph, eagerly, and how long the host takes to start it."""
        with self.attempt("launches"):
            x = self.lane.zeros((4,), np.uint32)
            launch = partial(kernels.nothing, x)
            one, many = (self.clock.timed([launch] * n) for n in (1, NODES))
            if many.why_eager:
                self.report.skip("gap between nodes of a graph", many.why_eager)
            else:
                self.add_time("gap between nodes of a graph", {"nodes": NODES},
                              [(b - a) / (NODES - 1) for a, b in zip(one.samples(self.repeats),
                                                                    many.samples(self.repeats), strict=True)])
            self.add_time("gap between eager launches", {"nodes": NODES}, self.seconds(launch, NODES))
            self.add_time("host time of a launch", {"nodes": NODES}, self._host_seconds(launch, NODES))

    def _host_seconds(self, launch, n):
        """Of the call alone, `repeats` times: the GPU is far behind, and not waited for until the end."""
        seconds = []
        for _ in range(self.repeats):
            self.lane.stream.synchronize()
            began = time.perf_counter()
            for _ in range(n):
                launch()
            seconds.append((time.perf_counter() - began) / n)
        return seconds


def side_by_side(pool, x, n_cores):
    """The sum of x, a part on each core; returns the parts' sums."""
    return list(pool.map(np.add.reduce, np.array_split(x, n_cores)))


class Cpu(Machine):
    """NumPy in float32."""

    def seconds(self, launch):
        return self.clock.samples([launch], self.repeats)

    def measure(self):
        self.measure_limits(is_all=True)

    def measure_limits(self, is_all=False):
        n = (self.n_bytes or CPU_BYTES) // 4096 * 1024
        x, shape = self.rng.standard_normal(n, np.float32), {"bytes": 4 * n}
        if is_all:
            with self.attempt("copy"):
                out = np.empty_like(x[:n // 2])
                self.add("copy", shape, self.seconds(partial(np.copyto, out, x[n // 2:])), 4 * n, "bytes/s",
                         ["read and written bytes"])
        n_cores = machine()["cores"]
        with self.attempt("read, sum"), ThreadPoolExecutor(n_cores) as pool:
            self.add("read, sum", shape, self.seconds(partial(side_by_side, pool, x, n_cores)), 4 * n, "bytes/s")
        with self.attempt("read, GEMV"):
            matrix, vector, out = x.reshape(-1, 1024), x[:1024].copy(), np.empty(n // 1024, np.float32)
            self.add("read, GEMV", shape, self.seconds(partial(np.matmul, matrix, vector, out=out)), 4 * n, "bytes/s")
        with self.attempt("matrix product"):
            sizes = [self.size] if self.size else CPU_SIZES
            products, seconds = [self._product(size) for size in sizes], [[] for _ in sizes]
            for _ in range(self.repeats):
                for timed, found in zip(products, seconds, strict=True):
                    found += timed.samples(1)
            for size, found in zip(sizes, seconds, strict=True):
                self.add("matrix product, SGEMM", {"size": f"{size} x {size} x {size}"}, found, 2 * size**3, "flop/s")

    def _product(self, size):
        a, b = self.rng.standard_normal((2, size, size), np.float32)
        return self.clock.timed([partial(np.matmul, a, b, out=np.empty((size, size), np.float32))])
