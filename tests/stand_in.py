"""A recording stand-in for CuPy and the CUDA driver, so that the cuda lane's own Python runs where no GPU is.

    with stand_in.installed() as gpu:
        llm = LLM(path, device="cuda")

Memory is NumPy's, kernels run on the emulator, streams are lazy (tests/stand_in_gpu.py). It offers what the engine
uses, under CuPy's names; tests/test_stand_in.py compares each name with the real CuPy. Faults: work on the default
stream, kernels on host memory, copies from memory that is not pinned, operations that CuPy would do with kernels of its
own or by reading back unasked; while a stream is captured also allocations, waiting, reading back, loading a module.
"""

import ctypes
import json
import sys
from contextlib import contextmanager
from types import ModuleType
from unittest import mock

import numpy as np

from engine.kernels import device
from tests.stand_in_gpu import MOST_SMEM, POISON, Assign, Copy, Function, Gpu, Launch, Queue, handles

MAX_DYNAMIC_SMEM = 8            # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
TOTAL_BYTES = 256 << 20          # of a GPU: an engine fills most of it, and every byte is written here

_gpu = None                     # the Gpu installed; CuPy's functions take none
_functions = {}                 # driver handle: Function; loaded for good, as the Builds that hold the handles are


@contextmanager
def installed(n_devices=1, capability="90"):
    """Puts the stand-in in the place of CuPy; yields the Gpu. On leaving, no fault may be left in it."""
    global _gpu
    assert _gpu is None
    _gpu = gpu = Gpu(n_devices, capability)
    Stream.null = Stream(null=True)
    hidden = {name: None for name in sys.modules if name.split(".")[0] in ("cupy", "cupy_backends", "cupyx")}
    finders = (device._cupy, device._driver)                # they remember which module they found
    try:
        with mock.patch.dict(sys.modules, {**hidden, **_modules()}), \
                mock.patch.object(device, "compile_cubin", compile_cubin):
            for finder in finders:
                finder.cache_clear()
            yield gpu
    finally:
        _gpu = None
        for finder in finders:
            finder.cache_clear()
    assert not gpu.faults, gpu.faults


def compile_cubin(source, constants, arch):
    """In the place of NVRTC: bytes that name the host build."""
    return json.dumps({"file": str(source.file), "constants": constants, "arch": arch}).encode()


def _current():
    return _gpu.current(Stream.null)


def _queue(stream):
    return (get_current_stream() if stream is None else stream)._queue


class CUDARuntimeError(RuntimeError):
    """What CuPy makes of a status that is not success."""


class OutOfMemoryError(MemoryError):
    """cupy.cuda.memory.OutOfMemoryError"""


class Ordinal(int):
    """A device number that equals no real one: Builds keep what they loaded by it."""

    def __eq__(self, other):
        return type(other) is Ordinal and int(self) == int(other)

    def __hash__(self):
        return hash(("stand-in", int(self)))


class Device:
    def __init__(self, device=None):
        self.id = _current()[-1][0] if device is None else int(device)
        if not 0 <= self.id < _gpu.n_devices:
            raise CUDARuntimeError("cudaErrorInvalidDevice: invalid device ordinal")

    def __enter__(self):
        _current().append((self.id, Stream.null))
        return self

    def __exit__(self, *exc_info):
        _current().pop()

    @property
    def compute_capability(self):
        return _gpu.capability


class Stream:
    def __init__(self, null=False, non_blocking=False, ptds=False, priority=None):
        self.device_id = -1 if null else _current()[-1][0]
        self._queue = Queue(_gpu, self.device_id, is_default=null)
        self.ptr = self._queue.ptr

    def __enter__(self):
        if self.device_id != _current()[-1][0]:
            raise RuntimeError("the device of the stream is not the current one")
        _current().append((self.device_id, self))
        return self

    def __exit__(self, *exc_info):
        _current().pop()

    def synchronize(self):
        self._queue.wait()

    def begin_capture(self, mode=None):
        if self.ptr == 0:
            raise RuntimeError("cannot capture on the default (legacy) stream")
        self._queue.begin_capture()

    def end_capture(self):
        work = self._queue.end_capture()
        if self._queue.is_invalid:
            raise CUDARuntimeError("cudaErrorStreamCaptureInvalidated: operation failed due to a previous error during "
                                   "capture")
        graph = object.__new__(Graph)
        graph._work = work
        return graph


class Graph:
    def __init__(self):
        raise NotImplementedError("a graph comes from a stream's capture")

    def launch(self, stream=None):
        _gpu.refuse_in_capture("a graph launch")
        _gpu.counts["replays"] += 1
        for work in self._work:
            _queue(stream).put(work)

    def upload(self, stream=None):
        _gpu.refuse_in_capture("a graph upload")


class Event:
    def __init__(self, block=False, disable_timing=False, interprocess=False):
        self._queue, self._at = None, 0

    def record(self, stream=None):
        _gpu.refuse_in_capture("an event")
        self._queue = _queue(stream)
        self._at = self._queue.n_put

    def synchronize(self):
        _gpu.refuse_in_capture("waiting for an event")
        if self._queue is not None:
            self._queue.run_to(self._at)

    @property
    def done(self):
        return self._queue.n_run >= self._at


def get_elapsed_time(start_event, end_event):
    """A millisecond for each piece of work between."""
    if not (start_event.done and end_event.done):
        raise CUDARuntimeError("cudaErrorNotReady: device not ready")
    return float(end_event._at - start_event._at)


class MemoryPointer:
    def __init__(self, mem, offset):
        self.mem, self.ptr = mem, mem.ptr + offset if mem.bytes.size else 0     # nothing is allocated for no bytes

    def copy_from_host_async(self, mem, size, stream=None):
        if _gpu.find("pinned", mem, size) is None:
            raise _gpu.fault(f"an asynchronous copy of {size} bytes from {mem:#x}, which is not pinned memory")
        _gpu.counts["copies in"] += 1
        _queue(stream).put(Copy(_gpu, self.ptr, mem, size))

    def copy_to_host_async(self, mem, size, stream=None):
        memory = _gpu.find("pinned", mem, size)
        if memory is None:
            raise _gpu.fault(f"an asynchronous copy of {size} bytes to {mem:#x}, which is not pinned memory")
        _gpu.counts["copies out"] += 1
        _queue(stream).put(Assign(memory.at(mem, size), self.mem.at(self.ptr, size)))

    def memset_async(self, value, size, stream=None):
        _queue(stream).put(Assign(self.mem.at(self.ptr, size), value))


class PinnedMemoryPointer:
    """In CuPy it exports its bytes to whoever wants a buffer; here an array of ctypes does that."""


class ndarray:
    """A view of device memory."""

    __hash__ = None

    def __init__(self, view, memory):
        self._view, self._memory = view, memory

    shape = property(lambda self: self._view.shape)
    dtype = property(lambda self: self._view.dtype)
    ndim = property(lambda self: self._view.ndim)
    size = property(lambda self: self._view.size)
    nbytes = property(lambda self: self._view.nbytes)
    itemsize = property(lambda self: self._view.itemsize)
    strides = property(lambda self: self._view.strides)
    flags = property(lambda self: self._view.flags)

    @property
    def data(self):
        return MemoryPointer(self._memory, self._view.__array_interface__["data"][0] - self._memory.ptr)

    @property
    def __cuda_array_interface__(self):
        return {"shape": self.shape, "typestr": self.dtype.str, "data": (self.data.ptr, False), "version": 3}

    def __len__(self):
        return len(self._view)

    def __getitem__(self, key):
        key = key if isinstance(key, tuple) else (key,)
        for part in key:
            if not isinstance(part, (int, np.integer, slice, type(None), type(Ellipsis))):
                raise _gpu.fault(f"indexing with a {type(part).__name__} launches a kernel of CuPy's")
        return ndarray(self._view[key if Ellipsis in key else (*key, ...)], self._memory)

    def reshape(self, *shape):
        view = self._view.reshape(*shape)
        if view.size and not np.may_share_memory(view, self._view):
            raise _gpu.fault(f"reshape of {list(self.shape)} with strides {self.strides} copies")
        return ndarray(view, self._memory)

    def view(self, dtype):
        return ndarray(self._view.view(dtype), self._memory)

    def get(self, stream=None, order="C", out=None, blocking=True):
        _gpu.refuse_in_capture("a read-back")
        if not self.flags.c_contiguous:
            raise _gpu.fault(f"reading back {list(self.shape)} with strides {self.strides} launches a kernel of CuPy's")
        _gpu.counts["copies out"] += 1
        host = np.empty(self.shape, self.dtype)
        host.reshape(-1).view(np.uint8)[...] = POISON
        queue = _queue(stream)
        queue.put(Assign(host, self._view))
        queue.wait()
        return host

    def set(self, arr, stream=None):
        _gpu.refuse_in_capture("a copy from pageable memory")
        if (arr.dtype, arr.shape) != (self.dtype, self.shape):
            raise TypeError(f"{arr.dtype} {arr.shape} cannot be set to {self.dtype} {self.shape}")
        _gpu.counts["copies in"] += 1
        _queue(stream).put(Assign(self._view, arr.copy()))  # CUDA stages pageable memory before it returns

    def __array__(self, *args, **kwargs):
        raise _gpu.fault("a device array becomes a NumPy array unasked")

    def _refuse(self, *args):
        raise _gpu.fault("an operation on a device array that launches kernels of CuPy's or reads back unasked")

    __setitem__ = __bool__ = __int__ = __float__ = __index__ = __iter__ = __eq__ = __ne__ = __lt__ = __gt__ = _refuse
    __add__ = __radd__ = __iadd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __neg__ = _refuse


def empty(shape, dtype=float, order="C"):
    like = np.broadcast_to(np.empty((), dtype), shape)      # takes no memory, whatever the shape
    if like.nbytes > memGetInfo()[0]:
        raise OutOfMemoryError(f"Out of memory allocating {like.nbytes:,} bytes")
    memory = _gpu.allocate(like.nbytes, "device", _current()[-1][0])
    return ndarray(memory.bytes.view(like.dtype).reshape(like.shape), memory)


def alloc_pinned_memory(size):
    memory = _gpu.allocate(size, "pinned", None)
    kind = type("PinnedMemoryPointer", (ctypes.c_uint8 * size,), {})
    pointer = kind.from_buffer(memory.bytes)
    pointer.mem, pointer.ptr = memory, memory.ptr
    return pointer


class MemoryPool:
    def free_all_blocks(self, stream=None):
        _gpu.refuse_in_capture("freeing memory")


class PinnedMemoryPool:
    def free_all_blocks(self):
        _gpu.refuse_in_capture("freeing memory")


def get_default_memory_pool():
    return MemoryPool()


def get_default_pinned_memory_pool():
    return PinnedMemoryPool()


def get_current_stream(device_id=-1):
    return _current()[-1][1]


class Module:
    def load(self, cubin):
        _gpu.refuse_in_capture("loading a module")
        self._names = json.loads(cubin)

    def get_function(self, name):
        function = object.__new__(LoadedFunction)
        function.ptr = next(handles)
        _functions[function.ptr] = Function(self._names["file"], self._names["constants"], name)
        return function


class LoadedFunction:
    """cupy.cuda.function.Function"""


def getDevice():
    return Ordinal(_current()[-1][0])


def getDeviceCount():
    if not _gpu.n_devices:
        raise CUDARuntimeError("cudaErrorNoDevice: no CUDA-capable device is detected")
    return _gpu.n_devices


def deviceGetAttribute(attribute, device):
    """Bytes of shared memory that a block may have, the one attribute that is asked for."""
    assert attribute == 97
    return {"75": 64, "80": 163, "90": 227, "100": 227}.get(_gpu.capability, 99) << 10


def memGetInfo():
    return TOTAL_BYTES - _gpu.n_live_bytes, TOTAL_BYTES


def funcSetAttribute(f, attribute, value):
    if attribute != MAX_DYNAMIC_SMEM or value > MOST_SMEM:
        raise _gpu.fault(f"function attribute {attribute} = {value}: invalid argument")
    _functions[f].smem_limit = value


def launchKernel(f, grid_dim_x, grid_dim_y, grid_dim_z, block_dim_x, block_dim_y, block_dim_z, shared_mem_bytes, stream,
                 kernel_params, extra):
    function, queue = _functions[f], _gpu.streams[stream]
    addresses = (ctypes.c_void_p * len(function.params)).from_address(kernel_params)
    _gpu.counts["launches"] += 1
    queue.put(Launch(_gpu, function, (grid_dim_x, grid_dim_y, grid_dim_z), (block_dim_x, block_dim_y, block_dim_z),
                     shared_mem_bytes, function.values(addresses), queue.device))


def _modules():
    """{module name: module}"""
    runtime = {"getDevice": getDevice, "deviceGetAttribute": deviceGetAttribute,
               "getDeviceCount": getDeviceCount, "memGetInfo": memGetInfo,
               "CUDARuntimeError": CUDARuntimeError}
    contents = {
        "cupy": {"__version__": "14.0.0", "ndarray": ndarray, "empty": empty,
                 "get_default_memory_pool": get_default_memory_pool,
                 "get_default_pinned_memory_pool": get_default_pinned_memory_pool},
        "cupy.cuda": {"Device": Device, "Stream": Stream, "Event": Event, "Graph": Graph,
                      "MemoryPointer": MemoryPointer, "PinnedMemoryPointer": PinnedMemoryPointer,
                      "MemoryPool": MemoryPool, "PinnedMemoryPool": PinnedMemoryPool,
                      "alloc_pinned_memory": alloc_pinned_memory, "get_current_stream": get_current_stream,
                      "get_elapsed_time": get_elapsed_time},
        "cupy.cuda.memory": {"OutOfMemoryError": OutOfMemoryError},
        "cupy.cuda.function": {"Module": Module, "Function": LoadedFunction},
        "cupy.cuda.runtime": runtime,
        "cupy_backends": {}, "cupy_backends.cuda": {}, "cupy_backends.cuda.api": {},
        "cupy_backends.cuda.api.runtime": runtime,
        "cupy_backends.cuda.api.driver": {"launchKernel": launchKernel, "funcSetAttribute": funcSetAttribute}}
    made = {}
    for name, members in contents.items():
        made[name] = ModuleType(name)
        vars(made[name]).update(members)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(made[parent], child, made[name])
    return made
