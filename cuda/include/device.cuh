// Types and helpers of every kernel: bfloat16 as bits, roundings, the sum over a warp. No CUDA header is needed.
#pragma once

#ifndef EMULATED
#define DYNAMIC_SMEM(name) extern __shared__ __align__(128) unsigned char name[]
#endif
#define OUT             // marks a pointer that a kernel writes before it reads it: the checker holds it to that

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

// bfloat16 as its bits. A kernel computes in float and rounds with to_bf16.
struct bf16 { u16 bits; };

__device__ __forceinline__ float to_float(bf16 x) { return __uint_as_float((u32)x.bits << 16); }
__device__ __forceinline__ float low_half(u32 two) { return __uint_as_float(two << 16); }
__device__ __forceinline__ float high_half(u32 two) { return __uint_as_float(two & 0xFFFF0000u); }

// Rounds to nearest, ties to even; NaN stays NaN.
__device__ __forceinline__ bf16 to_bf16(float x) {
#ifdef EMULATED
    const u32 bits = __float_as_uint(x);
    if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return {0x7FFF};
    return {(u16)((bits + 0x7FFFu + (bits >> 16 & 1)) >> 16)};
#else
    bf16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
#endif
}

__device__ __forceinline__ u32 pack_bf16(float low, float high) {
#ifdef EMULATED
    return to_bf16(low).bits | (u32)to_bf16(high).bits << 16;
#else
    u32 two;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(two) : "f"(high), "f"(low));
    return two;
#endif
}

__device__ __forceinline__ float warp_sum(float x) {
    #pragma unroll
    for (int m = 16; m; m >>= 1) x += __shfl_xor_sync(0xFFFFFFFFu, x, m);
    return x;
}
