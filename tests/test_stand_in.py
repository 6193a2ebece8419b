"""tests/stand_in.py: it is as CuPy is named, as lazy as a GPU may be, and raises on everything a step must not do."""

import importlib
import inspect
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from engine.errors import KernelError
from engine.kernels import source
from tests import stand_in
from tests.stand_in_gpu import Fault

KERNELS = str(Path(__file__).with_name("stand_in.cu"))
SCALE = source.Kernel(KERNELS, "scale")


@pytest.fixture
def stream(gpu):
    """A stream that is current."""
    import cupy
    stream = cupy.cuda.Stream(non_blocking=True)
    with cupy.cuda.Device(0), stream:
        yield stream


def put(values, stream):
    import cupy
    values = np.asarray(values, np.float32)
    array = cupy.empty(values.shape, np.float32)
    array.set(values, stream)
    return array


def zeros(shape, dtype):
    import cupy
    array = cupy.empty(shape, dtype)
    array.data.memset_async(0, array.nbytes)
    return array


def scale(x, y, a=2.0):
    SCALE().launch((-(-len(x) // 32),), (32,), (x, y, len(x), a))


def faults(gpu, *expected):
    """Takes the faults of the test's own; each says what was expected."""
    assert len(gpu.faults) == len(expected)
    for fault, text in zip(gpu.faults, expected, strict=True):
        assert text in fault
    gpu.faults.clear()


# --- names

def test_every_name_is_one_of_cupys():
    """Every module, function, class, and member of a class; parameters of functions by name."""
    for module_name, fake in stand_in._modules().items():
        real = importlib.import_module(module_name)
        assert sys.modules[module_name] is real
        for name, member in vars(fake).items():
            if (name.startswith("__") and name != "__version__") or inspect.ismodule(member):
                continue
            assert hasattr(real, name), f"{module_name}.{name}"
            if inspect.isclass(member) and name != "CUDARuntimeError":
                for attribute in vars(member):
                    if not attribute.startswith("_"):
                        assert hasattr(getattr(real, name), attribute), f"{module_name}.{name}.{attribute}"


@pytest.mark.parametrize("name", ["Stream.__init__", "Stream.begin_capture", "Stream.end_capture", "Event.__init__",
                                  "Event.record", "Event.synchronize"])
def test_parameters_are_cupys(name):
    import cupy
    kind, method = name.split(".")
    signatures = [inspect.signature(getattr(getattr(module, kind), method)) for module in (cupy.cuda, stand_in)]
    assert list(signatures[0].parameters) == list(signatures[1].parameters)


def test_launch_kernel_takes_what_the_driver_takes():
    from cupy_backends.cuda.api import driver
    for name in ("launchKernel", "funcSetAttribute"):
        real = getattr(driver, name).__doc__.split("(", 1)[1].split(")", 1)[0]
        assert [part.split()[-1] for part in real.split(",")] == list(
            inspect.signature(getattr(stand_in, name)).parameters)


# --- laziness

def test_nothing_runs_before_somebody_waits(gpu, stream):
    x, y = put([1, 2, 3], stream), zeros((3,), np.float32)
    scale(x, y)
    assert (y._view.view(np.uint32) == 0xFFFFFFFF).all()    # not even the zeros
    np.testing.assert_array_equal(y.get(stream), [2, 4, 6])
    assert gpu.counts == {"allocations": 2, "copies in": 1, "launches": 1, "copies out": 1, "waits": 1}


def test_a_pinned_buffer_written_too_early_sends_the_wrong_bytes(stream):
    import cupy
    pinned, target = cupy.cuda.alloc_pinned_memory(4), cupy.empty((4,), np.uint8)
    host, event = np.frombuffer(pinned, np.uint8, 4), cupy.cuda.Event(disable_timing=True)
    host[...] = 1
    target.data.copy_from_host_async(host.ctypes.data, 4, stream)
    event.record(stream)
    host[...] = 2
    assert target.get(stream).tolist() == [2] * 4
    target.data.copy_from_host_async(host.ctypes.data, 4, stream)
    event.record(stream)
    event.synchronize()
    host[...] = 3
    assert target.get(stream).tolist() == [2] * 4


def test_an_event_waits_for_what_came_before_it_only(stream):
    import cupy
    first, second = zeros((2,), np.uint8), None
    event = cupy.cuda.Event()
    event.record(stream)
    second = zeros((2,), np.uint8)
    event.synchronize()
    assert first._view.tolist() == [0, 0] and second._view.tolist() == [255, 255]


def test_arguments_are_copied_at_the_launch(stream):
    """As the driver does: what the launcher packed may be gone when the kernel runs."""
    x, y = put([1.0], stream), zeros((1,), np.float32)
    for a in (2.0, 5.0):
        scale(x, y, a)
    assert y.get(stream).tolist() == [5.0]


def test_memory_given_back_after_a_launch_is_still_the_launchs(stream):
    y = zeros((1,), np.float32)
    scale(put([3.0], stream), y)
    assert y.get(stream).tolist() == [6.0]


def test_bfloat16_and_views(stream):
    import cupy
    array = zeros((4, 6), ml_dtypes.bfloat16)
    assert array.dtype == ml_dtypes.bfloat16 and array.nbytes == 48 and array.flags.c_contiguous
    part = array[1:3]
    assert part.shape == (2, 6) and part.data.ptr - array.data.ptr == 12 and not array[:, 1:2].flags.c_contiguous
    assert array[1].shape == (6,) and array[1, 2].shape == () and array[..., 2].shape == (4,)
    assert part.reshape(3, 4).data.ptr == part.data.ptr and part.view(np.uint8).shape == (2, 12)
    assert array.get(stream).tolist() == [[0.0] * 6] * 4
    assert cupy.empty((0, 4), np.float32).data.ptr == 0


def test_two_devices():
    import_error = pytest.raises(Exception, match="invalid device ordinal")
    with stand_in.installed(n_devices=2) as gpu:
        import cupy
        with cupy.cuda.Device(1):
            stream = cupy.cuda.Stream(non_blocking=True)
            with stream:
                far = put([1.0], stream)
        near = cupy.empty((1,), np.float32)
        with cupy.cuda.Device(1), stream, pytest.raises(KernelError, match="y is on device 0, the stream on 1"):
            scale(far, near)
        with pytest.raises(RuntimeError, match="not the current one"), stream:
            pass
        with import_error:
            cupy.cuda.Device(2)
        faults(gpu, "y is on device 0")


# --- capture

def test_a_graph_repeats_launches_and_copies_with_what_they_were_given(gpu, stream):
    import cupy
    pinned = cupy.cuda.alloc_pinned_memory(8)
    host = np.frombuffer(pinned, np.uint8, 8).view(np.float32)
    x, y = cupy.empty((2,), np.float32), zeros((2,), np.float32)
    stream.synchronize()
    stream.begin_capture()
    x.data.copy_from_host_async(host.ctypes.data, 8, stream)
    scale(x, y, 3.0)
    graph = stream.end_capture()
    host[...] = [1, 2]
    stream.synchronize()
    assert y._view.tolist() == [0, 0]                       # a capture runs nothing
    for values in ([1, 2], [5, 7]):
        host[...] = values
        graph.launch(stream)
        assert y.get(stream).tolist() == [3 * v for v in values]
    assert gpu.counts["replays"] == 2


def forbidden(stream):
    """{what: (what it says, how)}"""
    import cupy
    array, event = put([1.0], stream), cupy.cuda.Event()
    other = cupy.cuda.Stream(non_blocking=True)
    stream.synchronize()
    with other:
        far = zeros((1,), np.float32)

    def on(stream):
        with stream:
            scale(array, far)
    stream.begin_capture()
    graph = stream.end_capture()
    return {"allocate": ("an allocation", lambda: cupy.empty((2,), np.float32)),
            "pin": ("an allocation", lambda: cupy.cuda.alloc_pinned_memory(8)),
            "wait": ("waiting for a stream", stream.synchronize),
            "wait for an event": ("waiting for an event", event.synchronize),
            "record": ("an event", lambda: event.record(stream)),
            "read back": ("a read-back", lambda: array.get(stream)),
            "set": ("a copy from pageable memory", lambda: array.set(np.ones(1, np.float32), stream)),
            "free": ("freeing memory", lambda: cupy.get_default_memory_pool().free_all_blocks()),
            "load": ("loading a module", lambda: cupy.cuda.function.Module().load(b"{}")),
            "replay": ("a graph launch", lambda: graph.launch(stream)),
            "capture": ("a second capture", other.begin_capture),
            "other stream": ("work on another stream", lambda: on(other))}


@pytest.mark.parametrize("what", ["allocate", "pin", "wait", "wait for an event", "record", "read back", "set", "free",
                                  "load", "replay", "capture", "other stream"])
def test_forbidden_while_a_stream_is_captured(gpu, stream, what):
    text, do = forbidden(stream)[what]
    stream.begin_capture()
    with pytest.raises((Fault, KernelError), match=f"{text} while a stream is captured"):
        do()
    with pytest.raises(stand_in.CUDARuntimeError, match="StreamCaptureInvalidated"):
        stream.end_capture()
    faults(gpu, text)


def test_a_graph_that_outlives_its_memory(gpu, stream):
    x, y = put([1.0], stream), put([0.0], stream)
    stream.synchronize()
    stream.begin_capture()
    scale(x, y)
    graph = stream.end_capture()
    del x
    graph.launch(stream)
    with pytest.raises(Fault, match=r"scale: x is .* which is no memory of a GPU"):
        stream.synchronize()
    faults(gpu, "no memory")


# --- what is never allowed

@pytest.mark.parametrize(("do", "text"), [
    (lambda a: a[np.array([0])], "indexing with a ndarray"),
    (lambda a: a[[0]], "indexing with a list"),
    (lambda a: a[[True]], "indexing with a list"),
    (lambda a: a.__setitem__(0, 1), "launches kernels of CuPy's"),
    (lambda a: a + 1, "launches kernels of CuPy's"),
    (lambda a: a == a, "launches kernels of CuPy's"),
    (lambda a: float(a[0]), "reads back unasked"),
    (lambda a: bool(a[0]), "reads back unasked"),
    (list, "reads back unasked"),
    (np.asarray, "becomes a NumPy array unasked"),
    (lambda a: a[::2].get(), "launches a kernel of CuPy's"),
    (lambda a: a.reshape(2, 2)[:, ::-1].reshape(4), "copies"),
])
def test_forbidden_at_any_time(gpu, stream, do, text):
    with pytest.raises(Fault, match=text):
        do(put([1, 2, 3, 4], stream))
    faults(gpu, text)


def test_work_on_the_default_stream(gpu):
    import cupy
    with pytest.raises(Fault, match="default stream"):
        zeros((1,), np.float32)
    faults(gpu, "default stream")
    with pytest.raises(RuntimeError, match="cannot capture on the default"):
        cupy.cuda.Stream.null.begin_capture()


def test_a_kernel_on_host_memory(gpu, stream):
    """Where the launcher's own check of lanes is passed by."""
    y = put([0.0], stream)
    host = np.ones(1, np.float32)
    y._view, view = host, y._view
    with pytest.raises(KernelError, match="is no memory of a GPU"):
        scale(put([1.0], stream), y)
    y._view = view
    faults(gpu, "is no memory of a GPU")


def test_a_copy_from_memory_that_is_not_pinned(gpu, stream):
    host, target = np.zeros(4, np.uint8), put([1.0], stream)
    with pytest.raises(Fault, match="not pinned"):
        target.data.copy_from_host_async(host.ctypes.data, 4, stream)
    faults(gpu, "not pinned")


def test_shared_memory_above_48_kb_is_asked_for(gpu, stream, monkeypatch):
    """The launcher does; without that a launch is refused, and 227 KB is the most that it may ask for."""
    x, y = put([1.0], stream), put([0.0], stream)
    SCALE().launch((1,), (32,), (x, y, 1, 2.0), smem=100 << 10)
    assert y.get(stream).tolist() == [2.0]
    for asked, smem in ((101 << 10, 101 << 10), (0, 228 << 10)):
        monkeypatch.setattr(SCALE()._on_device[stand_in.Ordinal(0)], "_smem", asked)
        with pytest.raises(KernelError, match="invalid argument"):
            SCALE().launch((1,), (32,), (x, y, 1, 2.0), smem=smem)
    faults(gpu, "102400 allowed", f"= {228 << 10}")


def test_faults_that_code_swallows_are_found_on_leaving():
    with pytest.raises(AssertionError, match="default stream"), stand_in.installed(), pytest.raises(Fault):
        zeros((1,), np.float32)
    assert "cupy" not in sys.modules or sys.modules["cupy"].__file__ is not None
