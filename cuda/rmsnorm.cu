// RMSNorm of whole rows: a row stays in the registers of one block between the steps, in bfloat16.
//
// Constants: WIDTH, bf16 of one access (8: 16 bytes, where rows are a multiple of that; else 4), and CHUNKS, accesses of
// a thread, so that WIDTH * CHUNKS * block >= hidden. Any hidden that is a multiple of WIDTH.
// Grid: the rows; block: a multiple of 32 threads.
// Sums: each thread its own chunks in order, then a warp's lanes in a tree, then the warps in order. All of that follows
// from hidden alone, so a row's bits do not depend on the other rows.
// Bound by memory: what a sum is followed by is in flight before it; the cache holds the weights.
#include "words.cuh"

constexpr int WORDS = WIDTH / 2;
// Rows of 16384 in blocks whose registers hold them; thin blocks are for short rows.
constexpr int MOST_THREADS = WIDTH * CHUNKS == 8 ? 256 : (16384 / (WIDTH * CHUNKS) + 31) / 32 * 32;

struct Row {
    Words<WORDS> chunk[CHUNKS];

    // Zeros beyond `hidden`. A null pointer reads as zeros too.
    __device__ __forceinline__ void load(const bf16* from, int hidden) {
        #pragma unroll
        for (int i = 0; i < CHUNKS; ++i) {
            const int at = WIDTH * (i * blockDim.x + threadIdx.x);
            chunk[i] = from && at < hidden ? load_words<WORDS>(from + at) : Words<WORDS>{};
        }
    }

    __device__ __forceinline__ void store(bf16* to, int hidden) const {
        #pragma unroll
        for (int i = 0; i < CHUNKS; ++i) {
            const int at = WIDTH * (i * blockDim.x + threadIdx.x);
            if (at < hidden) store_words(to + at, chunk[i]);
        }
    }

    __device__ __forceinline__ float sum_of_squares() const {
        float sum = 0.f;
        #pragma unroll
        for (int i = 0; i < CHUNKS * WORDS; ++i) {
            const u32 two = chunk[i / WORDS].word[i % WORDS];
            sum += low_half(two) * low_half(two);
            sum += high_half(two) * high_half(two);
        }
        return sum;
    }
};

// Adds over a block, in every thread. `part` has two halves, so that one barrier a sum is enough.
struct BlockSum {
    float (&part)[2][MOST_THREADS / 32];
    int half = 0;

    __device__ __forceinline__ float operator()(float x) {
        x = warp_sum(x);
        const int n_warps = blockDim.x / 32;
        if (n_warps == 1) return x;
        half ^= 1;
        if (threadIdx.x % 32 == 0) part[half][threadIdx.x / 32] = x;
        __syncthreads();
        x = 0.f;
        for (int i = 0; i < n_warps; ++i) x += part[half][i];
        return x;
    }
};

__device__ __forceinline__ float inverse_rms(const Row& row, int hidden, float eps, BlockSum& block_sum) {
    return rsqrtf(block_sum(row.sum_of_squares()) / hidden + eps);
}

// x * scale * (w + offset); without weights x * scale.
__device__ __forceinline__ float normed(float x, float scale, bool has_weight, float w, float offset) {
    return has_weight ? x * scale * (w + offset) : x * scale;
}

__device__ __forceinline__ void apply_norm(Row& row, float scale, bool has_weight, const Row& weight, float offset) {
    #pragma unroll
    for (int i = 0; i < CHUNKS * WORDS; ++i) {
        u32& two = row.chunk[i / WORDS].word[i % WORDS];
        const u32 w = weight.chunk[i / WORDS].word[i % WORDS];
        two = pack_bf16(normed(low_half(two), scale, has_weight, low_half(w), offset),
                        normed(high_half(two), scale, has_weight, high_half(w), offset));
    }
}

// rms_norm:  y[t,:] = x[t,:] / sqrt(mean(x[t,:]^2) + eps) * (weight + weight_offset), rounded once
//
//   x [n_rows, hidden] bf16   weight [hidden] bf16, or null to multiply by nothing   y like x, may be x
//   traffic  4 * n_rows * hidden + 2 * hidden * has_weight
extern "C" __global__ void __launch_bounds__(MOST_THREADS) rms_norm(
        const bf16* x, const bf16* weight, OUT bf16* y, int hidden, float eps, float weight_offset) {
    __shared__ float part[2][MOST_THREADS / 32];
    BlockSum block_sum{part};
    const size_t at = (size_t)blockIdx.x * hidden;              // 64 bits: tokens * hidden passes 2^31
    Row row, w;
    row.load(x + at, hidden);
    w.load(weight, hidden);
    const float scale = inverse_rms(row, hidden, eps, block_sum);
    apply_norm(row, scale, weight != nullptr, w, weight_offset);
    row.store(y + at, hidden);
}

// add_norm:  residual[t,:] = (residual[t,:] + norm(branch[t,:]) * (post_weight + weight_offset)) * layer_scalar
//            y[t,:] = norm(residual[t,:]) * (next_weight + weight_offset),  norm(x) = x / sqrt(mean(x^2) + eps)
//
//   residual, branch, y [n_rows, hidden] bf16; y may be branch   next_weight [hidden] bf16
//   post_weight [hidden] bf16, or null: the branch is added as it is   layer_scalar [1] bf16, or null
//   The new residual is rounded once, and what is stored is what is normed; y is rounded once.
//   traffic  8 * n_rows * hidden + 2 * hidden * (1 + has_post_weight) + 2 * has_layer_scalar
extern "C" __global__ void __launch_bounds__(MOST_THREADS) add_norm(
        bf16* residual, const bf16* branch, const bf16* post_weight, const bf16* next_weight, const bf16* layer_scalar,
        OUT bf16* y, int hidden, float eps, float weight_offset) {
    __shared__ float part[2][MOST_THREADS / 32];
    BlockSum block_sum{part};
    const size_t at = (size_t)blockIdx.x * hidden;
    const float scalar = layer_scalar ? to_float(*layer_scalar) : 1.f;
    const bool has_weight = post_weight != nullptr;
    Row added, row, post;
    added.load(branch + at, hidden);
    row.load(residual + at, hidden);
    post.load(post_weight, hidden);
    const float scale = has_weight ? inverse_rms(added, hidden, eps, block_sum) : 1.f;
    #pragma unroll
    for (int i = 0; i < CHUNKS * WORDS; ++i) {
        u32& two = row.chunk[i / WORDS].word[i % WORDS];
        const u32 more = added.chunk[i / WORDS].word[i % WORDS], w = post.chunk[i / WORDS].word[i % WORDS];
        const float low = normed(low_half(more), scale, has_weight, low_half(w), weight_offset);
        const float high = normed(high_half(more), scale, has_weight, high_half(w), weight_offset);
        two = pack_bf16((low_half(two) + low) * scalar, (high_half(two) + high) * scalar);
    }
    row.store(residual + at, hidden);
    Row& next = added;                      // loaded only now, to save registers; it arrives during the second sum
    next.load(next_weight, hidden);
    apply_norm(row, inverse_rms(row, hidden, eps, block_sum), true, next, weight_offset);
    row.store(y + at, hidden);
}
