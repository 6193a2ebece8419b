"""Random inputs for one op, on a lane, and how far from its twin an output may be."""

from contextlib import ExitStack
from dataclasses import dataclass, fields
from math import prod

import numpy as np

from engine import reference
from engine.workspace import Scratch

EPS, WEIGHT_OFFSET = 1e-6, 1.0
WEIGHT_SCALE = 0.02             # of a model's weights, about; activations are N(0, 1)
POOL = 4194301                  # random numbers that large arrays repeat; prime, so that no two rows are the same
FEW = 1 << 20                   # values of an array that gets numbers of its own
# Of a row, ||got - want|| / ||want||. One rounding to bfloat16 changes no value by more than 2^-9 of itself; twice that
# is allowed. Attention rounds P and the result. Float32 values: a few roundings of 2^-24, and the error of tanh or cos.
# A sum of 20000 products in float32, on tensor cores that cut off what they add 16 at a time: 1250 times 2^-24.
ONE_ROUNDING, TWO_ROUNDINGS, FLOAT32, FLOAT32_SUM, EXACT = 2.0**-8, 2.0**-7, 2e-6, 1e-4, 0.0
PAGE_SIZE = 16                  # of the KV cache, as EngineConfig has it
POISON = 0xFF                   # NaN in every float type
MOST_READ = 256 << 20           # bytes of an output that are looked through for values nobody wrote


class Data:
    """Random arrays on a lane, in a context; `with Data(lane, rng) as data` keeps what several cases can share."""

    def __init__(self, lane, rng):
        self.lane, self.rng = lane, rng
        self._pools, self._open = {}, ExitStack()
        self._fill = None

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self._open.close()
        self._fill = None

    def normal(self, shape, scale=1.0, dtype=None):
        """N(0, scale^2), in the lane's dtype unless one is given."""
        dtype = self.lane.dtype if dtype is None else np.dtype(dtype)
        if prod(shape) <= FEW:
            return self.lane.to_device((scale * self.rng.standard_normal(shape, np.float32)).astype(dtype))
        if (scale, dtype) not in self._pools:
            self._pools[scale, dtype] = (scale * self.rng.standard_normal(POOL, np.float32)).astype(dtype)
        return self._filled(shape, self._pools[scale, dtype])

    def words(self, n):
        """[n] uint32, each as likely as any."""
        if np.uint32 not in self._pools:
            self._pools[np.uint32] = self.rng.integers(0, 2**32, POOL, np.uint32)
        return self._filled((n,), self._pools[np.uint32])

    def _filled(self, shape, pool):
        """An array of what is in `pool`, from some place on, again and again."""
        array, first = self.lane.empty(shape, pool.dtype), int(self.rng.integers(POOL))
        if self._fill is None:
            self._fill = self._open.enter_context(self.lane.loading())

        def read(begin, end, out):
            out, at = out.reshape(-1), (first + begin) % POOL
            done = 0
            while done < end - begin:
                n = min(POOL - at, end - begin - done)
                out[done:done + n] = pool[at:at + n]
                done, at = done + n, 0
        self._fill(array, read)
        return array

    def empty(self, shape, dtype=None):
        return self.lane.empty(shape, dtype)

    def put(self, array, dtype=np.int32):
        return self.lane.to_device(np.ascontiguousarray(array, dtype))

    def columns(self, of):
        """A dataclass of host arrays as one of arrays on the lane."""
        return type(of)(*(self.lane.to_device(getattr(of, field.name)) for field in fields(of)))

    def scratch(self, *sizes):
        """A Scratch as large as the largest of (n_floats, n_counters); None for ops that use none."""
        if self.lane.ops is reference:
            return None
        n_floats, n_counters = map(max, zip(*sizes, strict=True))
        return Scratch(self.lane.empty((n_floats,), np.float32), self.lane.zeros((n_counters,), np.int32))


@dataclass(frozen=True)
class Comparison:
    """Rows of what an op wrote and of what it should have; limit as ONE_ROUNDING is explained, EXACT is bit for bit."""

    name: str
    got: np.ndarray
    want: np.ndarray
    limit: float

    @property
    def error(self):
        """Of the worst row; NaN where a value is."""
        got, want = (np.asarray(a).reshape(len(a), -1) for a in (self.got, self.want))
        if self.limit == EXACT:
            return float(np.mean(got.view(f"V{got.itemsize}") != want.view(f"V{want.itemsize}"), axis=1).max(initial=0))
        got, want = got.astype(np.float64), want.astype(np.float64)
        size = np.maximum(np.linalg.norm(want, axis=1), np.finfo(np.float32).tiny)
        return float((np.linalg.norm(got - want, axis=1) / size).max(initial=0))

    @property
    def is_good(self):
        return self.error <= self.limit                     # NaN is not


def spread(n, most):
    """Up to `most` numbers of 0..n - 1, the first and the last among them."""
    return np.unique(np.linspace(0, n - 1, min(n, most)).round().astype(int)).tolist()


def poison(lane, array):
    """Fills an output with what no op writes."""
    if lane.name == "cuda":
        array.data.memset_async(POISON, array.nbytes, lane.stream)
    else:
        array.reshape(-1).view(np.uint8)[...] = POISON


def n_unwritten(lane, array):
    """Values of an output that are still poison."""
    if array.nbytes > MOST_READ:
        return 0
    words = lane.to_host(array).reshape(-1)
    words = words.view(f"u{words.itemsize}")
    return int(np.count_nonzero(words == np.iinfo(words.dtype).max))


def rows_of(lane, array, rows):
    """Host copies of some rows."""
    return np.stack([lane.to_host(array[i:i + 1])[0] for i in rows])


def f64(array):
    return np.asarray(array).astype(np.float64)


class Op:
    """One op of the table. `outputs` are the arrays it writes without reading them."""

    outputs = ("out",)
    words = "{hidden}"                  # the sizes besides n_tokens, as a table has them

    def make(self, data, s, first=None):
        """{name: array} of one set at sizes s; `first` is the set before, whose shared arrays are taken again."""
        raise NotImplementedError

    def call(self, a, s):
        """(args, kwargs) of the op for a set."""
        raise NotImplementedError

    def counted(self, a, s):
        """The same for engine.cost, which reads lengths on the host."""
        return self.call(a, s)

    def compare(self, lane, a, s, run):
        """[Comparison] after run(), which runs the op once."""
        raise NotImplementedError
