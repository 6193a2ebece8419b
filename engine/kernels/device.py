"""The cuda lane's compiler and launcher: .cu files through NVRTC to cubins, which CuPy's driver calls load and launch.

We call NVRTC ourselves: CuPy's compiler names its own architecture (sm_90, which refuses Hopper's own instructions),
always flushes subnormals, and has a cache key that does not see included files. Compiling needs neither CuPy nor a GPU.
"""

import ctypes
import hashlib
import importlib.util
import os
import tempfile
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from engine.errors import ConfigError, KernelError
from engine.kernels import host

OPTIONS = ("-std=c++17", "--ptxas-options=-v")
LIBRARIES = {"libnvrtc.so.12": "cuda_nvrtc/lib", "libnvrtc.so.13": "cu13/lib"}     # {name: where in a wheel's nvidia/}
OWN_INSTRUCTIONS = ("90", "100")        # compute capabilities whose tensor cores are reached by their own instructions
MAX_DYNAMIC_SMEM = 8                    # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


class Nvrtc:
    """NVIDIA's runtime compiler, as far as a cubin needs it. `version` is (major, minor)."""

    def __init__(self, library):
        self._library = library
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        self.version = major.value, minor.value

    def _call(self, function, *args):
        code = getattr(self._library, function)(*args)
        assert code == 0, f"{function}: {self._library.nvrtcGetErrorString(code).decode()}"

    def compile(self, text, name, options):
        """(cubin or None where the text does not compile, log). Lets other threads run meanwhile."""
        program = ctypes.c_void_p()
        self._call("nvrtcCreateProgram", ctypes.byref(program), text.encode(), name.encode(), 0, None, None)
        try:
            flags = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
            failed = self._library.nvrtcCompileProgram(program, len(options), flags)
            log = self._bytes(program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
            return (None if failed else self._bytes(program, "CUBIN")), log
        finally:
            self._call("nvrtcDestroyProgram", ctypes.byref(program))

    def _bytes(self, program, what):
        size = ctypes.c_size_t()
        self._call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
        data = ctypes.create_string_buffer(size.value)
        self._call(f"nvrtcGet{what}", program, data)
        return data.raw


@lru_cache(maxsize=1)
def nvrtc():
    """NVRTC of a pip wheel, else of the system; 12 before 13, whose cubins need a newer driver. Raises ConfigError."""
    wheels = importlib.util.find_spec("nvidia")
    for name, folder in LIBRARIES.items():
        found = [str(path) for root in (wheels.submodule_search_locations if wheels else ())
                 if (path := Path(root) / folder / name).is_file()]
        with suppress(OSError):                             # else where the system's loader finds it
            for builtins in Path(found[0]).parent.glob("libnvrtc-builtins.so.*") if found else ():
                ctypes.CDLL(str(builtins))                  # NVRTC opens it by name, and a wheel of 13 tells it no path
            return Nvrtc(ctypes.CDLL((*found, name)[0]))
    raise ConfigError("device 'cuda' compiles its kernels with NVRTC, which was not found; `pip install "
                      "nvidia-cuda-nvrtc-cu12` brings it, or the CUDA toolkit 12 or 13")


def build(source, constants, arch):
    """The path of a cubin of a Source with `constants` for `arch` (sm_90a), from the cache when the same was compiled
    before; what ptxas said lies beside it, with the suffix .log. Raises KernelError when it does not compile."""
    compiler = nvrtc()
    options = (f"--gpu-architecture={arch}", *OPTIONS, *(f"-D{name}={value}" for name, value in constants.items()))
    key = hashlib.sha256("\0".join([str(compiler.version), *options, source.text]).encode()).hexdigest()[:32]
    target = host.cache_folder() / "cuda" / f"{Path(source.file).stem}-{arch}-{key}.cubin"
    if target.exists():
        return target
    cubin, log = compiler.compile(source.text, str(source.file), options)
    if cubin is None:
        raise KernelError(f"{source.file} does not compile with NVRTC {' '.join(options)}:\n{log}")
    target.parent.mkdir(parents=True, exist_ok=True)
    _install(target.with_suffix(".log"), log.encode())
    _install(target, cubin)                                 # last: where it is, its log is
    return target


def _install(target, data):
    """Whole or not at all, whoever else writes the same."""
    with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as file:
        file.write(data)
    os.replace(file.name, target)


# --- What touches the GPU. The functions below are looked up in this module at every call, so that tests can stand in.

def compile_cubin(source, constants, arch):
    """The cubin of a Source as bytes."""
    return build(source, constants, arch).read_bytes()


def current():
    """The number of the GPU that this thread launches on."""
    return _cupy().cuda.runtime.getDevice()


def arch_of(index):
    """sm_80, sm_90a, ... of a GPU."""
    capability = _cupy().cuda.Device(index).compute_capability      # "90"
    return f"sm_{capability}{'a' if capability in OWN_INSTRUCTIONS else ''}"


def load_function(cubin, entry):
    """A kernel of a cubin on the current GPU, as CuPy's Function; the module lives as long as it."""
    module = _cupy().cuda.function.Module()
    module.load(cubin)
    return module.get_function(entry)


def allow_smem(handle, n_bytes):
    """Lets a kernel be launched with that much dynamic shared memory, which above 48 KB it must be told."""
    _driver().funcSetAttribute(handle.ptr, MAX_DYNAMIC_SMEM, n_bytes)


def current_stream():
    """The address of the stream that CuPy launches on."""
    return _cupy().cuda.get_current_stream().ptr


def launch_function(handle, grid, block, smem, stream_ptr, params_address):
    """Starts a kernel; params_address is that of an array of its arguments' addresses, read before this returns."""
    _driver().launchKernel(handle.ptr, *grid, *block, smem, stream_ptr, params_address, 0)


@lru_cache(maxsize=1)
def _cupy():
    """Imported late: the other lanes do without."""
    import cupy
    return cupy


@lru_cache(maxsize=1)
def _driver():
    from cupy_backends.cuda.api import driver
    return driver


class Module:
    """A Build on a GPU: compiled and loaded when made, for the life of the process."""

    def __init__(self, built, index):
        self.entry = built.entry
        self._handle = load_function(compile_cubin(built.source, built.constants, arch_of(index)), built.entry)
        self._smem = 0                                      # what allow_smem was told

    def launch(self, grid, block, packed, args, smem):
        """Starts the kernel on the current stream. Raises KernelError for what the driver refuses."""
        pointers = (ctypes.c_void_p * len(packed))(*map(ctypes.addressof, packed))
        try:
            if smem > self._smem:
                allow_smem(self._handle, smem)
                self._smem = smem
            launch_function(self._handle, grid, block, smem, current_stream(), ctypes.addressof(pointers))
        except RuntimeError as error:
            raise KernelError(f"{self.entry}, grid {grid}, block {block}, {smem} bytes of dynamic shared memory: "
                              f"{error}") from error
