// Several 32-bit words read or written by one instruction, where the address is a multiple of their bytes.
//
//   load_words<n>(p), store_words(p, words)   n = 1, 2 or 4 words: 4, 8 or 16 bytes
//   load_floats<n>(p, x)                      the same of floats, into an array
#pragma once
#include "device.cuh"

template <int n> struct Words { u32 word[n]; };

template <int n> __device__ __forceinline__ Words<n> load_words(const void* p) {
    static_assert(n == 1 || n == 2 || n == 4, "a thread reads 4, 8 or 16 bytes at once");
    if constexpr (n == 4) {
        const uint4 v = *(const uint4*)p;
        return {{v.x, v.y, v.z, v.w}};
    } else if constexpr (n == 2) {
        const uint2 v = *(const uint2*)p;
        return {{v.x, v.y}};
    } else {
        return {{*(const u32*)p}};
    }
}

template <int n> __device__ __forceinline__ void store_words(void* p, const Words<n>& words) {
    if constexpr (n == 4) *(uint4*)p = make_uint4(words.word[0], words.word[1], words.word[2], words.word[3]);
    else if constexpr (n == 2) *(uint2*)p = make_uint2(words.word[0], words.word[1]);
    else *(u32*)p = words.word[0];
}

template <int n> __device__ __forceinline__ void load_floats(const float* p, float* x) {
    const Words<n> words = load_words<n>(p);
    #pragma unroll
    for (int i = 0; i < n; ++i) x[i] = __uint_as_float(words.word[i]);
}
