// logit_softcap:  logits = cap * tanh(logits / cap), in place, every operation rounded in float32
//
//   logits [n] f32, any shape
//   grid (n / (4 THREADS), rounded up), block THREADS: a thread has 16 bytes, the last one what is left; bound by memory
//   traffic  8 * n
//   built with THREADS, a multiple of 32
#include "activation.cuh"
#include "words.cuh"

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
