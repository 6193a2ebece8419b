"""bf16, fp16 and fp8: every code to float, and every float where rounding turns, as ml_dtypes has them."""

import ml_dtypes
import numpy as np
import pytest

from tests.emu.kernels import kernel

TYPES = {0: np.dtype(ml_dtypes.bfloat16), 1: np.dtype(np.float16), 2: np.dtype(ml_dtypes.float8_e4m3fn),
         3: np.dtype(ml_dtypes.float8_e5m2)}


def run(entry, x, out_dtype, number):
    out = np.empty(len(x), out_dtype)
    kernel("small_float.cu", entry).launch((-(-len(x) // 256),), (256,), (x, out, len(x), number))
    return out


def all_values(dtype):
    codes = np.arange(1 << 8 * dtype.itemsize, dtype=f"u{dtype.itemsize}")
    return codes, codes.view(dtype).astype(np.float32)


@pytest.mark.parametrize("number", TYPES)
def test_every_code_has_its_value(number):
    codes, values = all_values(TYPES[number])
    got = run("decode", codes.astype(np.int32), np.float32, number)
    np.testing.assert_array_equal(got, values)                           # NaN equals NaN here
    np.testing.assert_array_equal(np.signbit(got), np.signbit(values))


@pytest.mark.parametrize("number", TYPES)
def test_rounding_to_nearest_even(number):
    dtype = TYPES[number]
    values = np.unique(all_values(dtype)[1])
    values = values[np.isfinite(values)]
    between = ((values[1:].astype(np.float64) + values[:-1]) / 2).astype(np.float32)
    turns = np.concatenate([values, between])
    x = np.concatenate([turns, np.nextafter(turns, np.float32(np.inf)), np.nextafter(turns, np.float32(-np.inf)),
                        np.float32([-0.0, np.inf, -np.inf, np.nan, 3e38, -3e38, 449, 464, 465, 61440, 65519, 65520])])
    most = values.max()
    want = x if dtype.itemsize == 2 else np.clip(x, -most, most)         # fp8 stops at its largest number
    with np.errstate(over="ignore"):
        want = want.astype(dtype)
    got = run("encode", x, np.int32, number).astype(f"u{dtype.itemsize}").view(dtype)
    np.testing.assert_array_equal(got.astype(np.float32), want.astype(np.float32))
    np.testing.assert_array_equal(np.signbit(got)[~np.isnan(x)], np.signbit(want)[~np.isnan(x)])
