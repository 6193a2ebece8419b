// fp16 and fp8 as storage: their bits, conversion to float, and rounding from it. Plain code on every architecture.
//
//   f16    1 sign, 5 exponent, 10 mantissa bits; above 65504 rounds to infinity
//   e4m3   1, 4, 3, no infinity, NaN is 0x7F and 0xFF; above 448 rounds to 448 (cvt.rn.satfinite.e4m3x2.f32)
//   e5m2   1, 5, 2; above 57344 rounds to 57344 (cvt.rn.satfinite.e5m2x2.f32)
//
// Rounds to nearest, ties to even; NaN stays NaN. No step goes through a subnormal float, which -ftz=true would flush.
#pragma once
#include "device.cuh"

struct f16 { u16 bits; };
struct e4m3 { u8 bits; };
struct e5m2 { u8 bits; };

// The float of `code`, sign apart: N mantissa bits, exponent bias B; special codes are the caller's.
template <int N, int B> __device__ __forceinline__ float small_to_float(u32 code) {
    const float unit = __uint_as_float((u32)(127 + 1 - B - N) << 23);                 // of a subnormal code
    return code >> N ? __uint_as_float((code << (23 - N)) + ((u32)(127 - B) << 23)) : (float)(int)code * unit;
}

// The code nearest to x >= 0, which may lie beyond the largest.
template <int N, int B> __device__ __forceinline__ u32 small_from_float(float x) {
    const u32 bits = __float_as_uint(x);
    if (bits < (u32)(127 + 1 - B) << 23) {
        const float in_units = x * __uint_as_float((u32)(127 - 1 + B + N) << 23);      // exact; adding 2^23 rounds it
        return __float_as_uint(__fadd_rn(in_units, 8388608.f)) & 0x7FFFFFu;
    }
    const u32 moved = bits - ((u32)(127 - B) << 23);
    return (moved + (1u << (22 - N)) - 1 + (moved >> (23 - N) & 1)) >> (23 - N);
}

__device__ __forceinline__ float with_sign(float x, u32 sign) { return sign ? -x : x; }

__device__ __forceinline__ float to_float(f16 x) {
    const u32 code = x.bits & 0x7FFFu;
    const float y = code >= 0x7C00u ? __uint_as_float(0x7F800000u | code << 13) : small_to_float<10, 15>(code);
    return with_sign(y, x.bits >> 15);
}
__device__ __forceinline__ float to_float(e4m3 x) {
    const u32 code = x.bits & 0x7Fu;
    const float y = code == 0x7Fu ? __uint_as_float(0x7FC00000u) : small_to_float<3, 7>(code);
    return with_sign(y, x.bits >> 7);
}
__device__ __forceinline__ float to_float(e5m2 x) { return to_float(f16{(u16)(x.bits << 8)}); }

// `most` is the code that anything larger gets, `nan` that of NaN.
template <int N, int B> __device__ __forceinline__ u32 small_rounded(float x, u32 most, u32 nan) {
    const u32 magnitude = __float_as_uint(x) & 0x7FFFFFFFu;
    const u32 code = small_from_float<N, B>(__uint_as_float(magnitude));
    return magnitude > 0x7F800000u ? nan : code < most ? code : most;
}

__device__ __forceinline__ f16 to_f16(float x) {
    return {(u16)(small_rounded<10, 15>(x, 0x7C00, 0x7E00) | __float_as_uint(x) >> 31 << 15)};
}
__device__ __forceinline__ e4m3 to_e4m3(float x) {
    return {(u8)(small_rounded<3, 7>(x, 0x7E, 0x7F) | __float_as_uint(x) >> 31 << 7)};
}
__device__ __forceinline__ e5m2 to_e5m2(float x) {
    return {(u8)(small_rounded<2, 15>(x, 0x7B, 0x7F) | __float_as_uint(x) >> 31 << 7)};
}
