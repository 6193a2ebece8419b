// Elementwise: the softcap of logits, and the gate of per-layer inputs. Bound by memory.
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
