"""engine/random.py: Philox against its published answers, exp and log against float64, all of it against random.cuh."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from engine.random import _mix, exp_f32, exponential, log_f32, philox4x32, request_seed, token_words, uniform

INCLUDE = Path(__file__).parent.parent / "cuda" / "include"

HARNESS = r"""
#include "random.cuh"
extern "C" {
void run_exp(const float* x, float* y, long n) { for (long i = 0; i < n; ++i) y[i] = exp_f32(x[i]); }
void run_log(const float* x, float* y, long n) { for (long i = 0; i < n; ++i) y[i] = log_f32(x[i]); }
void run_exponential(const unsigned* w, float* y, long n) { for (long i = 0; i < n; ++i) y[i] = exponential(w[i]); }
void run_uniform(const unsigned* w, float* y, long n) { for (long i = 0; i < n; ++i) y[i] = uniform(w[i]); }
void run_philox(const unsigned* counter_key, unsigned* y, long n) {
    for (long i = 0; i < n; ++i) {
        const unsigned* c = counter_key + 6 * i;
        const RandomWords out = philox4x32({{c[0], c[1], c[2], c[3]}}, c[4], c[5]);
        for (int j = 0; j < 4; ++j) y[4 * i + j] = out.word[j];
    }
}
void run_token_word(const unsigned long long* args, unsigned* y, long n) {
    for (long i = 0; i < n; ++i)
        y[i] = token_word((unsigned)args[4 * i], args[4 * i + 1], args[4 * i + 2], (unsigned)args[4 * i + 3]);
}
}
"""

PHILOX_ANSWERS = [      # counter, key, output: the known-answer vectors of the Random123 distribution
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    ([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0],
     [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """random.cuh as a shared library: compiled(name, input, out_dtype, n) -> the output array."""
    if shutil.which("g++") is None:
        pytest.fail("g++ was not found: this test compiles cuda/include/random.cuh with it; install g++")
    folder = tmp_path_factory.mktemp("random")
    (folder / "harness.cpp").write_text(HARNESS)
    command = ["g++", "-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", "-shared", "-fPIC",
               f"-I{INCLUDE}", str(folder / "harness.cpp"), "-o", str(folder / "harness.so")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    library = ctypes.CDLL(str(folder / "harness.so"))

    def run(name, data, out_dtype, shape):
        out = np.empty(shape, out_dtype)
        data = np.ascontiguousarray(data)
        getattr(library, name)(ctypes.c_void_p(data.ctypes.data), ctypes.c_void_p(out.ctypes.data),
                               ctypes.c_long(shape[0]))
        return out

    return run


def floats_between(low, high, n, rng):
    """n float32, uniform in their bit patterns: every binary exponent between low and high equally often; both > 0."""
    first, last = np.array([low, high], np.float32).view(np.int32)
    return rng.integers(first, last, n, endpoint=True).astype(np.int32).view(np.float32)


def exp_inputs():
    rng = np.random.default_rng(1)
    small = floats_between(1e-30, 87, 100_000, rng)
    halfway = ((np.arange(-120, 120) + 0.5) * np.log(2)).astype(np.float32)      # where the rounded exponent changes
    near = np.concatenate([np.nextafter(halfway, np.float32(d)) for d in (-100, 100)])
    edges = np.array([0.0, -0.0, 1, -1, 88, -87, -31, 1e-45, -1e-45, 1e-38], np.float32)
    return np.concatenate([small, -small, rng.uniform(-31, 0, 100_000).astype(np.float32), halfway, near, edges])


def log_inputs():
    rng = np.random.default_rng(2)
    edge = np.array([2**-0.5, 2**0.5, 1], np.float32)                            # where the split changes, and the zero
    edge = np.concatenate([edge, np.nextafter(edge, np.float32(0)), np.nextafter(edge, np.float32(2))])
    return np.concatenate([floats_between(1.2e-38, 3.4e38, 200_000, rng), floats_between(0.5, 2, 100_000, rng), edge])


def word_inputs():
    rng = np.random.default_rng(3)
    low = (2.0 ** rng.uniform(0, 32, 100_000)).astype(np.uint32)
    corner = np.arange(2000, dtype=np.uint32)
    return np.concatenate([rng.integers(0, 2**32, 200_000, dtype=np.uint32), low, ~low, corner, ~corner])


def ulps(got, want):
    """|got - want| in units of the last place of want's float32; want float64."""
    return np.abs(got.astype(np.float64) - want) / np.spacing(np.abs(want).astype(np.float32)).astype(np.float64)


def test_exp_is_accurate():
    # In units of 2^-24, for a result y = e^r in [0.70, 1.42]. Reduced argument: |r| < 0.35 is rounded (0.25), and
    # n * LN2_LOW with its constant (0.05): together 0.3 y. The square, five Horner steps and product: 3.5 roundings of
    # a term below 0.07 (0.25). Inner sum (0.25). The fit (0.06 y). Below 1 an ulp is one unit: 0.86; 0.5 to round.
    x = exp_inputs()
    assert ulps(exp_f32(x), np.exp(x.astype(np.float64))).max() < 1.36


def test_log_is_accurate():
    # s (f - z Q) is below 0.08 and has four roundings, f - that has one at 0.35: 0.57 units of 2^-24. With n = 0 the
    # result may be small, but so is that part: 4 roundings of at most 0.2 of it, and the last. With n = -1 it is at
    # least 0.346, an ulp is half a unit: 1.1 ulp, 0.1 for ln 2 as one word, 0.5 for the last sum. Other n are milder.
    x = log_inputs()
    x = x[x != 1]
    assert ulps(log_f32(x), np.log(x.astype(np.float64))).max() < 1.8


def test_exponential_is_accurate():
    # As log; and where 0.29 < x < 0.5, 1 - x <= 0.707 is rounded by up to 2^-25: 1.42 ulp of a result above 0.346.
    words = word_inputs()
    x = np.minimum((words.astype(np.float32) + np.float32(0.5)) * np.float32(2**-32), np.float32(1 - 2**-24))
    assert ulps(exponential(words), -np.log1p(-x.astype(np.float64))).max() < 3.2


def test_exact_points():
    zero, one = np.zeros(1, np.float32), np.ones(1, np.float32)
    assert exp_f32(zero) == 1
    assert log_f32(one) == 0
    assert exp_f32(-zero) == 1


def test_extreme_words_stay_finite_and_ordered():
    words = np.array([0, 1, 0xFFFFFF7F, 0xFFFFFF80, 0xFFFFFFFF], np.uint32)
    assert uniform(words[[0, 4]]).tolist() == [2.0**-33, 1 - 2.0**-24] and (np.diff(uniform(words)) >= 0).all()
    ends = exponential(words)
    assert ends[0] == np.float32(2.0**-33)
    np.testing.assert_allclose(ends[-1], 24 * np.log(2), rtol=1e-7)     # the clamp: 16.64, not infinite
    assert (np.diff(ends) >= 0).all()


def test_scalars_and_any_shape_give_the_same_bits():
    x = np.linspace(-20, 0, 24, dtype=np.float32)
    grid = exp_f32(x.reshape(2, 3, 4))
    assert grid.dtype == np.float32
    assert (grid.ravel() == exp_f32(x)).all()
    assert all(exp_f32(v) == y and exp_f32(v).dtype == np.float32 for v, y in zip(x, exp_f32(x), strict=True))


@pytest.mark.parametrize("counter, key, output", PHILOX_ANSWERS)
def test_philox_known_answers(counter, key, output):
    got = philox4x32(counter, key)
    assert got.dtype == np.uint32
    assert got.tolist() == output


def test_philox_takes_many_counters_and_keys():
    counters, keys, outputs = (np.array(column) for column in zip(*PHILOX_ANSWERS, strict=True))
    assert (philox4x32(counters, keys) == outputs).all()
    assert (philox4x32(counters[None], keys[None]) == outputs).all()
    assert (philox4x32(counters, keys[0])[0] == outputs[0]).all()


def test_token_words_follow_the_counter_layout():
    """Word token % 4 of the counter (token // 4, position low, high, domain) under the key (seed low, high)."""
    seed = np.array([0xFEDCBA9876543210, 2**64 - 1, 0], np.uint64)
    position = np.array([5, 2**32 + 7, 2**40], np.int64)
    token = np.array([0, 1, 2, 3, 5, 1000, 1001, 1002, 4004, 262143, 2**19 - 2, 8])       # two rows meet in one lane
    row = np.array([0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 2])
    got = token_words(token, row, seed, position, 3)
    for word, t, r in zip(got.tolist(), token.tolist(), row.tolist(), strict=True):
        s, p = int(seed[r]), int(position[r])
        want = philox4x32([t // 4, p % 2**32, p >> 32, 3], [s % 2**32, s >> 32])[t % 4]
        assert word == want, (t, r)


def test_token_words_do_not_depend_on_the_other_tokens_or_rows():
    token, row = np.arange(40), np.zeros(40, np.int64)
    alone = token_words(token, row, np.array([9], np.uint64), np.array([3]), 0)
    some = token_words(token[5::3], row[5::3], np.array([9], np.uint64), np.array([3]), 0)
    assert (some == alone[5::3]).all()
    both = token_words(np.tile(token, 2), np.repeat([0, 1], 40), np.array([1, 9], np.uint64), np.array([2, 3]), 0)
    assert (both[40:] == alone).all()
    assert (both[:40] != alone).any()


def test_request_seeds_mix():
    assert _mix(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF      # SplitMix64's first output from state 0
    seeds = {request_seed(llm_seed, i) for llm_seed in range(30) for i in range(300)}
    assert len(seeds) == 9000
    assert all(0 <= seed < 2**64 for seed in seeds)
    ones = np.mean([bin(seed).count("1") for seed in seeds])
    assert abs(ones - 32) < 0.17                               # 4 sigma of the mean of 9000 counts of 64 fair bits


def test_cuda_header_has_the_same_bits(compiled):
    x = exp_inputs()
    assert (compiled("run_exp", x, np.int32, x.shape) == exp_f32(x).view(np.int32)).all()
    x = log_inputs()
    assert (compiled("run_log", x, np.int32, x.shape) == log_f32(x).view(np.int32)).all()
    words = word_inputs()
    assert (compiled("run_exponential", words, np.int32, words.shape) == exponential(words).view(np.int32)).all()
    assert (compiled("run_uniform", words, np.int32, words.shape) == uniform(words).view(np.int32)).all()


def test_cuda_header_has_the_same_random_words(compiled):
    rng = np.random.default_rng(4)
    counter_key = rng.integers(0, 2**32, (5000, 6), dtype=np.uint32)
    counter_key[:8] = np.where(np.arange(8)[:, None] >> np.arange(3).repeat(2) & 1, 0xFFFFFFFF, 0)
    got = compiled("run_philox", counter_key, np.uint32, (5000, 4))
    assert (got == philox4x32(counter_key[:, :4], counter_key[:, 4:])).all()

    n_rows, n_tokens = 6, 200
    seed = rng.integers(0, 2**64, n_rows, dtype=np.uint64)
    position = np.array([0, 1, 77, 2**31, 2**32, 2**40 + 5])
    token = np.concatenate([np.sort(rng.choice(2**18, n_tokens, replace=False)) for _ in range(n_rows)])
    row = np.repeat(np.arange(n_rows), n_tokens)
    columns = (token, seed[row], position[row], np.full(len(token), 2))
    args = np.stack([column.astype(np.uint64) for column in columns], axis=1)
    got = compiled("run_token_word", args, np.uint32, (len(token),))
    assert (got == token_words(token, row, seed, position, 2)).all()
