// Elementwise: the softcap of logits, the gate of per-layer inputs, the bounds and biases of vision towers. Bound by
// memory.
// Built with THREADS, a multiple of 32.
#include "activation.cuh"
#include "words.cuh"

// logit_softcap:  logits = cap * tanh(logits / cap), in place, every operation rounded in float32
//
//   logits [n] f32, any shape
//   grid (n / (4 THREADS), rounded up), block THREADS: a thread has 16 bytes, the last one what is left
//   traffic  8 * n
extern "C" __global__ void __launch_bounds__(THREADS) logit_softcap(float* logits, i64 n, float cap) {
    const i64 at = 4 * ((i64)blockIdx.x * THREADS + threadIdx.x);
    if (at + 4 <= n) {
        Words<4> words = load_words<4>(logits + at);
        #pragma unroll
        for (u32& word : words.word) word = __float_as_uint(softcap(__uint_as_float(word), cap));
        store_words(logits + at, words);
    } else {
        for (i64 i = at; i < n; ++i) logits[i] = softcap(logits[i], cap);
    }
}

template <int n_words> __device__ __forceinline__ void gate_words(const bf16* gate, const bf16* inputs, bf16* out, i64 n,
                                                                  int width, i64 stride) {
    const i64 at = 2 * n_words * ((i64)blockIdx.x * THREADS + threadIdx.x);
    if (at >= n) return;
    const i64 row = at / width;
    Words<n_words> words = load_words<n_words>(gate + at);
    const Words<n_words> by = load_words<n_words>(inputs + row * stride + (at - row * width));
    #pragma unroll
    for (int i = 0; i < n_words; ++i)
        words.word[i] = pack_bf16(gelu_tanh(low_half(words.word[i])) * low_half(by.word[i]),
                                  gelu_tanh(high_half(words.word[i])) * high_half(by.word[i]));
    store_words(out + at, words);
}

// gate_per_layer:  out[t,:] = gelu_tanh(gate[t,:]) * inputs[t,first:first + width], rounded once
//
//   gate, out [n_rows, width] bf16; out may be gate   inputs [n_rows, stride] bf16; first a multiple of width
//   grid (n_rows * width / (8 THREADS), rounded up; 4 THREADS where width is no multiple of 8), block THREADS: a thread has
//   16 or 8 bytes of a row
//   traffic  6 * n_rows * width
extern "C" __global__ void __launch_bounds__(THREADS) gate_per_layer(
        const bf16* gate, const bf16* inputs, OUT bf16* out, i64 n_rows, int width, i64 stride, int first) {
    if (width % 8 == 0) gate_words<4>(gate, inputs + first, out, n_rows * width, width, stride);
    else gate_words<2>(gate, inputs + first, out, n_rows * width, width, stride);
}

// NaN stays: no comparison holds.
__device__ __forceinline__ float clamped(float x, float least, float most) {
    x = x < least ? least : x;
    return x > most ? most : x;
}

template <int n_words> __device__ __forceinline__ void clamp_words(const bf16* x, bf16* out, i64 n, int width, i64 stride,
                                                                   float least, float most) {
    const i64 at = 2 * n_words * ((i64)blockIdx.x * THREADS + threadIdx.x);
    if (at >= n) return;
    const i64 row = at / width;
    Words<n_words> words = load_words<n_words>(x + at);
    #pragma unroll
    for (u32& two : words.word)
        two = pack_bf16(clamped(low_half(two), least, most), clamped(high_half(two), least, most));
    store_words(out + row * stride + (at - row * width), words);
}

// clamp:  out[t,first:first + width] = min(max(x[t,:], bounds[0]), bounds[1])
//
//   x [n_rows, width] bf16   bounds [2] bf16   out [n_rows, stride] bf16, may be x   width, stride, first multiples of 4
//   grid, block as gate_per_layer; 16 bytes a thread where width, stride and first are multiples of 8
//   traffic  4 * n_rows * width + 4
extern "C" __global__ void __launch_bounds__(THREADS) clamp(
        const bf16* x, const bf16* bounds, bf16* out, i64 n_rows, int width, i64 stride, int first) {
    const float least = to_float(bounds[0]), most = to_float(bounds[1]);
    if (width % 8 == 0 && stride % 8 == 0 && first % 8 == 0)
        clamp_words<4>(x, out + first, n_rows * width, width, stride, least, most);
    else clamp_words<2>(x, out + first, n_rows * width, width, stride, least, most);
}

template <int n_words> __device__ __forceinline__ void bias_words(const bf16* x, const bf16* bias, const bf16* residual,
                                                                  bf16* out, i64 n, int width, bool is_gelu) {
    const i64 at = 2 * n_words * ((i64)blockIdx.x * THREADS + threadIdx.x);
    if (at >= n) return;
    Words<n_words> words = load_words<n_words>(x + at), more{};
    const Words<n_words> by = load_words<n_words>(bias + at % width);
    if (residual) more = load_words<n_words>(residual + at);
    #pragma unroll
    for (int i = 0; i < n_words; ++i) {
        float low = low_half(words.word[i]) + low_half(by.word[i]);
        float high = high_half(words.word[i]) + high_half(by.word[i]);
        if (is_gelu) low = gelu_tanh(low), high = gelu_tanh(high);
        if (residual) low += low_half(more.word[i]), high += high_half(more.word[i]);
        words.word[i] = pack_bf16(low, high);
    }
    store_words(out + at, words);
}

// add_bias:  out[t,:] = act(x[t,:] + bias) + residual[t,:], rounded once; act is gelu_tanh, or nothing
//
//   x, out [n_rows, width] bf16; out may be x or residual   bias [width] bf16   residual like x, or null
//   grid, block as gate_per_layer
//   traffic  4 * n_rows * width + 2 * width + 2 * n_rows * width * has_residual
extern "C" __global__ void __launch_bounds__(THREADS) add_bias(
        const bf16* x, const bf16* bias, const bf16* residual, OUT bf16* out, i64 n_rows, int width, bool is_gelu) {
    if (width % 8 == 0) bias_words<4>(x, bias, residual, out, n_rows * width, width, is_gelu);
    else bias_words<2>(x, bias, residual, out, n_rows * width, width, is_gelu);
}
