"""The lane an engine runs on: where arrays live, their dtype, and the table of ops."""

import mmap
from dataclasses import dataclass
from math import prod

import ml_dtypes
import numpy as np

from engine import reference
from engine.errors import ConfigError

MAPPED_BYTES = 1 << 22      # from this size on NumPy asks for huge pages


@dataclass(frozen=True)
class Lane:
    """One way to run the ops.

    name               cuda | emulated | cpu
    ops                module with the op table
    dtype              of weights, activations and the KV cache
    folds_norm_offset  RMSNorm weights are stored with their offset added (exact in float32 only)
    """

    name: str
    ops: object
    dtype: np.dtype
    folds_norm_offset: bool

    def empty(self, shape):
        """An array with no meaning yet; its memory is not touched until it is written.

        NumPy asks for huge pages for large arrays, and the kernel may stop to make each of them: beside other programs,
        loading 1 GB took 0.4 to 1.0 s that way and 0.3 s on plain pages, which decode 3 % slower. So large ones are
        mapped here.
        """
        n_bytes = prod(shape) * self.dtype.itemsize
        if n_bytes < MAPPED_BYTES or not hasattr(mmap, "MAP_PRIVATE"):
            return np.empty(shape, self.dtype)
        memory = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return np.frombuffer(memory, self.dtype).reshape(shape)


def lane_of(device, dtype):
    """(lane name, NumPy dtype) that the LLM arguments `device` and `dtype` ask for. Raises ConfigError."""
    kind, _, index = device.partition(":") if isinstance(device, str) else ("", "", "")
    if kind not in ("auto", "cuda", "cpu", "emulated") or (index and (kind != "cuda" or not index.isdecimal())):
        raise ConfigError(f"device is {device!r}, expected auto, cuda, cuda:N, cpu or emulated")
    if dtype not in ("auto", "bfloat16", "float32"):
        raise ConfigError(f"dtype is {dtype!r}, expected auto, bfloat16 or float32")
    on_host = kind in ("auto", "cpu")
    if dtype == ("bfloat16" if on_host else "float32"):
        raise ConfigError(f"dtype {dtype!r} on device {device!r}: the cpu lane computes in float32, cuda and emulated "
                          "in bfloat16")
    return ("cpu", np.dtype(np.float32)) if on_host else (kind, np.dtype(ml_dtypes.bfloat16))


def open_lane(device, dtype):
    """The Lane for the LLM arguments `device` and `dtype`. Raises ConfigError for what cannot run here."""
    kind, dtype = lane_of(device, dtype)
    if kind != "cpu":
        raise ConfigError(f"device {device!r}: its kernels are not built yet; device='cpu' runs every supported model")
    return Lane(kind, reference, dtype, folds_norm_offset=True)
