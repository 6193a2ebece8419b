// Rotary embedding: the angles of a step, and per-head norm + rotation + KV cache write, fused. What grows queries with
// their position, where a layer has no rotation.
#include "words.cuh"

constexpr int ANGLE_THREADS = 256;

// cos and sin of x, |x| <= 2^24, within 1.5e-7. The multiple of pi/2 is taken off in float64: its error, n * 2^-54 for
// n <= 1.1e7, is 6e-10. The rest, |r| <= pi/4, is rounded to float32 (3e-8) and goes through the Taylor series, which end
// at r^10/10! and r^9/9! (2e-9 short), in float32 (9e-8).
__device__ __forceinline__ void cos_sin(float x, float* cos, float* sin) {
    const double turns = rint((double)x * 0.63661977236758134308);              // 2 / pi
    const float r = (float)((double)x - turns * 1.57079632679489661923);        // fused or not
    const float z = r * r;
    const float s = r + r * z * (-1.f / 6 + z * (1.f / 120 + z * (-1.f / 5040 + z * (1.f / 362880))));
    const float c = 1.f + z * (-1.f / 2 + z * (1.f / 24 + z * (-1.f / 720 + z * (1.f / 40320 + z * (-1.f / 3628800)))));
    const int quarter = (int)turns & 3;
    *cos = quarter == 0 ? c : quarter == 1 ? -s : quarter == 2 ? -c : s;
    *sin = quarter == 0 ? s : quarter == 1 ? c : quarter == 2 ? -s : -c;
}

// rope_angles:  out[t,0,j] = cos(a), out[t,1,j] = sin(a),  a = positions[t,c] * inv_freq[j] rounded to float32; of two
//               columns of positions c is 0 in the first half of the pairs, 1 in the second
//
//   positions [n_tokens, n_axes] i32, below 2^24, n_axes 1 or 2   inv_freq [n_pairs] f32, at most 1
//   out [n_tokens, 2, n_pairs] f32
//   grid (n_tokens, parts of n_pairs), block up to 256: a thread has an angle; bound by memory, by latency where small
//   traffic  4 * n_tokens * n_axes + 4 * n_pairs + 8 * n_tokens * n_pairs
extern "C" __global__ void __launch_bounds__(ANGLE_THREADS) rope_angles(
        const int* positions, const float* inv_freq, OUT float* out, int n_pairs, int n_axes) {
    const int j = blockIdx.y * blockDim.x + threadIdx.x;
    if (j >= n_pairs) return;
    float* const row = out + (size_t)blockIdx.x * 2 * n_pairs;
    float cos, sin;
    const int position = positions[(size_t)blockIdx.x * n_axes + (n_axes == 2 && 2 * j >= n_pairs)];
    cos_sin(__fmul_rn((float)position, inv_freq[j]), &cos, &sin);
    row[j] = cos;
    row[n_pairs + j] = sin;
}

// attention_temperature:  out[t] = 1 + scale * ln(1 + floor((positions[t] + 1) / length)), rounded once
//
//   positions [n_tokens] i32   out [n_tokens] f32   length above 0
//   grid (n_tokens / block, rounded up), block up to 256: a thread has a token; bound by latency. The logarithm is of
//   float64: that of float32 would leave 1.2e-7
//   traffic  8 * n_tokens
extern "C" __global__ void __launch_bounds__(ANGLE_THREADS) attention_temperature(
        const int* positions, OUT float* out, int n_tokens, float scale, int length) {
    const int t = blockIdx.x * blockDim.x + threadIdx.x;
    if (t < n_tokens) out[t] = (float)(1.0 + (double)scale * log(1.0 + (positions[t] + 1) / length));
}

// The part of a head that one lane has: chunk c of its first half and chunk c of its second half, for CHUNKS c. So both
// members of a pair meet in one lane, whether pairs are (j, j + head_dim/2) or (2j, 2j + 1).
constexpr int WORDS = WIDTH / 2, VALUES = CHUNKS * WIDTH;

struct Part {
    float first[VALUES], second[VALUES];

    __device__ __forceinline__ void load(const bf16* head, int half, int lane, int n_lanes, bool is_there) {
        #pragma unroll
        for (int i = 0; i < CHUNKS; ++i) {
            const int at = WIDTH * (i * n_lanes + lane);
            const bool is_inside = is_there && at < half;
            const Words<WORDS> a = is_inside ? load_words<WORDS>(head + at) : Words<WORDS>{};
            const Words<WORDS> b = is_inside ? load_words<WORDS>(head + half + at) : Words<WORDS>{};
            #pragma unroll
            for (int w = 0; w < WORDS; ++w) {
                first[i * WIDTH + 2 * w] = low_half(a.word[w]);
                first[i * WIDTH + 2 * w + 1] = high_half(a.word[w]);
                second[i * WIDTH + 2 * w] = low_half(b.word[w]);
                second[i * WIDTH + 2 * w + 1] = high_half(b.word[w]);
            }
        }
    }

    // Rounds, once.
    __device__ __forceinline__ void store(bf16* head, int half, int lane, int n_lanes) const {
        #pragma unroll
        for (int i = 0; i < CHUNKS; ++i) {
            const int at = WIDTH * (i * n_lanes + lane);
            if (at >= half) continue;
            Words<WORDS> a, b;
            #pragma unroll
            for (int w = 0; w < WORDS; ++w) {
                a.word[w] = pack_bf16(first[i * WIDTH + 2 * w], first[i * WIDTH + 2 * w + 1]);
                b.word[w] = pack_bf16(second[i * WIDTH + 2 * w], second[i * WIDTH + 2 * w + 1]);
            }
            store_words(head + at, a);
            store_words(head + half + at, b);
        }
    }

    // 1 / rms over the n_lanes lanes that have the head.
    __device__ __forceinline__ float inverse_rms(int head_dim, int n_lanes, float eps) const {
        float sum = 0.f;
        #pragma unroll
        for (int i = 0; i < VALUES; ++i) sum += first[i] * first[i];
        #pragma unroll
        for (int i = 0; i < VALUES; ++i) sum += second[i] * second[i];
        for (int m = n_lanes / 2; m; m >>= 1) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, m);
        return rsqrtf(sum / head_dim + eps);
    }

    __device__ __forceinline__ void multiply(float by) {
        #pragma unroll
        for (int i = 0; i < VALUES; ++i) {
            first[i] *= by;
            second[i] *= by;
        }
    }

    __device__ __forceinline__ void multiply(const Part& weight, float offset) {
        #pragma unroll
        for (int i = 0; i < VALUES; ++i) {
            first[i] *= weight.first[i] + offset;
            second[i] *= weight.second[i] + offset;
        }
    }
};

// n values of row[at..], `beyond` from n_pairs on.
template <int n> __device__ __forceinline__ void load_angles(const float* row, int at, int n_pairs, float beyond, float* x) {
    if (at + n <= n_pairs && n_pairs % n == 0) return load_floats<n>(row + at, x);
    #pragma unroll
    for (int i = 0; i < n; ++i) x[i] = at + i < n_pairs ? row[at + i] : beyond;
}

// Of the pairs of a Part. Interleaved, the first half of a chunk's angles is that of the pairs in the head's first half.
struct Angles {
    float cos[VALUES], sin[VALUES];

    __device__ __forceinline__ void load(const float* row, int n_pairs, int half, int lane, int n_lanes, bool interleaved) {
        #pragma unroll
        for (int i = 0; i < CHUNKS; ++i) {
            const int at = WIDTH * (i * n_lanes + lane);
            float* const c = cos + i * WIDTH;
            float* const s = sin + i * WIDTH;
            if (interleaved) {
                load_angles<WORDS>(row, at / 2, n_pairs, 1.f, c);
                load_angles<WORDS>(row, (half + at) / 2, n_pairs, 1.f, c + WORDS);
                load_angles<WORDS>(row + n_pairs, at / 2, n_pairs, 0.f, s);
                load_angles<WORDS>(row + n_pairs, (half + at) / 2, n_pairs, 0.f, s + WORDS);
            } else {
                load_angles<WIDTH>(row, at, n_pairs, 1.f, c);
                load_angles<WIDTH>(row + n_pairs, at, n_pairs, 0.f, s);
            }
        }
    }

    __device__ __forceinline__ void rotate(Part& x, bool interleaved) const {
        #pragma unroll
        for (int i = 0; i < VALUES; ++i) {
            if (!interleaved) {
                turn(x.first[i], x.second[i], cos[i], sin[i]);
            } else if (i % 2 == 0) {
                const int angle = i / WIDTH * WIDTH + i % WIDTH / 2;
                turn(x.first[i], x.first[i + 1], cos[angle], sin[angle]);
                turn(x.second[i], x.second[i + 1], cos[angle + WORDS], sin[angle + WORDS]);
            }
        }
    }

    static __device__ __forceinline__ void turn(float& a, float& b, float cos, float sin) {
        const float turned = a * cos - b * sin;
        b = b * cos + a * sin;
        a = turned;
    }
};

// qk_norm_rope_cache:  q = rope(norm(q) * (q_norm + offset)) * temperature, k = rope(norm(k) * (k_norm + offset)),
//                      v = norm(v) or v, norm(x) = x / sqrt(mean(x^2) + eps) over a head, or x where qk_norm is false;
//                      q to out, k and v to their pages
//
//   qkv [n_tokens, n_in, head_dim] bf16: q heads, k heads, v heads (v_is_k: none, v is k before norm and rotation)
//   q_norm, k_norm [head_dim] bf16, or null to multiply by nothing      slots [n_tokens] i32, page * page_size + offset
//   angles [n_tokens, 2, n_pairs] f32: cos and sin of the first n_pairs pairs; the other pairs do not turn; n_pairs may
//   be 0, angles null      temperature [n_tokens] f32, or null for 1
//   k_pages, v_pages [n_slots, n_kv_heads, head_dim] bf16; a token with slot -1 leaves nothing there; without k and v
//   heads all three may be null
//   out [n_tokens, n_heads, head_dim] bf16
//   A norm without weights may as well follow the rotation, as in Llama 4: a rotation does not change the mean of x^2.
//   Rounded to bf16 once, at the end (transformers rounds between norm and rotation too).
//   grid (n_tokens, any), block (a multiple of 32): n_lanes lanes have a head, a power of two that divides 32; the heads of
//   a token go around the grid's y. The order of a sum follows from head_dim alone. Bound by memory.
//   built with WIDTH (bf16 of an access: 4, or 2 where head_dim / 2 is no multiple of 4) and CHUNKS (accesses of a lane in
//   each half), such that WIDTH * CHUNKS * n_lanes >= head_dim / 2, and VARIED (0: heads are normed and rotated, and there
//   is no temperature, whatever qk_norm, n_pairs and temperature are, which saves registers; 1: as these say)
//   traffic  2 * head_dim * (n_tokens * (n_in + n_heads + 2 * n_kv_heads) + n_weights) + 4 * n_tokens * (2 * n_pairs + has_slots + has_temperature)
extern "C" __global__ void __launch_bounds__(128) qk_norm_rope_cache(
        const bf16* qkv, const bf16* q_norm, const bf16* k_norm, const float* angles, const int* slots,
        const float* temperature, OUT bf16* k_pages, OUT bf16* v_pages, OUT bf16* out, int n_heads, int n_kv_heads,
        int head_dim, int n_pairs, int n_lanes, bool qk_norm, bool v_norm, bool v_is_k, bool interleaved, float eps,
        float weight_offset) {
    const size_t token = blockIdx.x;
    const int half = head_dim / 2, lane = threadIdx.x % n_lanes, per_block = blockDim.x / n_lanes;
    const int n_in = n_heads + (v_is_k ? 1 : 2) * n_kv_heads;
    const int slot = slots ? slots[token] : -1;
    Angles turns;
    turns.load(angles + token * 2 * n_pairs, n_pairs, half, lane, n_lanes, interleaved);
    for (int begin = blockIdx.y * per_block; begin < n_in; begin += gridDim.y * per_block) {
        const int head = begin + threadIdx.x / n_lanes;         // past n_in the lane still takes part in the sums
        const bool is_q = head < n_heads, is_v = head >= n_heads + n_kv_heads;
        const int kv_head = is_v ? head - n_heads - n_kv_heads : head - n_heads;
        const bool is_there = head < n_in && (is_q || slot >= 0);
        const bf16* const norm = is_q ? q_norm : k_norm;
        const size_t to = ((size_t)slot * n_kv_heads + kv_head) * head_dim;
        Part x, weight;
        x.load(qkv + (token * n_in + head) * head_dim, half, lane, n_lanes, is_there);
        weight.load(norm, half, lane, n_lanes, is_there && !is_v && norm);
        const float scale = x.inverse_rms(head_dim, n_lanes, eps);
        if (!is_there) continue;
        if (is_v || (v_is_k && !is_q)) {
            Part v = x;
            if (v_norm) v.multiply(scale);
            v.store(v_pages + to, half, lane, n_lanes);
            if (is_v) continue;
        }
        if (!VARIED || qk_norm) x.multiply(scale);
        if (norm) x.multiply(weight, weight_offset);
        if (!VARIED || n_pairs) turns.rotate(x, interleaved);
        if (VARIED && is_q && temperature) x.multiply(temperature[token]);
        x.store(is_q ? out + (token * n_heads + head) * head_dim : k_pages + to, half, lane, n_lanes);
    }
}
