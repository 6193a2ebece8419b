// Rows gathered by number: token embeddings, and the rows of a step that are computed further. Rows times a number.
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
