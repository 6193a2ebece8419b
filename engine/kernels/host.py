"""The emulated lane's compiler and launcher: .cu files through g++, with cuda/emu/ in the place of a GPU.

Two builds of a kernel may live in one process: the plain one, and within checking() one whose every load and
store goes through the checker (cuda/emu/checker.cpp, kernels/checker.py), on copies of its arguments.
"""

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections import deque
from contextlib import contextmanager
from functools import cache, cached_property
from pathlib import Path
from typing import NamedTuple

from engine.errors import ConfigError, KernelError
from engine.kernels import checker

FLAGS = ("-std=c++17", "-O2", "-fPIC", "-shared", "-ffp-contract=off", "-fno-strict-aliasing", "-w", "-march=native",
         "-g1")
# A file's static shared memory is its own, whoever has the same template; a return address names the line that calls.
KERNEL_FLAGS = ("-fvisibility=hidden", "-fno-optimize-sibling-calls")
RUNTIME_FLAGS = ("-ftls-model=initial-exec", "-fno-semantic-interposition")
# g++'s thread sanitizer calls a hook at each access; the hooks are ours, so its library stays out. Loops are not turned
# into calls that no hook sees.
CHECK_FLAGS = ("-DEMU_CHECKED", "-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0",
               "--param=tsan-distinguish-volatile=1", "-fno-tree-loop-distribute-patterns", "-nostdlib")
LIBRARIES = ("-lstdc++", "-lm", "-lc", "-lgcc")
INSTALL = "install g++ with its C++17 headers (12 is tested; Debian: apt install g++; Fedora: dnf install gcc-c++)"
LINE_MARKER = re.compile(r'^#line (\d+) "([^"]*)"')
n_builds = 0                # how often g++ ran
asked = set()               # paths of the libraries that were asked for, compiled now or found in the cache
block_limit_s = 120.0       # CPU time after which a block counts as one that never ends
_checked = None             # within checking(): its deque


@contextmanager
def checking(on=True, most=None):
    """The context in which launches run under the checker: all of the process, because a launch says nothing of it.
    Yields a deque of the last `most` of them, or of all, as Checked."""
    global _checked
    former, _checked = _checked, deque(maxlen=most) if on else None
    try:
        yield _checked
    finally:
        _checked = former


class Checked(NamedTuple):
    """A launch that ran under the checker without an error."""

    build: object
    grid: tuple
    block: tuple
    smem_bytes: int
    traffic: checker.Traffic


def cache_folder():
    """RAWGEM_CACHE, else the user's cache folder; where that cannot be written, a folder for this process."""
    return _writable(os.environ.get("RAWGEM_CACHE")
                     or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rawgem")


@cache
def _writable(folder):
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        return Path(_process_folder().name)


@cache
def _process_folder():
    return tempfile.TemporaryDirectory(prefix="rawgem-")


@cache
def compiler():
    """(path, version text) of g++. Raises ConfigError."""
    path = shutil.which("g++")
    if path is None:
        raise ConfigError(f"device 'emulated' compiles its kernels with g++, which was not found; {INSTALL}")
    return path, subprocess.run([path, "--version"], capture_output=True, text=True).stdout


def build(name, text, flags=()):
    """The path of a shared library compiled from C++ `text` of file `name`, from the cache when it was compiled before.

    Raises KernelError with the log of g++, and the line it complains of.
    """
    global n_builds
    path, version = compiler()
    command = [path, *FLAGS, *flags]
    key = hashlib.sha256("\0".join([version, _cpu(), *command, text]).encode()).hexdigest()[:32]
    target = cache_folder() / "host" / f"{Path(name).stem}-{key}.so"
    asked.add(target)
    if target.exists():
        return target
    n_builds += 1
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        source, out = Path(scratch) / name, Path(scratch) / "out.so"
        source.write_text(text)
        result = subprocess.run([*command, f"-fdebug-prefix-map={scratch}=.", "-x", "c++", name, "-x", "none",
                                 "-o", out.name, *LIBRARIES],
                                cwd=scratch, env={**os.environ, "LC_ALL": "C"}, capture_output=True, text=True)
        if result.returncode:
            raise KernelError(f"{name} does not compile with g++ {' '.join(flags)}:\n{_complaint(text, result.stderr)}")
        os.replace(out, target)                             # whole or not at all, whoever else builds the same
    return target


def _complaint(text, log):
    """The log, below the source line of its first error."""
    error = re.search(r"^([^:\n]+):(\d+):(?:\d+:)? (?:fatal )?error", log, re.MULTILINE)
    file, number = "", 0
    for line in text.splitlines():
        if marker := LINE_MARKER.match(line):
            file, number = marker[2], int(marker[1])
            continue
        if error and (file, number) == (error[1], int(error[2])):
            return f"{file}:{number}: {line.strip()}\n{log}"
        number += 1
    return log


@cache
def _cpu():
    """What -march=native depends on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


@cache
def _emulator_text(file):
    """A file of cuda/emu/, with those it includes in their place."""
    from engine.kernels.source import folder
    lines = [f'#line 1 "emu/{file}"']
    for number, line in enumerate((folder() / "emu" / file).read_text().splitlines(), 2):
        include = re.match(r'#include "(.+)"', line)
        if include:
            lines += [_emulator_text(include[1]), f'#line {number} "emu/{file}"']
        else:
            lines.append("" if line == "#pragma once" else line)
    return "\n".join(lines)


def load_runtime(flags=()):
    """The emulator's machine. Raises ConfigError where g++ is missing or cannot compile it."""
    try:
        library = build("emulator.cpp", _emulator_text("runtime.cpp"), (*RUNTIME_FLAGS, *flags))
        return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    except KernelError as error:
        message = f"device 'emulated': the g++ of this machine does not compile the emulator; {INSTALL}\n{error}"
        raise ConfigError(message) from None


@cache
def runtime():
    """The machine of this process."""
    return load_runtime()


class Loaded(ctypes.Structure):
    """emu::Module"""

    _fields_ = [(name, ctypes.c_size_t) for name in ("begin", "end", "tls_module", "static_smem_bytes")]


class Report(ctypes.Structure):
    """emu::Report"""

    _fields_ = [("is_error", ctypes.c_uint), ("block", ctypes.c_uint * 3), ("pc", ctypes.c_uint64),
                ("other_pc", ctypes.c_uint64), ("address", ctypes.c_uint64), ("text", ctypes.c_char * 512)]


class Launch(ctypes.Structure):
    """emu::Launch"""

    _fields_ = [("run", ctypes.c_void_p), ("args", ctypes.c_void_p), ("module", ctypes.POINTER(Loaded)),
                ("grid", ctypes.c_uint * 3), ("dim", ctypes.c_uint * 3), ("smem_bytes", ctypes.c_uint64),
                ("n_workers", ctypes.c_uint), ("is_checked", ctypes.c_uint), ("time_limit_s", ctypes.c_double),
                ("segments", ctypes.c_void_p), ("n_segments", ctypes.c_uint)]


class Library:
    """A compiled kernel file."""

    def __init__(self, path, file, entry):
        self.path, self.file = path, file
        self.machine = runtime()
        library = ctypes.CDLL(str(path))
        self.run = ctypes.cast(getattr(library, f"{entry}__run"), ctypes.c_void_p)
        self.module = Loaded()
        self.machine.emu_module(self.run, ctypes.byref(self.module))

    def lines(self, offsets):
        """The line that each address in the file comes from: "rope.cu:40", "include/device.cuh:51 (rope.cu:40)"."""
        tool = shutil.which("addr2line")
        if tool is None:
            return [f"{self.path}+{offset:#x} (addr2line of binutils would name the line)" for offset in offsets]
        text = subprocess.run([tool, "-a", "-i", "-e", str(self.path), *(hex(offset) for offset in offsets)],
                              capture_output=True, text=True).stdout
        return [self._line(frames.split("\n")[1:]) for frames in re.split(r"^0x", text, flags=re.MULTILINE)[1:]]

    def _line(self, frames):
        """The innermost frame outside the emulator and its wrappers, and the .cu line that it was inlined into."""
        frames = [re.sub(r" \(discriminator \d+\)$", "", frame).replace("./", "") for frame in frames if frame]
        frames = [frame for frame in frames if not frame.startswith(("emu/", "include/mma.cuh"))] or frames
        own = Path(self.file).name + ":"                    # some g++ have this one without its folder
        frames = [frame.replace(own, f"{self.file}:") if frame.startswith(own) else frame for frame in frames]
        outer = next((frame for frame in frames if ".cuh:" not in frame), frames[0])
        return frames[0] if outer == frames[0] else f"{frames[0]} ({outer})"


class Module:
    """A Build on the host: compiled when first launched, loaded for the life of the process."""

    def __init__(self, built):
        self.built, self.entry, self.params = built, built.entry, built.params
        glue = "\n".join(f'extern "C" __attribute__((visibility("default"), no_sanitize("thread")))\n'
                         f"void {entry}__run(void** args) {{ emu::call({entry}, args); }}"
                         for entry in built.source.entries)
        self._text = f'{_emulator_text("emu.h")}\n{built.source.text}\n#line 1 "glue"\n{glue}\n'
        self._file = built.source.file
        self._flags = (*KERNEL_FLAGS, *(f"-D{name}={value}" for name, value in built.constants.items()))

    @cached_property
    def plain(self):
        return Library(build(Path(self._file).name, self._text, self._flags), self._file, self.entry)

    @cached_property
    def checked(self):
        return Library(build(Path(self._file).name, self._text, (*self._flags, *CHECK_FLAGS)), self._file, self.entry)

    def launch(self, grid, block, packed, args, smem):
        """Runs the kernel and waits for it. Raises KernelError with what the emulator found wrong."""
        if _checked is None:
            self._run(self.plain, grid, block, packed, smem)
            return
        with checker.watched(self.checked, self.params, packed, args) as watch:
            self._run(self.checked, grid, block, watch.packed, smem, watch)
        _checked.append(Checked(self.built, grid, block, smem, watch.counted))

    def _run(self, library, grid, block, packed, smem, watch=None):
        pointers = (ctypes.c_void_p * len(packed))(*(ctypes.addressof(value) for value in packed))
        launch = Launch(library.run, ctypes.addressof(pointers), ctypes.pointer(library.module), tuple(grid),
                        tuple(block), smem, _n_workers(), watch is not None, block_limit_s)
        if watch:
            launch.segments, launch.n_segments = ctypes.addressof(watch.segments), len(watch.segments)
        report = Report()
        library.machine.emu_launch(ctypes.byref(launch), ctypes.byref(report))
        if report.is_error:
            raise KernelError(f"{self.entry}, grid {grid}, block {block}"
                              + (f", in block {tuple(report.block)}" if report.is_error == 1 else "")
                              + f": {self._message(library, report, watch)}")

    @staticmethod
    def _message(library, report, watch):
        text = report.text.decode()
        for name, pc in (("{at}", report.pc), ("{other}", report.other_pc)):
            if name in text:
                module = library.module
                is_inside = module.begin < pc <= module.end
                text = text.replace(name, library.lines([pc - 1 - module.begin])[0] if is_inside else "an unknown line")
        return text.replace("{address}", watch.describe(report.address) if watch else f"address {report.address:#x}")


def _n_workers():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
