// Random numbers, and the exp and log that turn them into tokens. The NumPy twin is engine/random.py, bit for bit.
//
//   philox4x32(counter, key)   Philox4x32-10: four random words. Source: Salmon et al., SC 2011
//   token_word(...)            the random word of one token: a function of (seed, position, domain, token) alone
//   exp_f32(x)                 e^x for -87 <= x <= 88, within 1.36 ulp; e^0 is exactly 1
//   log_f32(x)                 ln x for positive normal x, within 1.8 ulp; ln 1 is exactly 0
//   uniform(word)              x = min((word + 1/2) * 2^-32, 1 - 2^-24): never 0, never 1
//   exponential(word)          -ln(1 - uniform(word)): within 3.2 ulp, 1.16e-10 .. 16.64
//
// Every float operation is one IEEE single operation, rounded to nearest, in the order written: on the device through
// intrinsics that the compiler may not fuse, on the host with -ffp-contract=off. Flushing subnormals (-ftz=true)
// changes no result. Where the coefficients come from: engine/random.py.
// Plain C++17 on the host: no CUDA header, no libm.
#pragma once

#ifdef __CUDACC__
#define RANDOM_FN __host__ __device__ __forceinline__
#else
#include <cstring>
#define RANDOM_FN inline
#endif

struct RandomWords { unsigned int word[4]; };

#ifdef __CUDA_ARCH__
RANDOM_FN float add_f32(float a, float b) { return __fadd_rn(a, b); }
RANDOM_FN float mul_f32(float a, float b) { return __fmul_rn(a, b); }
RANDOM_FN float div_f32(float a, float b) { return __fdiv_rn(a, b); }
RANDOM_FN int bits_of(float x) { return __float_as_int(x); }
RANDOM_FN float float_of(int bits) { return __int_as_float(bits); }
#else
RANDOM_FN float add_f32(float a, float b) { return a + b; }
RANDOM_FN float mul_f32(float a, float b) { return a * b; }
RANDOM_FN float div_f32(float a, float b) { return a / b; }
RANDOM_FN int bits_of(float x) { int bits; memcpy(&bits, &x, sizeof bits); return bits; }
RANDOM_FN float float_of(int bits) { float x; memcpy(&x, &bits, sizeof x); return x; }
#endif
RANDOM_FN float sub_f32(float a, float b) { return add_f32(a, -b); }          // -b is exact, so this is a - b

RANDOM_FN RandomWords philox4x32(RandomWords c, unsigned int key0, unsigned int key1) {
    for (int round = 0; round < 10; ++round) {
        const unsigned long long product0 = 0xD2511F53ull * c.word[0], product1 = 0xCD9E8D57ull * c.word[2];
        c = {{(unsigned int)(product1 >> 32) ^ c.word[1] ^ key0, (unsigned int)product1,
              (unsigned int)(product0 >> 32) ^ c.word[3] ^ key1, (unsigned int)product0}};
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return c;
}

// position: absolute index of the token being decided. domain: 0 sample, 1 draft proposes, 2 accept coin, 3 residual.
// A kernel that walks neighbouring tokens calls philox4x32 itself and uses all four words.
RANDOM_FN unsigned int token_word(unsigned int token, unsigned long long seed, unsigned long long position,
                                  unsigned int domain) {
    const RandomWords counter = {{token / 4, (unsigned int)position, (unsigned int)(position >> 32), domain}};
    return philox4x32(counter, (unsigned int)seed, (unsigned int)(seed >> 32)).word[token % 4];
}

RANDOM_FN float exp_f32(float x) {
    const float round = 12582912.f;                     // 1.5 * 2^23: leaves the rounded integer in the low bits
    const float shifted = add_f32(mul_f32(x, 1.44269502162933349609375f), round);       // x / ln 2
    const float n = sub_f32(shifted, round);
    const float r = sub_f32(sub_f32(x, mul_f32(n, 0.693359375f)), mul_f32(n, -2.12194442e-4f));     // ln 2 in two words
    float p = 0.0013821468455716968f;
    p = add_f32(mul_f32(p, r), 0.008368662558495998f);
    p = add_f32(mul_f32(p, r), 0.041668254882097244f);
    p = add_f32(mul_f32(p, r), 0.1666652113199234f);
    p = add_f32(mul_f32(p, r), 0.4999999403953552f);
    const float y = add_f32(1.f, add_f32(r, mul_f32(mul_f32(r, r), p)));
    return float_of(bits_of(y) + (int)((unsigned int)bits_of(shifted) << 23));           // y * 2^n
}

// x = mantissa * 2^n, sqrt(1/2) <= mantissa < sqrt(2)
RANDOM_FN int split_exponent(float x) { return (bits_of(x) - 0x3F3504F3) >> 23; }
RANDOM_FN float split_mantissa(float x, int n) { return float_of(bits_of(x) - n * (1 << 23)); }

// ln((1 + f) * 2^n)
RANDOM_FN float log_of_parts(float f, int n) {
    const float s = div_f32(f, add_f32(2.f, f));
    const float z = mul_f32(s, s);
    float q = 0.2987091839313507f;
    q = add_f32(mul_f32(q, z), 0.39977580308914185f);
    q = add_f32(mul_f32(q, z), 0.6666677594184875f);
    const float near_one = sub_f32(f, mul_f32(s, sub_f32(f, mul_f32(z, q))));
    return add_f32(near_one, mul_f32((float)n, 0.693147182464599609375f));               // ln 2
}

RANDOM_FN float log_f32(float x) {
    const int n = split_exponent(x);
    return log_of_parts(sub_f32(split_mantissa(x, n), 1.f), n);
}

RANDOM_FN float uniform(unsigned int word) {
    const float x = mul_f32(add_f32((float)word, 0.5f), 2.3283064365386962890625e-10f);  // 2^-32
    const float below_one = 0.999999940395355224609375f;                                 // 1 - 2^-24
    return x < below_one ? x : below_one;
}

RANDOM_FN float exponential(unsigned int word) {
    const float x = uniform(word);
    const float y = sub_f32(1.f, x);
    const int n = split_exponent(y);
    return -log_of_parts(n == 0 ? -x : sub_f32(split_mantissa(y, n), 1.f), n);           // near 1, y has lost bits of x
}
