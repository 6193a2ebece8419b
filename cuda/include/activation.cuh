// Activation functions of one float, for epilogues.
//
//   gelu_tanh(z)      z/2 (1 + tanh(u)), u = sqrt(2/pi) (z + 0.044715 z^3), computed as z / (1 + e^-2u): nothing cancels
//   silu(z)           z / (1 + e^-z)
//   softcap(x, cap)   cap tanh(x / cap)
//
// gelu_tanh and silu are within 2e-5 of the true value, relatively: 2^x of a rounded x, |x| < 128, costs up to
// 128 * 2^-24 * ln 2 = 5.3e-6, rounding 2u costs the same once or twice more, and quotients 2 ulp. That is 0.005 ulp of
// bfloat16. They go to -0 where e^-z overflows. softcap is tanhf's 2 ulp and two roundings.
#pragma once
#include "device.cuh"

// x / (1 + 2^y). The device's quick quotient has 2 ulp, and is 0 for divisors above 2^126, as good as any answer there.
__device__ __forceinline__ float over_one_plus_exp2(float x, float y) {
#ifdef EMULATED
    return x / (1.f + exp2f(y));
#else
    return __fdividef(x, 1.f + exp2f(y));
#endif
}

__device__ __forceinline__ float gelu_tanh(float z) {
    const float slope = -2.302208198f;                  // -2 sqrt(2/pi) / ln 2
    // Rounded as written, so that every tile that inlines this gives the same bits.
    return over_one_plus_exp2(z, __fmul_rn(z, fmaf(__fmul_rn(slope * 0.044715f, z), z, slope)));
}

__device__ __forceinline__ float silu(float z) {
    return over_one_plus_exp2(z, z * -1.44269504f);     // 1 / ln 2
}

__device__ __forceinline__ float softcap(float x, float cap) { return cap * tanhf(x / cap); }
