"""Random numbers, and the exp and log that turn them into tokens. The twin of cuda/include/random.cuh, bit for bit.

Every lane must pick the same token from the same logits, so nothing here is left to a library: exp and log are fixed
polynomials in plain float32, one IEEE add, multiply or divide at a time, in the order written, never fused. Every
constant is typed, so NumPy 1.26 and 2 promote alike; they are 0-d arrays because NumPy applies those faster than its
scalars, and a decode step makes about a hundred such calls. Subnormals never decide a result: CUDA flushes them.
"""

import numpy as np

_f32 = lambda value: np.array(value, np.float32)     # noqa: E731
_i32 = lambda value: np.array(value, np.int32)       # noqa: E731
_u64 = lambda value: np.array(value, np.uint64)      # noqa: E731

WORD = _u64(0xFFFFFFFF)             # the low 32 bits
HALF_WORD = _u64(32)
LANE_BITS = 30                      # more than any vocabulary needs
LANE = 2**LANE_BITS - 1
PHILOX_M0, PHILOX_M1 = _u64(0xD2511F53), _u64(0xCD9E8D57)
PHILOX_STEPS0 = _u64([i * 0x9E3779B9 % 2**32 for i in range(10)])      # added to the key, one a round
PHILOX_STEPS1 = _u64([i * 0xBB67AE85 % 2**32 for i in range(10)])

HALF, ONE, TWO = _f32(0.5), _f32(1), _f32(2)
LN2 = _f32(0.6931471805599453)      # its rounding error is a sixteenth of an ulp: log needs no second word
LOG2_E = _f32(1.4426950408889634)
LN2_HIGH = _f32(0.693359375)        # 9 bits, so n * LN2_HIGH is exact; with LN2_LOW it makes up ln 2
LN2_LOW = _f32(-2.1219444005469057e-4)
ROUND = _f32(1.5 * 2**23)           # adding it rounds to an integer and leaves that integer in the low mantissa bits
SQRT_HALF_BITS = _i32(0x3F3504F3)   # float32 bits of sqrt(1/2)
MANTISSA_BITS = _i32(23)
WORD_UNIT = _f32(2.0**-32)
BELOW_ONE = _f32(1 - 2.0**-24)      # the largest float32 below 1

# Weighted minimax fits in float64, the coefficients rounded to float32 from the lowest up, the rest refitted each time.
# exp(r) = 1 + r + r^2 P(r) on |r| <= ln(2) / 2: relative error 2^-28.2
EXP = [_f32(c) for c in (0.0013821468455716968, 0.008368662558495998, 0.041668254882097244, 0.1666652113199234,
                         0.4999999403953552)]
# log(1 + f) = f - s (f - z Q(z)), s = f / (2 + f), z = s^2, on sqrt(1/2) <= 1 + f < sqrt(2): relative error 2^-30
LOG = [_f32(c) for c in (0.2987091839313507, 0.39977580308914185, 0.6666677594184875)]


def exp_f32(x):
    """e^x, within 1.36 ulp of the exact value (derived in tests/test_random.py; 0.99 seen); e^0 is exactly 1.

    x  float32, any shape, -87 <= x <= 88: where the result is a normal number. Trusted, not checked.
    """
    shifted = x * LOG2_E + ROUND
    n = shifted - ROUND
    r = x - n * LN2_HIGH - n * LN2_LOW
    y = ONE + (r + r * r * _horner(EXP, r))
    return (y.view(np.int32) + (shifted.view(np.int32) << MANTISSA_BITS)).view(np.float32)      # y * 2**n


def log_f32(x):
    """ln x, within 1.8 ulp of the exact value (derived in tests/test_random.py; 1.07 seen); ln 1 is exactly 0.

    x  float32, any shape, positive and normal. Trusted, not checked.
    """
    n, mantissa = _split(x)
    return _log_near_one(mantissa - ONE) + n.astype(np.float32) * LN2


def uniform(words):
    """x = min((w + 1/2) * 2^-32, 1 - 2^-24): uniform, never 0, and never 1, as words from 0xFFFFFF80 up would be.

    words  integers in [0, 2**32), any shape. Returns float32.
    """
    return np.minimum((words.astype(np.float32) + HALF) * WORD_UNIT, BELOW_ONE)


def exponential(words):
    """E = -ln(1 - x) with x = uniform(words): an exponential variate, 1.16e-10 <= E <= 16.64.

    words  integers in [0, 2**32), any shape. Returns float32, within 3.2 ulp of -log1p(-x) (2.46 seen).
    As x stays below 1, E is finite: a sole survivor must be able to win.
    """
    x = uniform(words)
    n, mantissa = _split(ONE - x)
    f = np.where(n == 0, -x, mantissa - ONE)         # near 1 the sum 1 - x has lost the low bits of x; x has not
    return -(_log_near_one(f) + n.astype(np.float32) * LN2)


def _split(x):
    """x = mantissa * 2**n with sqrt(1/2) <= mantissa < sqrt(2): (n int32, mantissa float32)."""
    bits = x.view(np.int32)
    n = (bits - SQRT_HALF_BITS) >> MANTISSA_BITS
    return n, (bits - (n << MANTISSA_BITS)).view(np.float32)


def _log_near_one(f):
    s = f / (TWO + f)
    z = s * s
    return f - s * (f - z * _horner(LOG, z))


def _horner(coefficients, x):
    """Highest power first."""
    value = coefficients[0]
    for c in coefficients[1:]:
        value = value * x + c
    return value


def philox4x32(counter, key):
    """Philox4x32-10: four random 32-bit words per counter. Source: Salmon et al., SC 2011, table 2 and section 3.3.

    counter  [..., 4] integers in [0, 2**32)
    key      [..., 2] integers in [0, 2**32), leading shape as counter's, or just [2]
    Returns uint32 [..., 4].
    """
    counter, key = np.asarray(counter, np.uint64), np.asarray(key, np.uint64)
    words = _philox(*np.moveaxis(counter, -1, 0), *np.moveaxis(key, -1, 0))
    return np.stack(words, axis=-1).astype(np.uint32)


def token_words(token, row, seed, position, domain):
    """The random word of each (row, token): a function of (seed, position, domain, token) alone, never of the row.

    token     [n] int64, ascending within a row
    row       [n] int64, ascending: which entry of seed and position is meant
    seed      [n_rows] uint64, the request's
    position  [n_rows] int64, absolute index of the token being decided
    domain    which draw: 0 sample from the target, 1 draft proposes, 2 accept coin, 3 residual draw
    Returns uint64 [n], each below 2**32: word token % 4 of Philox under the key seed (low, high word) of the counter
    (token // 4, position low, position high, domain).
    """
    lane = (row << LANE_BITS) + (token >> 2)         # of a row; neighbours share lanes, each is computed once
    is_new = np.ones(len(lane), bool)
    np.not_equal(lane[1:], lane[:-1], out=is_new[1:])
    lane = lane[is_new]
    of = (0, ...) if len(seed) == 1 else lane >> LANE_BITS      # one row broadcasts its seed and position
    at, key = position.astype(np.uint64)[of], seed[of]
    words = _philox((lane & LANE).astype(np.uint64), at & WORD, at >> HALF_WORD, _u64(domain),
                    key & WORD, key >> HALF_WORD)
    return np.concatenate(words)[(token & 3) * len(lane) + np.cumsum(is_new) - 1]


def _philox(c0, c1, c2, c3, k0, k1):
    """Ten rounds on uint64 arrays that hold 32-bit words; shapes broadcast. Returns the four output words."""
    key0, key1 = np.add.outer(PHILOX_STEPS0, k0) & WORD, np.add.outer(PHILOX_STEPS1, k1) & WORD
    for i in range(10):
        product0, product1 = c0 * PHILOX_M0, c2 * PHILOX_M1
        c0 = (product1 >> HALF_WORD) ^ c1 ^ key0[i, ...]
        c2 = (product0 >> HALF_WORD) ^ c3 ^ key1[i, ...]
        c1, c3 = product1 & WORD, product0 & WORD
    return c0, c1, c2, c3


def request_seed(llm_seed, counter):
    """The 64-bit seed of a request that brought none: SplitMix64's mix of (LLM.seed, submission counter).

    Two counters never give one seed: for a fixed llm_seed the map is a bijection of 64-bit counters.
    Source: Steele, Lea, Flood, OOPSLA 2014 (the mix), with Stafford's constants.
    """
    return _mix(_mix(llm_seed) + counter * 0x9E3779B97F4A7C15)


def _mix(z):
    z %= 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)
