"""A GPU made of NumPy memory, lazy streams and the emulator: what tests/stand_in.py puts behind CuPy's names.

Streams are as lazy as they may be: a copy or a launch runs only when somebody waits for it, so a pinned buffer written
too early or a result read too early shows up as wrong bytes. What CUDA would refuse, and what a step of ours must not
do, raises Fault.
"""

import ctypes
import threading
import weakref
from bisect import bisect_right, insort
from collections import Counter, deque
from itertools import count

import numpy as np

from engine.kernels import source

ALIGNED = 512                   # of cudaMalloc
POISON = 0xFF                   # NaN in every float type
PLAIN_SMEM, MOST_SMEM = 48 << 10, 227 << 10

handles = count(0x1000, 0x10)


class Fault(RuntimeError):
    """Something that a GPU would refuse, or that our lane must not do."""


class Gpu:
    """Devices, memory, streams, and what happened to them.

    counts  Counter of "allocations", "pinned allocations", "copies in", "copies out", "launches", "replays", "waits"
    faults  what each Fault said, for code that catches them
    """

    def __init__(self, n_devices, capability):
        self.n_devices, self.capability = n_devices, capability
        self.counts, self.faults, self.streams = Counter(), [], {}
        self.capturing = None                               # the Queue being captured
        self._regions = {"device": {}, "pinned": {}}        # kind: {start: weak reference to the Memory}
        self._starts = {"device": [], "pinned": []}
        self._threads = threading.local()

    def current(self, default):
        """The calling thread's stack of (device, stream), the innermost last."""
        if not hasattr(self._threads, "stack"):
            self._threads.stack = [(0, default)]
        return self._threads.stack

    def fault(self, text):
        self.faults.append(text)
        return Fault(text)

    def refuse_in_capture(self, what):
        if self.capturing is not None:
            self.capturing.is_invalid = True
            raise self.fault(f"{what} while a stream is captured")

    def allocate(self, n_bytes, kind, device):
        self.refuse_in_capture("an allocation")
        self.counts["allocations" if kind == "device" else "pinned allocations"] += 1
        memory = Memory(n_bytes, device)
        self._regions[kind][memory.ptr] = weakref.ref(memory)
        insort(self._starts[kind], memory.ptr)
        weakref.finalize(memory, self._forget, kind, memory.ptr)
        return memory

    def _forget(self, kind, start):
        del self._regions[kind][start]
        self._starts[kind].remove(start)

    def find(self, kind, ptr, n_bytes):
        """The live Memory with n_bytes at ptr, or None."""
        i = bisect_right(self._starts[kind], ptr)
        memory = self._regions[kind][self._starts[kind][i - 1]]() if i else None
        return memory if memory and ptr + n_bytes <= memory.ptr + memory.bytes.size else None

    @property
    def n_live_bytes(self):
        return sum(region().bytes.size for region in self._regions["device"].values())


class Memory:
    """One allocation, full of a pattern that no test expects."""

    def __init__(self, n_bytes, device):
        raw = np.full(n_bytes + ALIGNED, POISON, np.uint8)
        begin = -raw.ctypes.data % ALIGNED
        self.bytes, self.device = raw[begin:begin + n_bytes], device
        self.ptr = self.bytes.ctypes.data

    def at(self, ptr, n_bytes):
        """The bytes from an address on, at most n_bytes."""
        return self.bytes[ptr - self.ptr:][:n_bytes]


class Queue:
    """Work of one stream, in order; run when somebody waits, or recorded while the stream is captured."""

    def __init__(self, gpu, device, is_default=False):
        self.gpu, self.device, self.is_default, self.ptr = gpu, device, is_default, 0 if is_default else next(handles)
        self.n_put = self.n_run = 0
        self.is_invalid = False
        self._waiting, self._captured = deque(), None
        gpu.streams[self.ptr] = self

    def put(self, work):
        if self.is_default:
            raise self.gpu.fault("work on the default stream, which waits for no other")
        if self.gpu.capturing not in (None, self):
            self.gpu.refuse_in_capture("work on another stream")
        if self._captured is not None:
            self._captured.append(work)
            return
        self._waiting.append(work)
        self.n_put += 1

    def run_to(self, n):
        """Runs what was put first, up to n pieces of work since ever."""
        while self.n_run < n:
            self.n_run += 1
            self._waiting.popleft().run()

    def wait(self):
        self.gpu.refuse_in_capture("waiting for a stream")
        self.gpu.counts["waits"] += 1
        self.run_to(self.n_put)

    def begin_capture(self):
        self.gpu.refuse_in_capture("a second capture")
        self.gpu.capturing, self._captured, self.is_invalid = self, [], False

    def end_capture(self):
        """The work recorded."""
        work, self._captured, self.gpu.capturing = self._captured, None, None
        return work


class Copy:
    """n_bytes of pinned memory to device memory; both must be there when it runs."""

    def __init__(self, gpu, target, origin, n_bytes):
        self.gpu, self.target, self.origin, self.n_bytes = gpu, target, origin, n_bytes

    def run(self):
        target = self.gpu.find("device", self.target, self.n_bytes)
        origin = self.gpu.find("pinned", self.origin, self.n_bytes)
        if target is None or origin is None:
            raise self.gpu.fault(f"a copy of {self.n_bytes} bytes touches memory that is gone")
        target.at(self.target, self.n_bytes)[...] = origin.at(self.origin, self.n_bytes)


class Assign:
    """target[...] = origin, of NumPy arrays or a number."""

    def __init__(self, target, origin):
        self.target, self.origin = target, origin

    def run(self):
        self.target[...] = self.origin


class Function:
    """A loaded kernel: the host build that runs in its place."""

    def __init__(self, file, constants, entry):
        build = source.Build(source.Source.load(file), entry, constants)
        self.entry, self.params, self.module, self.smem_limit = entry, build.params, build._host, PLAIN_SMEM

    def values(self, addresses):
        """Copies of the arguments that lie at `addresses`, as the driver takes them at a launch."""
        types = (ctypes.c_void_p if param.is_pointer else source.SCALARS[param.type] for param in self.params)
        return [kind.from_buffer_copy(ctypes.string_at(address, ctypes.sizeof(kind)))
                for kind, address in zip(types, addresses, strict=True)]


class Launch:
    """A kernel with the values its arguments had."""

    def __init__(self, gpu, function, grid, block, smem, values, device):
        self.gpu, self.function, self.grid, self.block, self.smem = gpu, function, grid, block, smem
        self.values, self.device = values, device
        if 0 in (*grid, *block) or smem > function.smem_limit:
            raise gpu.fault(f"{function.entry}: grid {grid}, block {block}, {smem} bytes of dynamic shared memory, "
                            f"{function.smem_limit} allowed: invalid argument")
        # Memory given back while a launch waits is reused in stream order only; under a graph it is simply gone.
        self._kept = self._memories()
        if gpu.capturing is not None:
            self._kept = None

    def _memories(self):
        """The memory behind each argument; None for numbers and null pointers."""
        return [self._memory(param, value.value) if param.is_pointer and value.value else None
                for param, value in zip(self.function.params, self.values, strict=True)]

    def _memory(self, param, ptr):
        memory = self.gpu.find("device", ptr, 0)            # an empty view may lie at the end
        if memory is None:
            raise self.gpu.fault(f"{self.function.entry}: {param.name} is {ptr:#x}, which is no memory of a GPU")
        if memory.device != self.device:
            raise self.gpu.fault(f"{self.function.entry}: {param.name} is on device {memory.device}, the stream on "
                                 f"{self.device}")
        return memory

    def run(self):
        args = [value.value if memory is None else _rest_of(memory, value.value, param)
                for param, value, memory in zip(self.function.params, self.values, self._memories(), strict=True)]
        self.function.module.launch(self.grid, self.block, self.values, args, self.smem)


def _rest_of(memory, ptr, param):
    """The array from an argument's address to the end of its allocation."""
    dtype = source.POINTEES[param.type] or np.dtype(np.uint8)
    rest = memory.at(ptr, memory.bytes.size)
    return rest[:rest.size // dtype.itemsize * dtype.itemsize].view(dtype)
