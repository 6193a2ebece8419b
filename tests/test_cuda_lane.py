"""engine/cuda_lane.py on a stand-in for CuPy: what it refuses, its copies, and whole models on it."""

import sys
from pathlib import Path
from threading import Thread
from unittest import mock

import ml_dtypes
import numpy as np
import pytest

from engine import cuda_lane
from engine.backend import HostLane
from engine.cuda_lane import CudaLane, PinnedRing, gpu_is_present
from engine.errors import ConfigError, MemoryPlanError
from engine.kernels.source import Kernel
from engine.models import describe
from engine.tensors import account, targets
from engine.weights import load
from loaders.config import Config
from loaders.safetensors import Checkpoint
from tests import stand_in, tiny

BF16 = np.dtype(ml_dtypes.bfloat16)
SCALE = Kernel(str(Path(__file__).with_name("stand_in.cu")), "scale")


@pytest.fixture
def lane(gpu):
    lane = CudaLane(0, None, BF16)
    with lane.running():
        yield lane


# --- whether there is a GPU

def test_gpu_is_present():
    assert gpu_is_present() in (True, False)
    with stand_in.installed():
        assert gpu_is_present()
    for arguments in ({"n_devices": 0}, {"capability": "75"}):
        with stand_in.installed(**arguments):
            assert not gpu_is_present()
    with mock.patch.dict(sys.modules, {"cupy_backends": None, "cupy_backends.cuda.api": None}):
        assert not gpu_is_present()


def test_no_cupy():
    with mock.patch.dict(sys.modules, {"cupy": None}), \
            pytest.raises(ConfigError, match=r"device 'cuda' needs CuPy, .*; `pip install cupy-cuda12x`"):
        CudaLane(0, None, BF16)


def test_an_old_cupy(gpu):
    with mock.patch.object(sys.modules["cupy"], "__version__", "13.6.0"), \
            pytest.raises(ConfigError, match=r"needs CuPy 14 or later for bfloat16, found 13\.6\.0; `pip install"):
        CudaLane(0, None, BF16)


@pytest.mark.parametrize(("n_devices", "index", "text"), [
    (0, 0, r"finds no usable GPU driver \(cudaErrorNoDevice.*nvidia-smi.*device='cpu' needs none"),
    (1, 1, "'cuda:1': this machine has 1 GPU, cuda:0 to cuda:0"),
    (2, 7, "'cuda:7': this machine has 2 GPUs, cuda:0 to cuda:1")])
def test_no_such_gpu(n_devices, index, text):
    with stand_in.installed(n_devices=n_devices), pytest.raises(ConfigError, match=text):
        CudaLane(index, None, BF16)


def test_a_gpu_too_old():
    with stand_in.installed(capability="75"), \
            pytest.raises(ConfigError, match=r"compute capability 7.5, the kernels need 8.0 \(Ampere\) or later"):
        CudaLane(0, None, BF16)


@pytest.mark.parametrize("capability", ["86", "89", "120"])
def test_a_gpu_with_little_shared_memory(capability):
    with stand_in.installed(capability=capability), \
            pytest.raises(ConfigError, match="101376 bytes of shared memory for a block, the kernels' tiles"):
        CudaLane(0, None, BF16)


@pytest.mark.parametrize("capability", ["80", "90", "100"])
def test_gpus_that_run(capability):
    with stand_in.installed(capability=capability):
        assert CudaLane(0, None, BF16).name == "cuda"


# --- arrays and streams

def test_has_what_a_host_lane_has(lane):
    host = HostLane("emulated", None, BF16)
    assert {name for name in dir(host) if name[0] != "_"} <= {name for name in dir(lane) if name[0] != "_"}
    assert (lane.stages, lane.folds_norm_offset, lane.dtype) == (host.stages, host.folds_norm_offset, host.dtype)
    assert lane.has_graphs and not host.has_graphs


def test_arrays(lane):
    assert lane.empty((2, 3)).dtype == BF16 and lane.empty((2, 3), np.int32).dtype == np.int32
    np.testing.assert_array_equal(lane.to_host(lane.zeros((2, 3))), np.zeros((2, 3), BF16))
    counters = lane.to_device(np.arange(1, 5, dtype=np.int32))
    lane.clear(counters[1:3])
    assert lane.to_host(counters).tolist() == [1, 0, 0, 4]
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    for host in (values, values.T, values.astype(BF16), values[:0], np.float32(3).reshape(())):
        got = lane.to_host(lane.to_device(host))
        assert got.dtype == host.dtype
        np.testing.assert_array_equal(got, host)


def test_every_thread_works_on_the_lanes_own_stream(gpu):
    lane = CudaLane(0, None, np.float32)
    def work(out):
        with lane.running():
            x, y = lane.to_device(np.ones(4, np.float32)), lane.zeros((4,))
            SCALE().launch((1,), (32,), (x, y, 4, 3.0))
        out.append(lane.to_host(y))                         # reads back outside of the context too
    results = []
    threads = [Thread(target=work, args=(results,)) for _ in range(2)]
    for thread in threads:
        thread.start()
        thread.join()
    assert [result.tolist() for result in results] == [[3.0] * 4] * 2


def test_the_second_gpu():
    with stand_in.installed(n_devices=2) as gpu:
        lane = CudaLane(1, None, np.float32)
        with lane.running():
            x, y = lane.to_device(np.ones(4, np.float32)), lane.zeros((4,))
            buffer = lane.step_buffer(16)
            buffer.send(16)
            SCALE().launch((1,), (32,), (x, y, 4, 3.0))
        assert lane.to_host(y).tolist() == [3.0] * 4
        assert {array._memory.device for array in (x, y, buffer.device)} == {1}
        assert gpu.current(None)[-1][0] == 0                # as it was found


def test_memory_bytes(lane):
    before = lane.memory_bytes()
    array = lane.empty((1 << 20,), np.uint8)
    assert before - lane.memory_bytes() == array.nbytes


def test_no_room(lane):
    """Told as an error of ours; what was there before is left."""
    with pytest.raises(MemoryPlanError, match=r"GPU 0 has no room left: .* lower memory_fraction"):
        lane.empty((1 << 50,))
    assert lane.to_host(lane.zeros((2,), np.int32)).tolist() == [0, 0]


# --- a step's inputs

def send_many(lane, n=7):
    """The inputs of n steps as kernels saw them, nobody waiting in between, and what was sent."""
    buffer = lane.step_buffer(64)
    out, sent = lane.zeros((n, 16), np.float32), []
    for i in range(n):
        buffer.host.view(np.float32)[...] = np.arange(16) + 100 * i
        sent.append(buffer.host.view(np.float32).copy())
        buffer.send(64)
        SCALE().launch((1,), (32,), (buffer.device.view(np.float32), out[i], 16, 1.0))
    return lane.to_host(out), np.array(sent)


def test_steps_sent_without_waiting_each_find_their_own_inputs(lane):
    np.testing.assert_array_equal(*send_many(lane))


def test_without_the_wait_they_would_not(lane):
    """The test above finds what it is there for: the wait taken out, the bytes are others."""
    with mock.patch.object(stand_in.Event, "synchronize", lambda self: None):
        got, sent = send_many(lane)
    assert (got != sent).any()


def test_a_step_buffer_keeps_what_is_not_written_and_sends_no_more_than_asked(gpu, lane):
    buffer = lane.step_buffer(32)
    at = buffer.device.data.ptr
    buffer.host[...] = 7
    buffer.send(32)
    buffer.host[:4] = 9
    buffer.host[8:] = 1
    before = gpu.counts.copy()
    buffer.send(8)
    assert gpu.counts - before == {"copies in": 1}
    assert lane.to_host(buffer.device).tolist() == [9] * 4 + [7] * 28
    buffer.send(32)
    assert lane.to_host(buffer.device).tolist() == [9] * 4 + [7] * 4 + [1] * 24
    assert buffer.device.data.ptr == at


def test_a_step_buffer_dropped_for_a_larger_one_arrives(lane):
    """Its copy is still on its way when the next buffer is made."""
    out = lane.zeros((2, 16), np.float32)
    for i, n_bytes in enumerate((64, 128)):
        buffer = lane.step_buffer(n_bytes)
        buffer.host[:64].view(np.float32)[...] = i + 1
        buffer.send(64)
        SCALE().launch((1,), (32,), (buffer.device[:64].view(np.float32), out[i], 16, 1.0))
    assert lane.to_host(out).tolist() == [[1.0] * 16, [2.0] * 16]


# --- weights

def load_ranges(lane, n_bytes, size, dtype=np.float32):
    """(array filled through buffers of n_bytes, what it should hold, [(begin, end, copies done at that time)])"""
    values = np.random.default_rng(size).standard_normal(size).astype(dtype)
    reads = []

    def read(begin, end, out):
        assert out.shape == (end - begin,) and out.dtype == dtype
        reads.append((begin, end, lane.stream._queue.n_run))
        out[...] = values[begin:end]
    with mock.patch.object(cuda_lane, "LOADING_BYTES", n_bytes), lane.loading() as fill:
        array = lane.empty((size,), dtype)
        fill(array, read)
    return array, values, reads


@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 32, 33, 100])
@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_loading_range_by_range(lane, size, dtype):
    n_bytes = 16 * np.dtype(dtype).itemsize
    array, values, reads = load_ranges(lane, n_bytes, size, dtype)
    np.testing.assert_array_equal(lane.to_host(array), values)
    assert [(begin, end) for begin, end, _ in reads] == [(at, min(at + 16, size)) for at in range(0, size, 16)]


def test_loading_reads_while_the_copy_before_is_on_its_way(lane):
    """Read k starts when copy k - 2 is done, out of whose buffer it came, and not later."""
    _, _, reads = load_ranges(lane, 64, 160)
    assert [n_done for _, _, n_done in reads] == [0, 0, 1, 2, 3, 4, 5, 6, 7, 8]


def test_loading_without_the_wait_gives_other_bytes(lane):
    with mock.patch.object(stand_in.Event, "synchronize", lambda self: None):
        array, values, _ = load_ranges(lane, 64, 160)
    assert (lane.to_host(array) != values).any()


def test_loading_takes_two_buffers_and_gives_them_back(gpu, lane):
    load_ranges(lane, 64, 160)
    assert gpu.counts["pinned allocations"] == 2
    assert not gpu._regions["pinned"]


def test_loading_that_fails_half_way_waits_for_its_copies(gpu, lane):
    array = lane.zeros((32,), np.float32)

    def read(begin, end, out):
        if begin:
            raise OSError("gone")
        out[...] = 1
    with mock.patch.object(cuda_lane, "LOADING_BYTES", 64), pytest.raises(OSError), lane.loading() as fill:
        fill(array, read)
    assert lane.to_host(array).tolist() == [1.0] * 16 + [0.0] * 16
    assert not gpu._regions["pinned"]


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_weights_are_those_of_the_emulated_lane(lane, tmp_path, family, dtype):
    """Every array, whatever the file's dtype and however small the buffers; progress counts every byte of the file."""
    path = tiny.write_checkpoint(tmp_path / "c", tiny.flat(family, tie_word_embeddings=False), dtype=dtype)
    spec, n_bytes = describe(Config.load(path)), []
    with Checkpoint.open(path) as checkpoint, mock.patch.object(cuda_lane, "LOADING_BYTES", 256):
        accounts = account(spec, checkpoint.tensors)
        expected = load(spec, checkpoint, accounts, HostLane("emulated", None, BF16), lambda n: None)
        got = load(spec, checkpoint, accounts, lane, n_bytes.append)
        assert sum(n_bytes) == checkpoint.n_bytes
    assert got.norm_offset == spec.norm_offset
    for target in targets(spec, untied_head=True):
        owner, _, name = target.name.rpartition(".")
        pair = [getattr(weights.layers[int(owner.split(".")[1])] if owner else weights, name)
                for weights in (got, expected)]
        np.testing.assert_array_equal(lane.to_host(pair[0]), pair[1])


def test_a_ring_of_one_lane_is_not_pinned_for_nothing(gpu, lane):
    """Two buffers a ring, whatever is sent through it."""
    ring = PinnedRing(lane, 16)
    target = lane.zeros((16,), np.uint8)
    for value in range(5):
        ring.take(16)[...] = value
        ring.send(target)
        assert lane.to_host(target).tolist() == [value] * 16
    assert gpu.counts["pinned allocations"] == 2
