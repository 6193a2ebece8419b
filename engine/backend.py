"""The lane an engine runs on: where arrays live, their dtype, and the table of ops."""

from dataclasses import dataclass

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


def open_lane(device, dtype):
    """The Lane for the LLM arguments `device` and `dtype`. Raises ConfigError for what cannot run here."""
    kind, _, index = str(device).partition(":")
    if kind not in ("auto", "cuda", "cpu", "emulated") or (index and (kind != "cuda" or not index.isdecimal())):
        raise ConfigError(f"device is {device!r}, expected auto, cuda, cuda:N, cpu or emulated")
    if dtype not in ("auto", "bfloat16", "float32"):
        raise ConfigError(f"dtype is {dtype!r}, expected auto, bfloat16 or float32")
    if kind in ("cuda", "emulated"):
        raise ConfigError(f"device {device!r}: its kernels are not built yet; device='cpu' runs every supported model")
    if dtype == "bfloat16":
        raise ConfigError("dtype 'bfloat16' is for the cuda and emulated lanes; the cpu lane computes in float32")
    return Lane("cpu", reference, np.dtype(np.float32), folds_norm_offset=True)
