// One block's tile of a matrix product: how it lies in shared memory, what its warps read of it and multiply, and how
// the results leave. Weights are the 16-row side of mma.sync m16n8k16, tokens its 8-wide side.
//
//   A stage of the ring is ROWS x DEPTH weights, then TOKENS x DEPTH of x: rows of 16-byte chunks, swizzled. Where memory
//   has weights as [n_in, n_out] (is_in_out), their part of the stage is DEPTH x ROWS instead.
//   Gated, 8 rows of gate and the 8 of up for the same outputs alternate in a tile: a thread's fragment holds both.
//   built with ROWS, TOKENS (of a block's tile; gated, ROWS / 2 outputs), WARP_ROWS, WARP_TOKENS, DEPTH (k of a stage),
//   STAGES
#pragma once
#include "activation.cuh"
#include "mma.cuh"

constexpr int n_threads = 32 * (ROWS / WARP_ROWS) * (TOKENS / WARP_TOKENS);
constexpr int chunks = DEPTH / 8;                       // 16-byte chunks in a tile row
constexpr int rows_per_pass = n_threads / chunks;       // tile rows that the block copies at a time
constexpr int stage_size = (ROWS + TOKENS) * DEPTH;
constexpr int blocks_of_rows = WARP_ROWS / 16, blocks_of_tokens = WARP_TOKENS / 8;
static_assert(rows_per_pass % 16 == 0 && ROWS % rows_per_pass == 0, "a thread's rows lie a fixed distance apart");
static_assert(DEPTH == 32 || DEPTH == 64, "the swizzle is made for tile rows of 64 and 128 bytes");

enum Activation { NONE, GELU_TANH, SILU };

// ldmatrix reads the same chunk of 8 consecutive rows: this moves them to different banks.
__device__ __forceinline__ int swizzle(int row) { return row / (8 / chunks) % chunks; }

__device__ __forceinline__ int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Copies 8 values, zeros from n_left on, n_left a multiple of 4. Rows of no multiple of 16 bytes take 8-byte copies.
__device__ __forceinline__ void copy_chunk(bf16* to, const bf16* from, int n_left, bool is_aligned, const bf16* somewhere) {
    if (is_aligned) {
        copy_async<16>(to, n_left > 0 ? from : somewhere, n_left > 0);
    } else {
        copy_async<8>(to, n_left > 0 ? from : somewhere, n_left > 0);
        copy_async<8>(to + 4, n_left > 4 ? from + 4 : somewhere, n_left > 4);
    }
}

// Fragments of a stage at 16 of its k: a 16-row block of weights, and all the warp's tokens.
template <bool is_in_out> __device__ __forceinline__ void load_rows(u32 (&a)[4], const bf16* stage, int warp_row, int i,
                                                                    int k16) {
    const int lane = threadIdx.x % 32, row = warp_row + lane % 16;
    if constexpr (is_in_out) {                          // matrices of 8 k x 8 rows, which arrive transposed
        const int k = 16 * k16 + lane / 16 * 8 + lane % 8;
        load_matrix_x4_trans(a, stage + k * ROWS + (((warp_row + 16 * i) / 8 + lane / 8 % 2) ^ (k % 8)) * 8);
    } else {
        load_matrix_x4(a, stage + (row + 16 * i) * DEPTH + ((2 * k16 + lane / 16) ^ swizzle(row)) * 8);
    }
}
__device__ __forceinline__ void load_tokens(u32 (&b)[blocks_of_tokens][2], const bf16* stage, int warp_token, int k16) {
    const int lane = threadIdx.x % 32, token = warp_token + (blocks_of_tokens > 1 ? lane / 16 * 8 : 0) + lane % 8;
    const bf16* from = stage + (ROWS + token) * DEPTH + ((2 * k16 + lane / 8 % 2) ^ swizzle(token)) * 8;
    if constexpr (blocks_of_tokens == 1) {
        load_matrix_x2(b[0], from);
    } else {
        #pragma unroll
        for (int j = 0; j < blocks_of_tokens; j += 2) {
            u32 two[4];
            load_matrix_x4(two, from + j * 8 * DEPTH);
            b[j][0] = two[0], b[j][1] = two[1], b[j + 1][0] = two[2], b[j + 1][1] = two[3];
        }
    }
}

__device__ __forceinline__ float activate(float gate, int activation) {
    return activation == GELU_TANH ? gelu_tanh(gate) : silu(gate);
}

typedef float Sums[blocks_of_rows][blocks_of_tokens][4];

// sum += the stage's weights times its tokens; the next fragments load while these multiply.
template <bool is_in_out = false>
__device__ __forceinline__ void multiply(Sums& sum, const bf16* stage, int warp_row, int warp_token) {
    u32 a[2][4], b[2][blocks_of_tokens][2];
    load_tokens(b[0], stage, warp_token, 0);
    load_rows<is_in_out>(a[0], stage, warp_row, 0, 0);
    #pragma unroll
    for (int n = 0; n < DEPTH / 16 * blocks_of_rows; ++n) {
        const int k16 = n / blocks_of_rows, i = n % blocks_of_rows;
        if (n + 1 < DEPTH / 16 * blocks_of_rows)
            load_rows<is_in_out>(a[(n + 1) % 2], stage, warp_row, (n + 1) % blocks_of_rows, (n + 1) / blocks_of_rows);
        if (i == 0 && k16 + 1 < DEPTH / 16) load_tokens(b[(k16 + 1) % 2], stage, warp_token, k16 + 1);
        #pragma unroll
        for (int j = 0; j < blocks_of_tokens; ++j) mma_bf16(sum[i][j], a[n % 2], b[k16 % 2][j][0], b[k16 % 2][j][1]);
    }
}

// Calls visit(four sums, their place in partials). No load crosses __syncwarp: without it the compiler starts them all at
// once, and has no registers left for what they return.
template <class F> __device__ __forceinline__ void each_quad(Sums& sum, F visit) {
    #pragma unroll
    for (int i = 0; i < blocks_of_rows; ++i) {
        #pragma unroll
        for (int j = 0; j < blocks_of_tokens; ++j) visit(sum[i][j], (i * blocks_of_tokens + j) * n_threads);
        __syncwarp();
    }
}

__device__ __forceinline__ void clear(Sums& sum) {
    each_quad(sum, [](float (&s)[4], int) { s[0] = s[1] = s[2] = s[3] = 0.f; });
}

// Keeps what the lanes of a fragment write to consecutive tokens of a staged tile in different banks.
__device__ __forceinline__ int bank_mask(int token) { return token / 2 % 4 * 8; }

// Puts the results into shared memory as [TOKENS][width], columns by exclusive or with the token's bank_mask.
template <bool is_gated>
__device__ __forceinline__ void lay_out(const Sums& sum, float* staged, int warp_row, int warp_token, int activation) {
    constexpr int width = is_gated ? ROWS / 2 : ROWS;
    const int group = threadIdx.x % 32 / 4, pair = threadIdx.x % 4, mask = bank_mask(2 * pair);
    #pragma unroll
    for (int i = 0; i < blocks_of_rows; ++i)
        #pragma unroll
        for (int j = 0; j < blocks_of_tokens; ++j) {
            const float (&s)[4] = sum[i][j];
            float* const to = staged + (warp_token + 8 * j + 2 * pair) * width;
            if constexpr (is_gated) {
                const int column = (warp_row / 2 + 8 * i + group) ^ mask;
                to[column] = activate(s[0], activation) * s[2];
                to[column + width] = activate(s[1], activation) * s[3];
            } else {
                const int row = warp_row + 16 * i + group;
                to[row ^ mask] = s[0];
                to[(row ^ mask) + width] = s[1];
                to[(row + 8) ^ mask] = s[2];
                to[((row + 8) ^ mask) + width] = s[3];
            }
        }
}
