"""The lane an engine runs on: where arrays live, their dtype, and the table of ops."""

from dataclasses import dataclass

import ml_dtypes
import numpy as np

from engine import reference
from engine.errors import ConfigError


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
        """An uninitialised array; its memory is not touched until it is written."""
        return np.empty(shape, self.dtype)


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
