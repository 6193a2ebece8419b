"""Kernel: one `extern "C"` entry of a .cu file, compiled once for each set of constants, launched on either lane.

The lane follows the arrays: NumPy memory runs on the emulated lane (g++, kernels/host.py), CuPy memory on the GPU
(NVRTC, kernels/device.py). Arguments are checked against the kernel's own signature before anything runs.
"""

import ctypes
import re
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import ml_dtypes
import numpy as np

from engine.errors import ShapeError
from engine.kernels import host

BF16 = np.dtype(ml_dtypes.bfloat16)
POINTEES = {"bf16": BF16, "float": np.dtype(np.float32), "int": np.dtype(np.int32), "u32": np.dtype(np.uint32),
            "u8": np.dtype(np.uint8), "bool": np.dtype(bool), "i64": np.dtype(np.int64), "u64": np.dtype(np.uint64),
            "void": None}
SCALARS = {"int": ctypes.c_int32, "u32": ctypes.c_uint32, "float": ctypes.c_float, "i64": ctypes.c_int64,
           "u64": ctypes.c_uint64, "bool": ctypes.c_bool}
RANGES = {"int": (-2**31, 2**31), "u32": (0, 2**32), "i64": (-2**63, 2**63), "u64": (0, 2**64), "bool": (0, 2)}
ENTRY = re.compile(r'extern\s+"C"\s+__global__\s+void\s+(?:__launch_bounds__\([^()]*(?:\([^()]*\)[^()]*)*\)\s*)?'
                   r"(\w+)\s*\(([^)]*)\)")
INCLUDE = re.compile(r'^\s*#include\s+"([^"]+)".*$')
PARAM = re.compile(r"(OUT\s+)?(const\s+)?(\w+)\s*(\*)?\s*(?:__restrict__\s*)?(\w+)$")


def folder():
    """Where the CUDA sources are: in the installed package, else beside it (an editable install, a bare checkout)."""
    package = Path(__file__).resolve().parent.parent
    return package / "cuda" if (package / "cuda").is_dir() else package.parent / "cuda"


@dataclass(frozen=True)
class Param:
    """One parameter of a kernel.

    type        bf16, float, int, u32, u8, bool, i64, u64 or void
    is_pointer  an array, or None for a null pointer
    access      "read" (const), "write" (OUT: written before it is read), or "update"
    """

    name: str
    type: str
    is_pointer: bool
    access: str

    @classmethod
    def parse(cls, text):
        text = " ".join(text.split())
        match = PARAM.match(text)
        if not match or (match[3] not in (POINTEES if match[4] else SCALARS)):
            raise AssertionError(f"parameter {text!r}: expected [OUT|const] type[*] name, of a type in "
                                 f"{', '.join(POINTEES)}")
        is_out, is_const, kind, star, name = match.groups()
        return cls(name, kind, bool(star), "read" if is_const or not star else "write" if is_out else "update")


class Source:
    """One .cu file with our headers inlined, so that whoever keys on the text sees them.

    text     what is compiled; #line directives keep file names and line numbers true
    entries  {kernel name: its Params}
    """

    def __init__(self, file):
        self.file = file
        self.text = "\n".join(_inlined(folder() / file, file, set()))
        plain = re.sub(r"//[^\n]*", "", self.text)
        self.entries = {name: tuple(Param.parse(p) for p in params.split(",") if p.strip())
                        for name, params in ENTRY.findall(plain)}

    @staticmethod
    @lru_cache(maxsize=None)
    def load(file):
        return Source(file)


def _inlined(path, name, seen):
    """The lines of a file, includes of ours replaced by the files, each once."""
    seen.add(path.name)
    yield f'#line 1 "{name}"'
    for i, line in enumerate(path.read_text().splitlines()):
        match = INCLUDE.match(line)
        if match is None:
            yield "" if line.startswith("#pragma once") else line
        elif (header := folder() / "include" / match[1]).name not in seen:
            yield from _inlined(header, f"include/{match[1]}", seen)
            yield f'#line {i + 2} "{name}"'
        else:
            yield ""


class Kernel:
    """KERNEL(**constants) is the Build of one entry for named compile-time constants (ints)."""

    def __init__(self, file, entry):
        self.file, self.entry = file, entry
        self._builds = {}

    def __call__(self, **constants):
        key = tuple(sorted(constants.items()))
        if key not in self._builds:
            self._builds[key] = Build(Source.load(self.file), self.entry, dict(key))
        return self._builds[key]


class Build:
    """A kernel with its constants; compiled when it is first launched, on the lane of its arguments."""

    def __init__(self, source, entry, constants):
        assert entry in source.entries, f"{source.file} has no kernel {entry}, only {', '.join(source.entries)}"
        self.source, self.entry, self.constants = source, entry, constants
        self.params = source.entries[entry]

    def launch(self, grid, block, args, smem=0):
        """Runs the kernel.

        grid, block  up to three ints each; a grid with a 0 in it does nothing
        args         one for each parameter: a C-contiguous array of the pointer's type or None, or a number
        smem         bytes of dynamic shared memory
        Raises ShapeError for what does not fit the signature.
        """
        grid, block = (*grid, 1, 1)[:3], (*block, 1, 1)[:3]
        packed = pack(self.entry, self.params, args)
        if 0 in grid:
            return
        self._module_of(args).launch(grid, block, packed, args, smem)

    def _module_of(self, args):
        if any(hasattr(a, "__cuda_array_interface__") for a in args):
            raise NotImplementedError
        return self._host

    @cached_property
    def _host(self):
        return host.Module(self)


def pack(entry, params, args):
    """ctypes values of a launch's arguments, in order. Raises ShapeError."""
    if len(args) != len(params):
        raise ShapeError(f"{entry}: {len(args)} arguments, expected {len(params)}: "
                         f"{', '.join(param.name for param in params)}")
    return [_pointer(entry, param, arg) if param.is_pointer else _scalar(entry, param, arg)
            for param, arg in zip(params, args, strict=True)]


def _scalar(entry, param, value):
    if param.type == "float":
        return ctypes.c_float(value)
    low, high = RANGES[param.type]
    if int(value) != value or not low <= value < high:
        raise ShapeError(f"{entry}: {param.name} is {value!r}, expected an {param.type} in {low}..{high - 1}")
    return SCALARS[param.type](int(value))


def _pointer(entry, param, array):
    if array is None:
        return ctypes.c_void_p(None)
    expected = POINTEES[param.type]
    if expected is not None and array.dtype != expected:
        raise ShapeError(f"{entry}: {param.name} is {array.dtype}, expected {expected}")
    if not array.flags.c_contiguous:
        raise ShapeError(f"{entry}: {param.name} {list(array.shape)} has strides {array.strides}, expected a "
                         "C-contiguous array")
    return ctypes.c_void_p(address(array))


def address(array):
    """Where an array's first element is, on the host or on the device."""
    return array.data.ptr if hasattr(array, "__cuda_array_interface__") else array.ctypes.data
