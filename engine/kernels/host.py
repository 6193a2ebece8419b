"""The emulated lane's compiler and launcher: .cu files through g++, with cuda/emu/ in the place of a GPU."""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

from engine.errors import ConfigError, KernelError

FLAGS = ("-std=c++17", "-O2", "-fPIC", "-shared", "-ffp-contract=off", "-fno-strict-aliasing", "-w", "-march=native")
ERROR_BYTES = 1024
n_builds = 0                # how often g++ ran


def cache_folder():
    """RAWGEM_CACHE, else the user's cache folder."""
    base = os.environ.get("RAWGEM_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rawgem"
    return Path(base)


@lru_cache(maxsize=1)
def compiler():
    """(path, version text) of g++. Raises ConfigError."""
    path = shutil.which("g++")
    if path is None:
        raise ConfigError("device 'emulated' compiles its kernels with g++, which was not found; install g++ (Debian: "
                          "apt install g++; Fedora: dnf install gcc-c++)")
    return path, subprocess.run([path, "--version"], capture_output=True, text=True).stdout


def build(name, text, flags=()):
    """The path of a shared library compiled from C++ `text`, from the cache when the same was compiled before."""
    global n_builds
    path, version = compiler()
    key = hashlib.sha256("\0".join([version, _cpu(), *FLAGS, *flags, text]).encode()).hexdigest()[:32]
    target = cache_folder() / "host" / f"{name}-{key}.so"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    n_builds += 1
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        source, out = Path(scratch) / f"{name}.cpp", Path(scratch) / "out.so"
        source.write_text(text)
        result = subprocess.run([path, *FLAGS, *flags, str(source), "-o", str(out)], capture_output=True, text=True)
        if result.returncode:
            raise KernelError(f"{name} does not compile with g++ {' '.join(flags)}:\n{result.stderr}")
        os.replace(out, target)                             # whole or not at all, whoever else builds the same
    return target


@lru_cache(maxsize=1)
def _cpu():
    """What -march=native depends on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ()
    return next((line for line in lines if line.startswith("flags")), "")


@lru_cache(maxsize=1)
def emulator_header():
    from engine.kernels.source import folder
    return (folder() / "emu" / "emu.h").read_text().replace("#pragma once", "")


@lru_cache(maxsize=1)
def runtime():
    """The emulator's machine, loaded once a process."""
    from engine.kernels.source import folder
    text = (folder() / "emu" / "runtime.cpp").read_text().replace('#include "emu.h"', emulator_header())
    return ctypes.CDLL(str(build("emulator", text)), mode=ctypes.RTLD_GLOBAL)


class Module:
    """A Build on the host: compiled when made, loaded for the life of the process."""

    def __init__(self, built):
        self.entry, self.params = built.entry, built.params
        machine = runtime()
        defines = [f"-D{name}={value}" for name, value in built.constants.items()]
        glue = "\n".join(f'extern "C" void {entry}__run(void** args) {{ emu::call({entry}, args); }}'
                         for entry in built.source.entries)
        text = f"{emulator_header()}\n{built.source.text}\n#line 1 \"glue\"\n{glue}\n"
        library = ctypes.CDLL(str(build(Path(built.source.file).stem, text, tuple(defines))))
        self._run = ctypes.cast(getattr(library, f"{built.entry}__run"), ctypes.c_void_p)
        self._launch = machine.emu_launch

    def launch(self, grid, block, packed, args, smem):
        """Runs the kernel and waits for it. Raises KernelError with what the emulator found wrong."""
        pointers = (ctypes.c_void_p * len(packed))(*(ctypes.addressof(value) for value in packed))
        error = ctypes.create_string_buffer(ERROR_BYTES)
        failed = self._launch(self._run, pointers, (ctypes.c_uint * 3)(*grid), (ctypes.c_uint * 3)(*block),
                              ctypes.c_size_t(smem), ctypes.c_uint(os.cpu_count() or 1), error,
                              ctypes.c_size_t(ERROR_BYTES))
        if failed:
            raise KernelError(f"{self.entry}, grid {grid}, block {block}: {error.value.decode()}")
