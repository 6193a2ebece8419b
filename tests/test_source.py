"""engine/kernels/source.py and device.py: a .cu file read, its signatures, what a launch accepts, and cubins of it."""

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest

from engine.errors import ConfigError, KernelError, ShapeError
from engine.kernels import device, host, source
from engine.kernels.source import BF16, Kernel, Param, Source, pack

FILL = """
#include "device.cuh"
// extern "C" __global__ void not_this(int a)
template <class T> __device__ T twice(T x) { return x + x; }

extern "C" __global__ void __launch_bounds__(THREADS, (1 + 1)) fill(OUT int* y, int n,   // a comment, with a comma
                                                       int value) {
    const int i = blockIdx.x * THREADS + threadIdx.x;
    if (i < n) y[i] = twice(value);
}
/* extern "C" __global__ void nor_this(int a) */
extern "C" __global__ __launch_bounds__(THREADS) void all_types(
    const bf16* __restrict__ a, const float *b, int* c, OUT u32* d, const u8* e, const bool* f, i64* g, const u64* h,
    const void* i, int j, const u32 k, float l, i64 m, u64 n, bool o) {}
extern "C" __global__ void nothing() {}
"""


@pytest.fixture
def write(tmp_path):
    """write(text, name) puts a .cu file where Kernel takes it by its absolute path."""
    def write(text, name="given.cu"):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)
    return write


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A folder of CUDA sources in the place of ours: tree("include/a.cuh", text)."""
    monkeypatch.setattr(source, "folder", lambda: tmp_path)

    def tree(name, text):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tree


# --- reading a file

def test_signatures_are_read_through_comments_newlines_templates_and_launch_bounds(write):
    entries = Source(write(FILL)).entries
    assert list(entries) == ["fill", "all_types", "nothing"]
    assert entries["fill"] == (Param("y", "int", True, "write"), Param("n", "int", False, "read"),
                               Param("value", "int", False, "read"))
    assert " ".join(param.type for param in entries["all_types"]) == (
        "bf16 float int u32 u8 bool i64 u64 void int u32 float i64 u64 bool")
    assert [param.access for param in entries["all_types"]][:9] == [
        "read", "read", "update", "write", "read", "read", "update", "read", "read"]
    assert entries["nothing"] == ()


@pytest.mark.parametrize("text", ["double x", "short* x", "bf16 x", "const float** x", "const float x[4]", "float&x",
                                  "unsigned int n", "void x", "int"])
def test_a_parameter_type_that_is_none_of_ours_is_named(write, text):
    with pytest.raises(AssertionError) as raised:
        Source(write(f'extern "C" __global__ void k(int a, {text}) {{}}'))
    assert text in str(raised.value) and "i64" in str(raised.value)


def test_headers_are_inlined_once_and_lines_keep_their_numbers(tree):
    tree("include/a.cuh", "#pragma once\nint a;\n#include \"b.cuh\"\nint after_b;")
    tree("include/b.cuh", "#pragma once\n#include \"a.cuh\"\nint b;\n")               # a cycle
    tree("k.cu", "// one\n  #  include \"b.cuh\"\n#include \"a.cuh\"\nint main_line_4;\n#include <not_ours>\n")
    assert Source("k.cu").text.splitlines() == [
        '#line 1 "k.cu"', "// one", '#line 1 "include/b.cuh"', "", '#line 1 "include/a.cuh"', "", "int a;",
        '#line 4 "include/a.cuh"', "int after_b;", '#line 3 "include/b.cuh"', "int b;", '#line 3 "k.cu"',
        '#line 4 "k.cu"', "int main_line_4;", "#include <not_ours>"]


def test_an_include_that_is_not_there_is_named_with_its_line(tree):
    tree("include/a.cuh", "\n#include \"gone.cuh\"\n")
    tree("k.cu", "#include \"a.cuh\"\n")
    with pytest.raises(KernelError, match=r"include/a\.cuh, line 2 includes 'gone\.cuh'"):
        Source("k.cu")


def test_a_file_that_is_not_there_is_named():
    with pytest.raises(KernelError, match=r"no kernel file .*cuda/none\.cu"):
        Source("none.cu")


def test_an_entry_that_is_not_there_lists_those_that_are(write):
    with pytest.raises(AssertionError, match="no kernel fil, only fill, all_types, nothing"):
        Kernel(write(FILL), "fil")(THREADS=32)


def test_a_build_is_made_once_for_its_constants(write):
    kernel = Kernel(write(FILL), "fill")
    assert kernel(A=1, B=2) is kernel(B=2, A=1) is not kernel(A=2, B=1)
    assert repr(kernel(A=1, B=2)) == "fill(A=1, B=2)"


def test_every_file_of_ours_reads():
    files = sorted(source.folder().glob("*.cu"))
    assert files and all(Source.load(file.name).entries for file in files)


# --- what a launch accepts

def one(text, value):
    """Packs one argument for a parameter written as `text`."""
    return pack("k", (Param.parse(text),), (value,))[0][0].value


def test_arguments_reach_the_kernel_on_the_emulated_lane(write):
    y = np.zeros(100, np.int32)
    Kernel(write(FILL), "fill")(THREADS=32).launch((4,), (32,), (y, 90, 21))
    assert (y[:90] == 42).all() and not y[90:].any()


def test_the_count_of_arguments_is_checked(write):
    with pytest.raises(ShapeError, match="fill: 2 arguments, expected 3: y, n, value"):
        Kernel(write(FILL), "fill")(THREADS=32).launch((1,), (32,), (np.zeros(1, np.int32), 1))


def test_an_empty_grid_does_nothing_but_check(write):
    kernel = Kernel(write("this does not compile\n" + FILL), "fill")(THREADS=32)
    kernel.launch((0,), (32,), (np.zeros(0, np.int32), 0, 1))
    kernel.launch((3, 0), (32,), (np.zeros(0, np.int32), 0, 1))
    with pytest.raises(ShapeError):
        kernel.launch((0,), (32,), (np.zeros(0, np.int64), 0, 1))


@pytest.mark.parametrize("text, value", [
    ("int n", 2**31), ("int n", -2**31 - 1), ("u32 n", -1), ("u32 n", 2**32), ("i64 n", 2**63), ("u64 n", -1),
    ("u64 n", 2**64), ("bool n", 2), ("int n", 1.0), ("int n", np.float32(1)), ("int n", None), ("int n", "1"),
    ("bool n", 1.0), ("float n", None), ("float n", "1"), ("float n", 1j), ("int n", np.array(1)),
    ("float n", np.zeros(1, np.float32)), ("int n", np.int64(2**31))])
def test_a_number_that_does_not_fit_is_refused(text, value):
    with pytest.raises(ShapeError, match=r"k: n is .*, expected an? "):
        one(text, value)


@pytest.mark.parametrize("text, value", [
    ("int n", -2**31), ("int n", 2**31 - 1), ("u32 n", 2**32 - 1), ("i64 n", -2**63), ("u64 n", 2**64 - 1),
    ("bool n", True), ("bool n", np.True_), ("bool n", 0), ("int n", np.int64(7)), ("u64 n", np.uint64(2**64 - 1)),
    ("float n", 0.5), ("float n", 3), ("float n", np.float32(0.5)), ("float n", np.int32(-2)), ("float n", np.inf)])
def test_a_number_that_fits_is_passed_as_it_is(text, value):
    assert one(text, value) == value


def test_a_float_may_be_nan():
    assert np.isnan(one("float x", float("nan")))


@pytest.mark.parametrize("text, dtype", [("float* x", np.float64), ("bf16* x", np.float16), ("bf16* x", np.uint16),
                                         ("int* x", np.int64), ("const u8* x", np.int8), ("i64* x", np.uint64),
                                         ("bool* x", np.uint8), ("u32* x", np.int32)])
def test_a_pointer_takes_its_dtype_only(text, dtype):
    with pytest.raises(ShapeError, match=rf"k: x is \[2, 3\] {np.dtype(dtype)}, expected"):
        one(text, np.zeros((2, 3), dtype))


def test_a_void_pointer_takes_any_dtype():
    for dtype in (np.int8, np.float64, BF16):
        assert one("void* x", array := np.zeros(3, dtype)) == array.ctypes.data


def test_an_array_is_passed_by_the_address_of_its_first_element():
    x = np.zeros((4, 3), np.float32)
    assert one("const float* x", x[2:]) == x.ctypes.data + 24
    x.flags.writeable = False
    assert one("const float* x", x) == x.ctypes.data


def test_none_is_a_null_pointer_and_no_number():
    assert one("float* x", None) is None
    with pytest.raises(ShapeError, match="x is None"):
        one("float x", None)


@pytest.mark.parametrize("array", [np.zeros((4, 6), np.float32)[:, :3], np.zeros((4, 6), np.float32).T,
                                   np.zeros(6, np.float32)[::2], np.zeros(6, np.float32)[::-1]])
def test_a_strided_array_is_refused(array):
    with pytest.raises(ShapeError, match=r"k: x \[.*\] has strides \(.*\), expected a C-contiguous array"):
        one("float* x", array)


@pytest.mark.parametrize("array", [np.zeros((), np.float32), np.zeros(0, np.float32), np.zeros((3, 0), np.float32),
                                   np.zeros((0, 6), np.float32)[:, :3], np.zeros((1, 6), np.float32)[:, :6]])
def test_arrays_with_no_dimension_or_no_element_are_arrays(array):
    one("float* x", array)


@pytest.mark.parametrize("value", [5, 0.5, [1.0], "x"])
def test_what_is_no_array_is_no_pointer(value):
    with pytest.raises(ShapeError, match="expected an array of float32, or None"):
        one("float* x", value)


class OnGpu:
    """As much of a CuPy array as packing looks at. To read the interface itself would be slow, and may wait."""

    __cuda_array_interface__ = property(lambda self: pytest.fail("read"))
    dtype, shape, flags, data = np.dtype(np.float32), (3,), np.zeros(3).flags, SimpleNamespace(ptr=0x7000)


def test_arrays_on_the_gpu_and_on_the_host_do_not_mix():
    params = tuple(map(Param.parse, ("float* a", "int n", "float* b", "float* c")))
    packed, is_on_device = pack("k", params, (OnGpu(), 1, None, OnGpu()))
    assert is_on_device and [value.value for value in packed] == [0x7000, 1, None, 0x7000]
    with pytest.raises(ShapeError, match="k: c is on the host, the arrays before it on the GPU"):
        pack("k", params, (OnGpu(), 1, None, np.zeros(3, np.float32)))


def test_a_kernel_with_no_array_runs_on_the_host(write):
    Kernel(write(FILL), "nothing")(THREADS=32).launch((1,), (32,), ())


# --- compiling for the host

def test_an_error_of_the_host_compiler_names_file_line_and_constants(write):
    kernel = Kernel(write("\n\n" + FILL.replace("twice(value)", "thrice(value)")), "fill")(THREADS=32)
    with pytest.raises(KernelError) as raised:
        kernel.launch((1,), (32,), (np.zeros(1, np.int32), 1, 1))
    assert "given.cu:11" in str(raised.value) and "thrice" in str(raised.value) and "THREADS=32" in str(raised.value)


def test_without_a_host_compiler_the_error_says_what_to_install(write, monkeypatch):
    monkeypatch.setenv("PATH", "")
    host.compiler.cache_clear()
    try:
        with pytest.raises(ConfigError, match=r"'emulated' .* g\+\+, which was not found; install g\+\+"):
            host.compiler()
    finally:
        host.compiler.cache_clear()


# --- compiling for a GPU, with none at hand

def test_a_cubin_is_compiled_once_and_its_log_kept(write, tmp_path, monkeypatch):
    monkeypatch.setenv("RAWGEM_CACHE", str(tmp_path / "cache"))
    given = Source(write(FILL))
    path = device.build(given, {"THREADS": 64}, "sm_90a")
    assert path.read_bytes().startswith(b"\x7fELF") and path.parent == tmp_path / "cache" / "cuda"
    log = path.with_suffix(".log").read_text()
    assert "entry function 'fill' for 'sm_90a'" in log and "registers" in log
    monkeypatch.setattr(device.Nvrtc, "compile", lambda *_: pytest.fail("compiled again"))
    assert device.build(given, {"THREADS": 64}, "sm_90a") == path
    assert device.compile_cubin(given, {"THREADS": 64}, "sm_90a") == path.read_bytes()
    assert sorted(file.suffix for file in path.parent.iterdir()) == [".cubin", ".log"]      # nothing half-written


@pytest.mark.parametrize("change", [{"constants": {"THREADS": 128}}, {"arch": "sm_80"}, {"text": FILL + "\n// more\n"}])
def test_a_cubin_is_keyed_by_text_constants_and_architecture(write, tmp_path, monkeypatch, change):
    monkeypatch.setenv("RAWGEM_CACHE", str(tmp_path / "cache"))
    kept = {"text": FILL, "constants": {"THREADS": 64}, "arch": "sm_90a"}
    paths = {device.build(Source(write(a["text"])), a["constants"], a["arch"]) for a in (kept, {**kept, **change})}
    assert len(paths) == 2


def test_an_error_of_nvrtc_names_file_line_options_and_log(write, tmp_path, monkeypatch):
    monkeypatch.setenv("RAWGEM_CACHE", str(tmp_path / "cache"))
    with pytest.raises(KernelError) as raised:
        device.build(Source(write(FILL.replace("twice(value)", "thrice(value)"))), {"THREADS": 64}, "sm_80")
    assert all(word in str(raised.value) for word in ("given.cu(9)", "thrice", "-DTHREADS=64", "sm_80"))
    assert not (tmp_path / "cache" / "cuda").exists()


def test_where_there_is_no_nvrtc_the_error_names_the_wheel(monkeypatch):
    def missing(name):
        raise OSError(name)
    monkeypatch.setattr(device.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(device.ctypes, "CDLL", missing)
    device.nvrtc.cache_clear()
    try:
        with pytest.raises(ConfigError, match="pip install nvidia-cuda-nvrtc-cu12"):
            device.nvrtc()
    finally:
        device.nvrtc.cache_clear()


@pytest.mark.parametrize("name, folder", [("libnvrtc.so.12", "cuda_nvrtc/lib"), ("libnvrtc.so.13", "cu13/lib")])
def test_nvrtc_of_a_wheel_finds_the_part_that_lies_beside_it(tmp_path, monkeypatch, name, folder):
    """NVRTC 13 opens its builtins by name alone, when it compiles: they must be loaded before."""
    wheel, loaded = tmp_path / folder, []
    wheel.mkdir(parents=True)
    for file in (name, "libnvrtc-builtins.so.13.0"):
        (wheel / file).touch()

    def load(path):
        if not Path(path).is_file():
            raise OSError(path)
        loaded.append(path)
        return MagicMock(nvrtcVersion=lambda *version: 0)
    monkeypatch.setattr(device.importlib.util, "find_spec",
                        lambda name: SimpleNamespace(submodule_search_locations=[str(tmp_path)]))
    monkeypatch.setattr(device.ctypes, "CDLL", load)
    device.nvrtc.cache_clear()
    try:
        device.nvrtc()
    finally:
        device.nvrtc.cache_clear()
    assert loaded == [str(wheel / "libnvrtc-builtins.so.13.0"), str(wheel / name)]


def test_compiling_for_a_gpu_imports_no_cupy():
    code = "import sys; from engine.kernels import device; device.nvrtc(); assert 'cupy' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=source.folder().parent).returncode == 0


# --- launching on a GPU: with the driver's part recorded

class Recorder:
    """The functions of device.py that touch a GPU."""

    def __init__(self, monkeypatch, capability="90"):
        self.calls = []
        for name in ("load_function", "allow_smem", "launch_function"):
            monkeypatch.setattr(device, name, lambda *args, name=name: self.calls.append((name, *args)) or name)
        monkeypatch.setattr(device, "compile_cubin", lambda src, constants, arch: (constants, arch))
        monkeypatch.setattr(device, "current", lambda: self.index)
        monkeypatch.setattr(device, "current_stream", lambda: 0x51)
        gpu = SimpleNamespace(compute_capability=capability)
        cupy = SimpleNamespace(cuda=SimpleNamespace(Device=lambda index: gpu))
        monkeypatch.setattr(device, "_cupy", lambda: cupy)
        self.index = 0


def test_a_launch_on_the_gpu_loads_once_and_passes_what_was_packed(write, monkeypatch):
    gpu = Recorder(monkeypatch)
    seen = []
    monkeypatch.setattr(device, "launch_function", lambda *args: seen.append(
        (*args[:-1], ctypes.cast((ctypes.c_void_p * 2).from_address(args[-1])[1], ctypes.POINTER(ctypes.c_int))[0])))
    build = Kernel(write('extern "C" __global__ void k(float* x, int n) {}'), "k")(THREADS=64)
    for smem in (0, 1000, 70_000, 60_000):
        build.launch((3, 2), (64,), (OnGpu(), -7), smem=smem)
    gpu.index = 1
    build.launch((1,), (64,), (OnGpu(), 8))
    assert seen == [("load_function", (3, 2, 1), (64, 1, 1), smem, 0x51, -7) for smem in (0, 1000, 70_000, 60_000)] + [
        ("load_function", (1, 1, 1), (64, 1, 1), 0, 0x51, 8)]
    load = ("load_function", ({"THREADS": 64}, "sm_90a"), "k")
    assert gpu.calls == [load, ("allow_smem", "load_function", 1000), ("allow_smem", "load_function", 70_000), load]


@pytest.mark.parametrize("capability, arch", [("80", "sm_80"), ("89", "sm_89"), ("90", "sm_90a"), ("100", "sm_100a"),
                                              ("120", "sm_120")])
def test_a_gpu_gets_its_own_architecture(monkeypatch, capability, arch):
    Recorder(monkeypatch, capability)
    assert device.arch_of(0) == arch


def test_what_the_driver_refuses_is_a_kernel_error_with_the_launch(write, monkeypatch):
    Recorder(monkeypatch)

    def refuses(*args):
        raise RuntimeError("CUDA_ERROR_INVALID_VALUE: invalid argument")
    monkeypatch.setattr(device, "launch_function", refuses)
    build = Kernel(write('extern "C" __global__ void k(float* x, int n) {}'), "k")()
    with pytest.raises(KernelError, match=r"k, grid \(1, 1, 1\), block \(2048, 1, 1\), 9 bytes of .*: CUDA_ERROR_INV"):
        build.launch((1,), (2048,), (OnGpu(), 8), smem=9)


def test_cupy_has_what_is_called_of_it():
    """By name and signature, as far as that shows with no GPU."""
    cupy = pytest.importorskip("cupy")
    from cupy_backends.cuda.api import driver
    assert "intptr_t stream, intptr_t kernel_params, intptr_t extra)" in driver.launchKernel.__doc__
    assert driver.funcSetAttribute.__doc__.startswith("funcSetAttribute(intptr_t f, int attribute, int value)")
    assert driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES == device.MAX_DYNAMIC_SMEM
    assert issubclass(driver.CUDADriverError, RuntimeError)
    assert hasattr(cupy.cuda.function.Function, "ptr") and hasattr(cupy.cuda.function.Module, "get_function")
    assert hasattr(cupy.cuda.Device, "compute_capability") and hasattr(cupy.ndarray, "__cuda_array_interface__")
    assert hasattr(cupy.cuda.runtime, "getDevice") and cupy.cuda.Stream.null.ptr == 0


def test_a_machine_that_runs_these_tests_has_a_compiler():
    """`make test` fails without g++; it never skips the kernels."""
    assert shutil.which("g++"), "install g++: the kernels' tests run on the emulated lane"
