"""The cuda lane: device memory, one stream, and pinned buffers, through CuPy.

Of CuPy it uses memory, copies, streams, events and graphs, never its elementwise kernels: those would need the CUDA
headers, and every kernel of a step is our own. CuPy is imported when a lane is opened.
"""

import gc
from contextlib import contextmanager, suppress

import numpy as np

from engine.errors import ConfigError, MemoryPlanError

LOADING_BYTES = 64 << 20    # of each of the two pinned buffers that weights pass through
INSTALL = "`pip install cupy-cuda12x` brings it (or cupy-cuda13x, where the driver is for CUDA 13)"
MIN_CUPY = 14               # the first with bfloat16 arrays
MIN_CAPABILITY = (8, 0)     # mma.sync on bfloat16, cp.async
SMEM_OF_A_BLOCK = 97        # cudaDevAttrMaxSharedMemoryPerBlockOptin
MIN_SMEM_BYTES = 163 << 10  # what sm_80, sm_90 and sm_100 have; 7.5, 8.6, 8.9 and 12.0 have 64 to 99 KB


def gpu_is_present():
    """Whether CuPy is installed and sees a GPU that the kernels run on. Imports CuPy's bindings only, 10 ms; never
    raises."""
    try:
        from cupy_backends.cuda.api import runtime
        return runtime.getDeviceCount() > 0 and runtime.deviceGetAttribute(SMEM_OF_A_BLOCK, 0) >= MIN_SMEM_BYTES
    except Exception:       # not installed, no driver, one too old, a library that does not load: no GPU either way
        return False


class CudaLane:
    """Lane of one GPU; the members that engine/backend.py's HostLane has mean the same here.

    index   of the GPU, as CUDA counts them
    stream  where everything happens; non-blocking, so that it can be captured and waits for no other program's work
    Raises ConfigError for what cannot run here.
    """

    name = "cuda"
    folds_norm_offset = False
    stages = has_graphs = True

    def __init__(self, index, ops, dtype):
        self.cupy = _cupy()
        _check_device(self.cupy, index)
        self.ops, self.dtype = ops, np.dtype(dtype)
        self.device = self.cupy.cuda.Device(index)
        self._step_buffers = []
        with self.device:
            self.stream = self.cupy.cuda.Stream(non_blocking=True)

    @contextmanager
    def running(self):
        """The context in which ops are called and lane memory is taken: the calling thread's current device and stream
        are the lane's."""
        with self.device, self.stream:
            yield

    def empty(self, shape, dtype=None):
        """An array with no meaning yet. Raises MemoryPlanError where the GPU has no room for it."""
        try:
            return self.cupy.empty(shape, self.dtype if dtype is None else dtype)
        except self.cupy.cuda.memory.OutOfMemoryError as error:
            raise MemoryPlanError(f"GPU {self.device.id} has no room left: {error}; another program may have taken it "
                                  "meanwhile; lower memory_fraction or kv_cache_bytes") from error

    def zeros(self, shape, dtype=None):
        array = self.empty(shape, dtype)
        self.clear(array)
        return array

    def clear(self, array):
        """Sets every byte to zero, and waits for that: whatever was on its way before is done then too."""
        array.data.memset_async(0, array.nbytes, self.stream)
        self.stream.synchronize()

    def to_device(self, array):
        """The lane's copy of a host array; at set-up, not in a step."""
        out = self.cupy.empty(array.shape, array.dtype)
        out.set(np.asarray(array, order="C"), self.stream)
        self.stream.synchronize()
        return out

    def to_host(self, array):
        """A NumPy array with the values; waits for what computes them."""
        return array.get(self.stream)

    def step_buffer(self, n_bytes):
        """Lives as long as the lane: when its owner drops it for a larger one, copies may be on their way out of it."""
        self._step_buffers.append(StepBuffer(self, n_bytes))
        return self._step_buffers[-1]

    @contextmanager
    def loading(self):
        """Yields fill(array, read): read(begin, end, out) writes elements begin..end of the flat array to host memory,
        [end - begin] of its dtype, while the range before is on its way. All is there when the context ends."""
        ring = PinnedRing(self, LOADING_BYTES)

        def fill(array, read):
            flat = array.reshape(-1)
            most = LOADING_BYTES // flat.itemsize
            for begin in range(0, flat.size, most):
                part = flat[begin:begin + most]
                read(begin, begin + part.size, ring.take(part.nbytes).view(part.dtype))
                ring.send(part)
        try:
            yield fill
        finally:
            self.stream.synchronize()
            ring.close()
            self.cupy.get_default_pinned_memory_pool().free_all_blocks()

    def memory_bytes(self):
        """What there is to plan with: memory of the GPU that nobody has taken."""
        gc.collect()                                        # an engine that was dropped may hold its memory in a cycle
        self.cupy.get_default_memory_pool().free_all_blocks()
        with self.device:
            return self.cupy.cuda.runtime.memGetInfo()[0]

    def capture(self, launch):
        """The graph of what launch() puts on the stream; nothing of it runs. Arrays that kernels touch must outlive the
        graph, and all that differs from step to step must be in their memory."""
        self.stream.begin_capture()
        try:
            launch()
        except BaseException:
            with suppress(Exception):   # the stream must leave capture, whatever became of the graph
                self.stream.end_capture()
            raise
        graph = self.stream.end_capture()
        graph.upload(self.stream)
        return graph


class PinnedRing:
    """Two pinned buffers used in turn: one is written again only when the copy out of it is done."""

    def __init__(self, lane, n_bytes):
        cuda = lane.cupy.cuda
        self._stream, self._turn = lane.stream, 0
        self._buffers = [np.frombuffer(cuda.alloc_pinned_memory(n_bytes), np.uint8, n_bytes) for _ in range(2)]
        self._copied = [cuda.Event(disable_timing=True) for _ in range(2)]

    def take(self, n_bytes):
        """The first n_bytes of the buffer whose turn it is, to be written and then sent."""
        self._turn = 1 - self._turn
        self._copied[self._turn].synchronize()              # returns at once for an event that was never recorded
        return self._buffers[self._turn][:n_bytes]

    def send(self, array):
        """Starts the copy of the buffer taken last to a contiguous `array` of the lane."""
        array.data.copy_from_host_async(self._buffers[self._turn].ctypes.data, array.nbytes, self._stream)
        self._copied[self._turn].record(self._stream)

    def close(self):
        """Gives the buffers back, when the last copy is done."""
        self._buffers.clear()


class StepBuffer:
    """Memory through which a step's inputs reach the lane.

    host    [n_bytes] uint8, written between one `send` and the next; it keeps what it holds
    device  [n_bytes] uint8, what kernels read, at one address for good
    """

    def __init__(self, lane, n_bytes):
        self.host = np.zeros(n_bytes, np.uint8)
        self.device = lane.zeros((n_bytes,), np.uint8)
        self._ring = PinnedRing(lane, n_bytes)

    def send(self, n_bytes):
        """Starts the copy of the first n_bytes; `host` may be written again when this returns."""
        self._ring.take(n_bytes)[...] = self.host[:n_bytes]
        self._ring.send(self.device[:n_bytes])


def _cupy():
    try:
        import cupy
    except ImportError as error:
        raise ConfigError(f"device 'cuda' needs CuPy, which does not import ({error}); {INSTALL}") from error
    if int(cupy.__version__.split(".")[0]) < MIN_CUPY:
        raise ConfigError(f"device 'cuda' needs CuPy {MIN_CUPY} or later for bfloat16, found {cupy.__version__}; "
                          + INSTALL)
    return cupy


def _check_device(cupy, index):
    try:
        n_devices = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise ConfigError(f"device 'cuda': CUDA finds no usable GPU driver ({error}); `nvidia-smi` should list a GPU, "
                          "and in a container the GPU must be passed through; device='cpu' needs none") from error
    if index >= n_devices:
        raise ConfigError(f"device 'cuda:{index}': this machine has {n_devices} GPU{'s' * (n_devices != 1)}"
                          + (f", cuda:0 to cuda:{n_devices - 1}" if n_devices else "; device='cpu' needs none"))
    capability = cupy.cuda.Device(index).compute_capability
    if (int(capability[:-1]), int(capability[-1])) < MIN_CAPABILITY:
        raise ConfigError(f"device 'cuda:{index}' has compute capability {capability[:-1]}.{capability[-1]}, the "
                          f"kernels need {'.'.join(map(str, MIN_CAPABILITY))} (Ampere) or later")
    n_bytes = cupy.cuda.runtime.deviceGetAttribute(SMEM_OF_A_BLOCK, index)
    if n_bytes < MIN_SMEM_BYTES:
        raise ConfigError(f"device 'cuda:{index}' has {n_bytes} bytes of shared memory for a block, the kernels' tiles "
                          f"need {MIN_SMEM_BYTES}: A100, H100, H200, B200 have it; device='cpu' runs without")
