// Rows gathered by number: token embeddings, the rows of a step that are computed further, the places of a picture's
// patches, and the patches that become one soft token. Rows placed by number: soft tokens. Rows times a number.
//
// Grid (n rows of the result, parts of a row), block THREADS; a thread moves one access of 16, 8 or 4 bytes, the most that
// the bytes of a row are a multiple of. Bound by memory. Constants: THREADS, a multiple of 32.
// A row number outside the table writes NaN: nothing is read out of bounds, and nothing plausible comes of it.
#include "words.cuh"

template <int n_words> __device__ __forceinline__ void embed_row(const bf16* from, bf16* to, bool is_inside, int hidden,
                                                                 float scale) {
    const int at = 2 * n_words * (blockIdx.y * THREADS + threadIdx.x);
    if (at >= hidden) return;
    Words<n_words> words;
    #pragma unroll
    for (int i = 0; i < n_words; ++i) words.word[i] = 0xFFFFFFFFu;
    if (is_inside) {
        words = load_words<n_words>(from + at);
        #pragma unroll
        for (u32& two : words.word) two = pack_bf16(low_half(two) * scale, high_half(two) * scale);
    }
    store_words(to + at, words);
}

// embed:  out[t,:] = table[token_ids[t],:] * scale, rounded once
//
//   table [vocab, hidden] bf16   token_ids [n_tokens] i32   out [n_tokens, hidden] bf16
//   traffic  4 * n_tokens + 2 * n_distinct * hidden + 2 * n_tokens * hidden
extern "C" __global__ void __launch_bounds__(THREADS) embed(
        const bf16* table, const int* token_ids, OUT bf16* out, int vocab, int hidden, float scale) {
    const int id = token_ids[blockIdx.x];
    const bf16* from = table + (i64)id * hidden;
    bf16* to = out + (i64)blockIdx.x * hidden;
    const bool is_inside = 0 <= id && id < vocab;
    if (hidden % 8 == 0) embed_row<4>(from, to, is_inside, hidden, scale);
    else embed_row<2>(from, to, is_inside, hidden, scale);
}

template <int n_words> __device__ __forceinline__ void copy_row(const u32* from, u32* to, bool is_inside, int row_words) {
    const int at = n_words * (blockIdx.y * THREADS + threadIdx.x);
    if (at >= row_words) return;
    Words<n_words> words;
    #pragma unroll
    for (int i = 0; i < n_words; ++i) words.word[i] = 0xFFFFFFFFu;
    if (is_inside) words = load_words<n_words>(from + at);
    store_words(to + at, words);
}

// select_rows:  out[i,:] = x[rows[i],:], bit for bit
//
//   x [n, row_words] of 4 bytes each, whatever they are   rows [n_kept] i32   out [n_kept, row_words]
//   traffic  4 * n_kept + 4 * n_distinct * row_words + 4 * n_kept * row_words
extern "C" __global__ void __launch_bounds__(THREADS) select_rows(
        const void* x, const int* rows, OUT void* out, int n, int row_words) {
    const int row = rows[blockIdx.x];
    const u32* from = (const u32*)x + (i64)row * row_words;
    u32* to = (u32*)out + (i64)blockIdx.x * row_words;
    const bool is_inside = 0 <= row && row < n;
    if (row_words % 4 == 0) copy_row<4>(from, to, is_inside, row_words);
    else if (row_words % 2 == 0) copy_row<2>(from, to, is_inside, row_words);
    else copy_row<1>(from, to, is_inside, row_words);
}

// place_rows:  out[rows[i],:] = x[source[i],:], bit for bit
//
//   x [n, row_words], out [n_out, row_words] of 4 bytes each   source, rows [n_placed] i32, rows all different
//   A number of `rows` outside out places nothing. Other rows of out stay as they are.
//   traffic  8 * n_placed + 4 * n_distinct * row_words + 4 * n_placed * row_words
extern "C" __global__ void __launch_bounds__(THREADS) place_rows(
        const void* x, const int* source, const int* rows, void* out, int n, int n_out, int row_words) {
    const int row = source[blockIdx.x], to_row = rows[blockIdx.x];
    if (to_row < 0 || to_row >= n_out) return;
    const u32* from = (const u32*)x + (i64)row * row_words;
    u32* to = (u32*)out + (i64)to_row * row_words;
    const bool is_inside = 0 <= row && row < n;
    if (row_words % 4 == 0) copy_row<4>(from, to, is_inside, row_words);
    else if (row_words % 2 == 0) copy_row<2>(from, to, is_inside, row_words);
    else copy_row<1>(from, to, is_inside, row_words);
}

template <int n_words> __device__ __forceinline__ void add_row(const bf16* x, const bf16* first, const bf16* second,
                                                               bf16* to, bool is_inside, int hidden) {
    const int at = 2 * n_words * (blockIdx.y * THREADS + threadIdx.x);
    if (at >= hidden) return;
    Words<n_words> words;
    #pragma unroll
    for (int i = 0; i < n_words; ++i) words.word[i] = 0xFFFFFFFFu;
    if (is_inside) {
        const Words<n_words> own = load_words<n_words>(x + at);
        words = load_words<n_words>(first + at);
        if (second) {
            const Words<n_words> more = load_words<n_words>(second + at);
            #pragma unroll
            for (int i = 0; i < n_words; ++i)
                words.word[i] = pack_bf16(low_half(words.word[i]) + low_half(more.word[i]),
                                          high_half(words.word[i]) + high_half(more.word[i]));
        }
        #pragma unroll
        for (int i = 0; i < n_words; ++i)
            words.word[i] = pack_bf16(low_half(own.word[i]) + low_half(words.word[i]),
                                      high_half(own.word[i]) + high_half(words.word[i]));
    }
    store_words(to + at, words);
}

// add_rows:  out[i,:] = bf16(x[i,:] + bf16(table[rows[i,0],:] + table[rows[i,1],:])), or with n_axes 1 the first of both
//
//   x, out [n, hidden] bf16; out may be x   table [n_places, hidden] bf16   rows [n, n_axes] i32, n_axes 1 or 2
//   traffic  4 * n * n_axes + 4 * n * hidden + 2 * n_distinct * hidden
extern "C" __global__ void __launch_bounds__(THREADS) add_rows(
        const bf16* x, const bf16* table, const int* rows, OUT bf16* out, int n_places, int n_axes, int hidden) {
    const i64 at = (i64)blockIdx.x * hidden;
    const int a = rows[(i64)blockIdx.x * n_axes], b = n_axes == 2 ? rows[(i64)blockIdx.x * 2 + 1] : a;
    const bool is_inside = 0 <= a && a < n_places && 0 <= b && b < n_places;
    const bf16* first = table + (i64)a * hidden;
    const bf16* second = n_axes == 2 ? table + (i64)b * hidden : nullptr;
    if (hidden % 8 == 0) add_row<4>(x + at, first, second, out + at, is_inside, hidden);
    else add_row<2>(x + at, first, second, out + at, is_inside, hidden);
}

template <int n_words> __device__ __forceinline__ void pool_row(const bf16* x, const int* group, const bf16* bias,
                                                                const bf16* scale, bf16* to, int n, int k, int hidden,
                                                                float factor) {
    const int at = 2 * n_words * (blockIdx.y * THREADS + threadIdx.x);
    if (at >= hidden) return;
    float sum[2 * n_words] = {};
    #pragma unroll 4
    for (int j = 0; j < k; ++j) {
        const int row = group[j];
        Words<n_words> words;
        #pragma unroll
        for (int i = 0; i < n_words; ++i) words.word[i] = 0xFFFFFFFFu;
        if (0 <= row && row < n) words = load_words<n_words>(x + (i64)row * hidden + at);
        #pragma unroll
        for (int i = 0; i < n_words; ++i) {
            sum[2 * i] += low_half(words.word[i]);
            sum[2 * i + 1] += high_half(words.word[i]);
        }
    }
    Words<n_words> less{}, by{}, pooled;
    if (bias) less = load_words<n_words>(bias + at);
    if (scale) by = load_words<n_words>(scale + at);
    #pragma unroll
    for (int i = 0; i < n_words; ++i) {
        const u32 mean = pack_bf16(sum[2 * i] / k, sum[2 * i + 1] / k);
        // The product is rounded before the difference, as the reference does.
        const float low = __fmul_rn(low_half(mean), factor) - low_half(less.word[i]);
        const float high = __fmul_rn(high_half(mean), factor) - high_half(less.word[i]);
        pooled.word[i] = scale ? pack_bf16(low * low_half(by.word[i]), high * high_half(by.word[i])) : pack_bf16(low, high);
    }
    store_words(to + at, pooled);
}

// pool_rows:  out[b,:] = bf16((bf16(mean of x[groups[b,j],:] over j) * factor - bias) * scale), sums in float32, j ascending
//
//   x [n, hidden] bf16   groups [n_out, k] i32   bias, scale [hidden] bf16, or null   out [n_out, hidden] bf16
//   traffic  4 * n_out * k + 2 * n_distinct * hidden + 2 * n_out * hidden + 2 * hidden * (has_bias + has_scale)
extern "C" __global__ void __launch_bounds__(THREADS) pool_rows(
        const bf16* x, const int* groups, const bf16* bias, const bf16* scale, OUT bf16* out, int n, int k, int hidden,
        float factor) {
    const int* group = groups + (i64)blockIdx.x * k;
    bf16* to = out + (i64)blockIdx.x * hidden;
    if (hidden % 8 == 0) pool_row<4>(x, group, bias, scale, to, n, k, hidden, factor);
    else pool_row<2>(x, group, bias, scale, to, n, k, hidden, factor);
}

template <int n_words> __device__ __forceinline__ void scale_row(const bf16* from, const float* weights, bf16* to, int k,
                                                                 int hidden) {
    const int at = 2 * n_words * (blockIdx.y * THREADS + threadIdx.x);
    if (at >= hidden) return;
    const Words<n_words> words = load_words<n_words>(from + at);
    for (int s = 0; s < k; ++s) {
        const float weight = to_float(to_bf16(weights[s]));
        Words<n_words> scaled;
        #pragma unroll
        for (int i = 0; i < n_words; ++i)
            scaled.word[i] = pack_bf16(low_half(words.word[i]) * weight, high_half(words.word[i]) * weight);
        store_words(to + (i64)s * hidden + at, scaled);
    }
}

// scale_rows:  out[t * k + s,:] = bf16(x[t,:] * bf16(weights[t,s]))
//
//   x [n_tokens, hidden] bf16   weights [n_tokens, k] f32   out [n_tokens * k, hidden] bf16
//   traffic  2 * n_tokens * hidden + 4 * n_tokens * k + 2 * n_tokens * k * hidden
extern "C" __global__ void __launch_bounds__(THREADS) scale_rows(
        const bf16* x, const float* weights, OUT bf16* out, int k, int hidden) {
    const i64 token = blockIdx.x;
    const bf16* from = x + token * hidden;
    const float* by = weights + token * k;
    bf16* to = out + token * k * hidden;
    if (hidden % 8 == 0) scale_row<4>(from, by, to, k, hidden);
    else scale_row<2>(from, by, to, k, hidden);
}
