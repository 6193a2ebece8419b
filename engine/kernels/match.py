"""Symbolic shape matching of launcher arguments."""

from types import SimpleNamespace

import numpy as np

from engine.errors import ShapeError


def match(op, /, *, dims=None, **arrays):
    """Checks arrays against symbolic shapes and returns the sizes, as attributes.

    op      name for messages
    dims    {name: size} known before
    arrays  name=(array, "n_tokens hidden", dtype), a number in the pattern is a fixed size; array None is left out;
            dtype None takes any
    Raises ShapeError: "rms_norm: weight is [2048] bfloat16, expected [hidden=1152] bfloat16 (hidden from x)".
    """
    sizes, origin = dict(dims or {}), dict.fromkeys(dims or {}, "its arguments")
    for name, (array, pattern, dtype) in arrays.items():
        if array is None:
            continue
        names = pattern.split()
        known = {n: int(n) if n.isdecimal() else sizes.get(n) for n in names}
        fits = len(names) == array.ndim and all(known[n] in (None, size)
                                                for n, size in zip(names, array.shape, strict=True))
        if not fits or (dtype is not None and array.dtype != dtype):
            wanted = ", ".join(n if known[n] is None else n if n.isdecimal() else f"{n}={known[n]}" for n in names)
            sources = ", ".join(f"{n} from {origin[n]}" for n in dict.fromkeys(names) if n in origin)
            raise ShapeError(f"{op}: {name} is {list(array.shape)} {array.dtype}, expected [{wanted}] "
                             f"{np.dtype(dtype) if dtype is not None else array.dtype}"
                             + (f" ({sources})" if sources else ""))
        for n, size in zip(names, array.shape, strict=True):
            if n not in sizes and not n.isdecimal():
                sizes[n], origin[n] = size, name
    return SimpleNamespace(**sizes)
