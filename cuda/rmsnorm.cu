// RMSNorm and LayerNorm of whole rows: a row stays in the registers of one block between the steps, in bfloat16.
//
// Constants: WIDTH, bf16 of one access (8: 16 bytes, where rows are a multiple of that; else 4), and CHUNKS, accesses of
// a thread, so that WIDTH * CHUNKS * block >= hidden. Any hidden that is a multiple of WIDTH. ROUND_FIRST: rms_norm and
// add_norm round x / rms(x) to bf16 before they multiply by a weight (1: Llama 4), or they do not (0).
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

    __device__ __forceinline__ float sum() const {
        float sum = 0.f;
        #pragma unroll
        for (int i = 0; i < CHUNKS * WORDS; ++i) {
            const u32 two = chunk[i / WORDS].word[i % WORDS];
            sum += low_half(two);
            sum += high_half(two);
        }
        return sum;
    }

    // Of distances from `mean`; what lies beyond `hidden` has none.
    __device__ __forceinline__ float sum_of_squares_around(float mean, int hidden) const {
        float sum = 0.f;
        #pragma unroll
        for (int i = 0; i < CHUNKS; ++i) {
            if (WIDTH * (i * (int)blockDim.x + (int)threadIdx.x) >= hidden) continue;
            #pragma unroll
            for (const u32 two : chunk[i].word) {
                sum += (low_half(two) - mean) * (low_half(two) - mean);
                sum += (high_half(two) - mean) * (high_half(two) - mean);
            }
        }
        return sum;
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

__device__ __forceinline__ float rounded(float x) { return to_float(to_bf16(x)); }

// x * scale * (w + offset); without weights x * scale.
__device__ __forceinline__ float normed(float x, float scale, bool has_weight, float w, float offset) {
    if (ROUND_FIRST) return has_weight ? rounded(x * scale) * (w + offset) : rounded(x * scale);
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

// rms_norm:  y[t,:] = x[t,:] / sqrt(mean(x[t,:]^2) + eps) * (weight + weight_offset), rounded once, or as ROUND_FIRST says
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

// residual[at..] = (residual + norm(branch) * (post_weight + weight_offset)) * layer_scalar, rounded once; what is stored.
__device__ __forceinline__ Row add_branch(bf16* residual, const bf16* branch, const bf16* post_weight,
                                          const bf16* layer_scalar, size_t at, int hidden, float eps, float weight_offset,
                                          BlockSum& block_sum) {
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
    return row;
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
    Row row = add_branch(residual, branch, post_weight, layer_scalar, at, hidden, eps, weight_offset, block_sum), next;
    next.load(next_weight, hidden);         // only now, to save registers; it arrives during the second sum
    apply_norm(row, inverse_rms(row, hidden, eps, block_sum), true, next, weight_offset);
    row.store(y + at, hidden);
}

// add_residual:  add_norm without the next norm
//
//   traffic  6 * n_rows * hidden + 2 * hidden * has_post_weight + 2 * has_layer_scalar
extern "C" __global__ void __launch_bounds__(MOST_THREADS) add_residual(
        bf16* residual, const bf16* branch, const bf16* post_weight, const bf16* layer_scalar, int hidden, float eps,
        float weight_offset) {
    __shared__ float part[2][MOST_THREADS / 32];
    BlockSum block_sum{part};
    const size_t at = (size_t)blockIdx.x * hidden;
    add_branch(residual, branch, post_weight, layer_scalar, at, hidden, eps, weight_offset, block_sum);
}

// add_norms:  y[t,:] = norm(a[t,:]) * (a_weight + weight_offset) + norm(b[t,:]) * (b_weight + weight_offset), rounded once
//
//   a, b, y [n_rows, hidden] bf16; y may be a or b   a_weight, b_weight [hidden] bf16
//   traffic  6 * n_rows * hidden + 4 * hidden
extern "C" __global__ void __launch_bounds__(MOST_THREADS) add_norms(
        const bf16* a, const bf16* a_weight, const bf16* b, const bf16* b_weight, OUT bf16* y, int hidden, float eps,
        float weight_offset) {
    __shared__ float part[2][MOST_THREADS / 32];
    BlockSum block_sum{part};
    const size_t at = (size_t)blockIdx.x * hidden;
    Row row, other, w;
    row.load(a + at, hidden);
    other.load(b + at, hidden);
    const float scale = inverse_rms(row, hidden, eps, block_sum);
    w.load(a_weight, hidden);
    const float other_scale = inverse_rms(other, hidden, eps, block_sum);
    #pragma unroll
    for (int i = 0; i < CHUNKS; ++i) {
        const int from = WIDTH * (i * blockDim.x + threadIdx.x);
        const Words<WORDS> v = from < hidden ? load_words<WORDS>(b_weight + from) : Words<WORDS>{};     // saves registers
        #pragma unroll
        for (int j = 0; j < WORDS; ++j) {
            u32& two = row.chunk[i].word[j];
            const u32 more = other.chunk[i].word[j], x = w.chunk[i].word[j], z = v.word[j];
            two = pack_bf16(low_half(two) * scale * (low_half(x) + weight_offset)
                                + low_half(more) * other_scale * (low_half(z) + weight_offset),
                            high_half(two) * scale * (high_half(x) + weight_offset)
                                + high_half(more) * other_scale * (high_half(z) + weight_offset));
        }
    }
    row.store(y + at, hidden);
}

// router_norm:  y[t,:] = bf16(bf16(bf16(norm(x[t,:])) * scale) * factor): transformers' roundings, which decide experts
//
//   x, y [n_rows, hidden] bf16; y may be x   scale [hidden] bf16
//   traffic  4 * n_rows * hidden + 2 * hidden
extern "C" __global__ void __launch_bounds__(MOST_THREADS) router_norm(
        const bf16* x, const bf16* scale, OUT bf16* y, int hidden, float factor, float eps) {
    __shared__ float part[2][MOST_THREADS / 32];
    BlockSum block_sum{part};
    const size_t at = (size_t)blockIdx.x * hidden;
    Row row, w;
    row.load(x + at, hidden);
    w.load(scale, hidden);
    const float inverse = inverse_rms(row, hidden, eps, block_sum);
    #pragma unroll
    for (int i = 0; i < CHUNKS * WORDS; ++i) {
        u32& two = row.chunk[i / WORDS].word[i % WORDS];
        const u32 by = w.chunk[i / WORDS].word[i % WORDS];
        two = pack_bf16(rounded(rounded(low_half(two) * inverse) * low_half(by)) * factor,
                        rounded(rounded(high_half(two) * inverse) * high_half(by)) * factor);
    }
    row.store(y + at, hidden);
}

// mix_per_layer:  c = bf16(context[r,:] * factor), y[r,:] = bf16(bf16(bf16(norm(c) * weight) + tokens[r,:]) / sqrt(2))
//
//   context, tokens, y [n_rows, width] bf16, n_rows tokens times layers; y may be context or tokens   weight [width] bf16
//   traffic  6 * n_rows * width + 2 * width
extern "C" __global__ void __launch_bounds__(MOST_THREADS) mix_per_layer(
        const bf16* context, const bf16* tokens, const bf16* weight, OUT bf16* y, int width, float factor, float eps) {
    __shared__ float part[2][MOST_THREADS / 32];
    BlockSum block_sum{part};
    const size_t at = (size_t)blockIdx.x * width;
    Row row, token, w;
    row.load(context + at, width);
    token.load(tokens + at, width);
    w.load(weight, width);
    #pragma unroll
    for (int i = 0; i < CHUNKS * WORDS; ++i) {
        u32& two = row.chunk[i / WORDS].word[i % WORDS];
        two = pack_bf16(low_half(two) * factor, high_half(two) * factor);
    }
    const float inverse = inverse_rms(row, width, eps, block_sum), root = 0.70710678f;
    #pragma unroll
    for (int i = 0; i < CHUNKS * WORDS; ++i) {
        u32& two = row.chunk[i / WORDS].word[i % WORDS];
        const u32 by = w.chunk[i / WORDS].word[i % WORDS], more = token.chunk[i / WORDS].word[i % WORDS];
        two = pack_bf16(rounded(rounded(low_half(two) * inverse * low_half(by)) + low_half(more)) * root,
                        rounded(rounded(high_half(two) * inverse * high_half(by)) + high_half(more)) * root);
    }
    row.store(y + at, width);
}

// layer_norm:  y[t,:] = (x[t,:] - m) / sqrt(mean((x[t,:] - m)^2) + eps) * weight + bias, m = mean(x[t,:]), rounded once
//
//   x, y [n_rows, hidden] bf16; y may be x   weight, bias [hidden] bf16
//   traffic  4 * n_rows * hidden + 4 * hidden
extern "C" __global__ void __launch_bounds__(MOST_THREADS) layer_norm(
        const bf16* x, const bf16* weight, const bf16* bias, OUT bf16* y, int hidden, float eps) {
    __shared__ float part[2][MOST_THREADS / 32];
    BlockSum block_sum{part};
    const size_t at = (size_t)blockIdx.x * hidden;
    Row row, w, b;
    row.load(x + at, hidden);
    const float mean = block_sum(row.sum()) / hidden;
    w.load(weight, hidden);
    b.load(bias, hidden);
    const float scale = rsqrtf(block_sum(row.sum_of_squares_around(mean, hidden)) / hidden + eps);
    #pragma unroll
    for (int i = 0; i < CHUNKS * WORDS; ++i) {
        u32& two = row.chunk[i / WORDS].word[i % WORDS];
        const u32 by = w.chunk[i / WORDS].word[i % WORDS], more = b.chunk[i / WORDS].word[i % WORDS];
        two = pack_bf16((low_half(two) - mean) * scale * low_half(by) + low_half(more),
                        (high_half(two) - mean) * scale * high_half(by) + high_half(more));
    }
    row.store(y + at, hidden);
}
