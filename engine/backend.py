"""The lane an engine runs on: where arrays live, their dtype, and the table of ops."""

import mmap
from contextlib import contextmanager, nullcontext
from math import prod

import ml_dtypes
import numpy as np

from engine import reference
from engine.errors import ConfigError

DTYPES = {"cpu": np.dtype(np.float32), "emulated": np.dtype(ml_dtypes.bfloat16), "cuda": np.dtype(ml_dtypes.bfloat16)}
MAPPED_BYTES = 1 << 22      # from this size on NumPy asks for huge pages


class HostLane:
    """A lane whose arrays are NumPy arrays: `cpu`, with the op table of engine/reference.py in float32, and `emulated`,
    with the GPU's kernels and launchers in bfloat16.

    name               cuda | emulated | cpu
    ops                module with the op table
    dtype              of weights, activations and the KV cache
    folds_norm_offset  RMSNorm weights are stored with their offset added (exact in float32 only)
    has_graphs         what a step launches can be captured and replayed
    stages             ops read a step's inputs from one packed buffer (engine/step_inputs.py), as on a GPU
    """

    def __init__(self, name, ops, dtype):
        self.name, self.ops, self.dtype = name, ops, np.dtype(dtype)
        self.folds_norm_offset = self.dtype == np.float32
        self.stages = name != "cpu"
        self.has_graphs = False

    def empty(self, shape, dtype=None):
        """An array with no meaning yet; its memory is not touched until it is written.

        NumPy asks for huge pages for large arrays, and the kernel may stop to make each of them: beside other programs,
        loading 1 GB took 0.4 to 1.0 s that way and 0.3 s on plain pages, which decode 3 % slower. So large ones are
        mapped here.
        """
        dtype = self.dtype if dtype is None else np.dtype(dtype)
        n_bytes = prod(shape) * dtype.itemsize
        if n_bytes < MAPPED_BYTES or not hasattr(mmap, "MAP_PRIVATE"):
            return np.empty(shape, dtype)
        memory = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return np.frombuffer(memory, dtype).reshape(shape)

    def zeros(self, shape, dtype=None):
        return np.zeros(shape, self.dtype if dtype is None else dtype)

    def clear(self, array):
        """Sets every byte to zero."""
        array[...] = 0

    def to_device(self, array):
        """A host array where the lane reads it, here the array itself; at set-up, not in a step."""
        return np.ascontiguousarray(array)

    def to_host(self, array):
        """A NumPy array with the values; waits for what computes them. It may be the array itself."""
        return array

    def memory_bytes(self):
        """What there is to plan with, or None for this host's memory."""

    def step_buffer(self, n_bytes):
        """Memory through which a step's inputs reach the lane."""
        return HostStepBuffer(n_bytes)

    @contextmanager
    def loading(self):
        """Yields fill(array, read): read(begin, end, out) writes elements begin..end of the flat array to `out`."""
        yield lambda array, read: read(0, array.size, array.reshape(-1))

    def running(self):
        """The context in which ops are called and lane memory is taken."""
        return nullcontext()


class HostStepBuffer:
    """`host` [n_bytes] uint8 is written, then sent; ops read `device`, which on a host lane is the same memory."""

    def __init__(self, n_bytes):
        self.host = self.device = np.zeros(n_bytes, np.uint8)

    def send(self, n_bytes):
        """Starts the copy of the first n_bytes: there is none."""


def lane_of(device, dtype):
    """Name of the lane that the LLM arguments `device` and `dtype` ask for. Raises ConfigError."""
    kind, colon, index = device.partition(":") if isinstance(device, str) else ("", "", "")
    if kind not in ("auto", *DTYPES) or (colon and (kind != "cuda" or not index.isdecimal())):
        raise ConfigError(f"device is {device!r}, expected auto, cuda, cuda:N, cpu or emulated")
    if dtype not in ("auto", "bfloat16", "float32"):
        raise ConfigError(f"dtype is {dtype!r}, expected auto, bfloat16 or float32")
    if kind == "auto":
        from engine.cuda_lane import gpu_is_present
        kind = "cuda" if dtype != "float32" and gpu_is_present() else "cpu"
    if dtype not in ("auto", DTYPES[kind].name):
        raise ConfigError(f"dtype {dtype!r} on device {device!r}: the cpu lane computes in float32, cuda and emulated "
                          "in bfloat16")
    return kind


def ops_of(kind, gemm="own"):
    """The op table of a lane; `gemm` is the LLM argument."""
    if kind == "cpu":
        return reference
    from engine.kernels import ops  # not needed to import the engine
    return ops.with_cublas() if kind == "cuda" and gemm == "cublas" else ops


def open_lane(device, dtype, gemm="own"):
    """The lane for the LLM arguments of these names. Raises ConfigError for what cannot run here."""
    kind = lane_of(device, dtype)
    if kind == "cuda":
        from engine.cuda_lane import CudaLane
        from engine.kernels.device import nvrtc
        lane = CudaLane(int(device.partition(":")[2] or 0), ops_of(kind, gemm), DTYPES[kind])
        nvrtc()                         # without it nothing would run either
        return lane
    if kind == "emulated":
        from engine.kernels import host
        host.runtime()                  # without g++ nothing below would run
    return HostLane(kind, ops_of(kind), DTYPES[kind])
