"""Kernel: one `extern "C"` entry of a .cu file, compiled once for each set of constants, launched on either lane.

The lane follows the arrays: NumPy memory runs on the emulated lane (g++, kernels/host.py), CuPy memory on the GPU
(NVRTC, kernels/device.py). Arguments are checked against the kernel's own signature before anything runs.
"""

import ctypes
import re
from ctypes import c_float, c_void_p
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import ml_dtypes
import numpy as np

from engine.errors import KernelError, ShapeError
from engine.kernels import device, host

BF16 = np.dtype(ml_dtypes.bfloat16)
POINTEES = {"bf16": BF16, "float": np.dtype(np.float32), "int": np.dtype(np.int32), "u32": np.dtype(np.uint32),
            "u8": np.dtype(np.uint8), "bool": np.dtype(bool), "i64": np.dtype(np.int64), "u64": np.dtype(np.uint64),
            "void": None}
SCALARS = {"int": ctypes.c_int32, "u32": ctypes.c_uint32, "float": ctypes.c_float, "i64": ctypes.c_int64,
           "u64": ctypes.c_uint64, "bool": ctypes.c_bool}
RANGES = {"int": (-2**31, 2**31), "u32": (0, 2**32), "i64": (-2**63, 2**63), "u64": (0, 2**64), "bool": (0, 2)}
INTEGERS = (int, np.integer, np.bool_)
NUMBERS = (float, np.floating, *INTEGERS)
BOUNDS = r"(?:__launch_bounds__\s*\([^()]*(?:\([^()]*\)[^()]*)*\)\s*)?"
ENTRY = re.compile(rf'extern\s+"C"\s+__global__\s+{BOUNDS}void\s+{BOUNDS}(\w+)\s*\(([^)]*)\)')
COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"')
PARAM = re.compile(r"(OUT\s+)?(const\s+)?(\w+)\s*(?:(\*)\s*(?:__restrict__\s+)?)?(\w+)$")


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
        types = POINTEES if match and match[4] else SCALARS
        if not match or match[3] not in types:
            raise AssertionError(f"parameter {text!r}: expected [OUT|const] type[*] name, type {', '.join(types)}")
        is_out, is_const, kind, star, name = match.groups()
        return cls(name, kind, bool(star), "read" if is_const or not star else "write" if is_out else "update")


class Source:
    """One .cu file with our headers inlined, so that whoever keys on the text sees them.

    file     in cuda/, or an absolute path; headers come from cuda/include either way
    text     what is compiled; #line directives keep file names and line numbers true
    entries  {kernel name: its Params}
    Raises KernelError for a file that is not there.
    """

    def __init__(self, file):
        self.file = file
        path = folder() / file
        if not path.is_file():
            raise KernelError(f"no kernel file {path}")
        self.text = "\n".join(_inlined(path, file, set())) + "\n"
        self.entries = {name: tuple(Param.parse(p) for p in params.split(",") if p.strip())
                        for name, params in ENTRY.findall(COMMENT.sub(" ", self.text))}

    @staticmethod
    @cache
    def load(file):
        return Source(file)


def _inlined(path, name, seen):
    """The lines of a file, includes of ours replaced by the files, each once."""
    seen.add(path)
    yield f'#line 1 "{name}"'
    for i, line in enumerate(path.read_text().splitlines(), 1):
        match = INCLUDE.match(line)
        if match is None:
            yield "" if line.startswith("#pragma once") else line
            continue
        header = folder() / "include" / match[1]
        if not header.is_file():
            raise KernelError(f"{name}, line {i} includes {match[1]!r}, which is not in {header.parent}")
        if header not in seen:
            yield from _inlined(header, f"include/{match[1]}", seen)
        yield f'#line {i + 1} "{name}"'


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
        self._on_device = {}                                # {device: Module}

    def __repr__(self):
        return f"{self.entry}({', '.join(f'{name}={value}' for name, value in self.constants.items())})"

    def launch(self, grid, block, args, smem=0):
        """Runs the kernel.

        grid, block  up to three ints each; a grid with a 0 in it does nothing
        args         one for each parameter: a C-contiguous array of the pointer's type or None, or a number
        smem         bytes of dynamic shared memory
        Raises ShapeError for what does not fit the signature.
        """
        grid, block = (*grid, 1, 1)[:3], (*block, 1, 1)[:3]
        packed, is_on_device = pack(self.entry, self.params, args)
        if 0 in grid:                                       # CUDA refuses an empty grid
            return
        module = self._device_module() if is_on_device else self._host
        module.launch(grid, block, packed, args, smem)

    @cached_property
    def _host(self):
        return host.Module(self)

    def _device_module(self):
        current = device.current()
        if current not in self._on_device:
            self._on_device[current] = device.Module(self, current)
        return self._on_device[current]


def pack(entry, params, args):
    """(ctypes values of a launch's arguments in order, whether its arrays are on a GPU). Raises ShapeError."""
    if len(args) != len(params):
        raise ShapeError(f"{entry}: {len(args)} arguments, expected {len(params)}: "
                         f"{', '.join(param.name for param in params)}")
    packed, lane = [], None
    for param, arg in zip(params, args, strict=True):
        if not param.is_pointer:
            packed.append(_scalar(entry, param, arg))
        elif arg is None:
            packed.append(c_void_p(None))
        else:
            is_on_device = hasattr(type(arg), "__cuda_array_interface__")       # of the type: reading it costs a dict
            if lane is not is_on_device:
                if lane is not None:
                    raise ShapeError(f"{entry}: {param.name} is on the {_place(is_on_device)}, the arrays before it on "
                                     f"the {_place(lane)}")
                lane = is_on_device
            _check(entry, param, arg)
            packed.append(c_void_p(arg.data.ptr if is_on_device else _host_address(arg)))
    return packed, bool(lane)


def _place(is_on_device):
    return "GPU" if is_on_device else "host"


def _scalar(entry, param, value):
    """Never an array: on a GPU, reading one would wait for it."""
    if param.type == "float":
        if not isinstance(value, NUMBERS):
            raise ShapeError(f"{entry}: {param.name} is {value!r}, expected a number")
        return c_float(value)
    low, high = RANGES[param.type]
    if not isinstance(value, INTEGERS) or not low <= value < high:
        raise ShapeError(f"{entry}: {param.name} is {value!r}, expected an {param.type} in {low}..{high - 1}")
    return SCALARS[param.type](value)


def _check(entry, param, array):
    expected = POINTEES[param.type]
    if not hasattr(array, "dtype"):
        raise ShapeError(f"{entry}: {param.name} is {array!r}, expected an array of {expected or 'any type'}, or None")
    if expected is not None and array.dtype != expected:
        raise ShapeError(f"{entry}: {param.name} is {list(array.shape)} {array.dtype}, expected {expected}")
    if not array.flags.c_contiguous:
        raise ShapeError(f"{entry}: {param.name} {list(array.shape)} has strides {array.strides}, expected a "
                         "C-contiguous array")


def _host_address(array):
    return array.__array_interface__["data"][0]             # half the time of array.ctypes.data


def address(array):
    """Where an array's first element is, on the host or on the device."""
    return array.data.ptr if hasattr(type(array), "__cuda_array_interface__") else _host_address(array)
