// What a GPU's memory and launches reach at best, for percentages: a stream that is only read, a copy, an empty kernel.
//
// Grid (any), block (THREADS). A block takes stretches of THREADS * UNROLL 16-byte accesses in turns with the others: a
// thread has UNROLL of them in flight, and neighbouring threads neighbouring ones. Bound by memory.
// Constants: THREADS, a multiple of 32, and UNROLL.
#include "words.cuh"

constexpr i64 STRETCH = (i64)THREADS * UNROLL;

// read_sum:  out[b] = the sum, modulo 2^32, of the words that block b read: nothing that was loaded may be left out
//
//   x [n_words] u32   out [n_blocks] u32
//   traffic  4 * n_words + 4 * n_blocks
extern "C" __global__ void __launch_bounds__(THREADS) read_sum(const u32* x, OUT u32* out, i64 n_words) {
    __shared__ u32 part[THREADS / 32];
    const i64 n = n_words / 4;
    u32 sum = 0;
    for (i64 at = blockIdx.x * STRETCH + threadIdx.x; at < n; at += gridDim.x * STRETCH) {
        Words<4> words[UNROLL];
        #pragma unroll
        for (int i = 0; i < UNROLL; ++i)
            words[i] = at + i * THREADS < n ? load_words<4>(x + 4 * (at + i * THREADS)) : Words<4>{};
        #pragma unroll
        for (int i = 0; i < UNROLL; ++i)
            sum += words[i].word[0] + words[i].word[1] + words[i].word[2] + words[i].word[3];
    }
    const i64 rest = 4 * n + threadIdx.x;                       // up to three words
    if (blockIdx.x == 0 && rest < n_words) sum += x[rest];
    #pragma unroll
    for (int m = 16; m; m >>= 1) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, m);
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x) return;
    sum = 0;
    for (int i = 0; i < THREADS / 32; ++i) sum += part[i];
    out[blockIdx.x] = sum;
}

// copy:  y = x, bit for bit
//
//   x, y [n_words] u32
//   traffic  8 * n_words
extern "C" __global__ void __launch_bounds__(THREADS) copy(const u32* x, OUT u32* y, i64 n_words) {
    const i64 n = n_words / 4;
    for (i64 at = blockIdx.x * STRETCH + threadIdx.x; at < n; at += gridDim.x * STRETCH) {
        Words<4> words[UNROLL];
        #pragma unroll
        for (int i = 0; i < UNROLL; ++i)
            if (at + i * THREADS < n) words[i] = load_words<4>(x + 4 * (at + i * THREADS));
        #pragma unroll
        for (int i = 0; i < UNROLL; ++i)
            if (at + i * THREADS < n) store_words(y + 4 * (at + i * THREADS), words[i]);
    }
    const i64 rest = 4 * n + threadIdx.x;
    if (blockIdx.x == 0 && rest < n_words) y[rest] = x[rest];
}

// nothing:  what a launch takes by itself
//
//   x  any array: whose GPU it is
//   traffic  0
extern "C" __global__ void __launch_bounds__(THREADS) nothing(const void* x) {}
