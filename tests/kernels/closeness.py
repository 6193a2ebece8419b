"""How close a kernel must come to its twin in float64 (the table of the house style), and the dtypes tests speak."""

import ml_dtypes
import numpy as np

BF16 = np.dtype(ml_dtypes.bfloat16)
ONE_ROUNDING = 0.51             # ulp: half for the rounding, a hundredth for the float32 sums before it


def bf16(x):
    """Rounded to bfloat16, as an array of it."""
    return np.asarray(x).astype(BF16)


def f64(x):
    return np.asarray(x).astype(np.float64)


def ulp(x):
    """The spacing of bfloat16 at |x|, float64."""
    exponent = np.frexp(np.maximum(np.abs(f64(x)), 2.0**-126))[1] - 1
    return 2.0 ** (exponent - 7)


def assert_ulps(got, want, most=ONE_ROUNDING, terms=()):
    """got bfloat16, want float64; an ulp is taken at the largest of the result and, where terms cancel, its `terms`."""
    assert got.dtype == BF16 and got.shape == want.shape, f"got {got.dtype} {got.shape}, want {want.shape}"
    size = np.abs(want)
    for term in terms:
        size = np.maximum(size, np.abs(term))
    error = np.abs(f64(got) - want) / ulp(size)
    worst = np.unravel_index(np.argmax(np.where(np.isfinite(error), error, np.inf)), error.shape) if error.size else ()
    assert not error.size or error[worst] <= most, (
        f"{error[worst]:.4f} ulp at {tuple(map(int, worst))}: got {got[worst]}, want {want[worst]:.9g}")


def assert_as_good(got, want, plain, factor=2.0):
    """Row by row, the distance of got from want (float64) is at most `factor` times that of `plain`, the same math done
    plainly in bfloat16 with float32 sums."""
    assert got.shape == want.shape == plain.shape
    errors, allowed = (np.linalg.norm((f64(a) - want).reshape(len(want), -1), axis=1) for a in (got, plain))
    floor = np.linalg.norm(want.reshape(len(want), -1), axis=1) * 2.0**-9      # a row that plain math happens to hit
    bad = ~(errors <= factor * np.maximum(allowed, floor))
    assert not bad.any(), (
        f"row {np.argmax(bad)}: error {errors[bad][0]:.3g}, plain bfloat16 math has {allowed[bad][0]:.3g}")
