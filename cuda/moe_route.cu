// Which experts each token goes to, the order in which experts take their tokens, and the sum of what comes back.
//
// A pair is a token and one of its n_chosen experts, numbered token * n_chosen + choice.

#include "words.cuh"

constexpr int MOST_EXPERTS = 256, MOST_CHOSEN = 16, TOKENS_PER_BLOCK = 4;
constexpr int PASSES = MOST_EXPERTS / 32;               // experts of a lane: lane, lane + 32, ...

__device__ __forceinline__ float negative_infinity() { return __uint_as_float(0xFF800000u); }

// moe_pick:  the n_chosen experts of a token with the largest logits, largest first; of equal ones the lowest number
//
//   softmax:  weight = e^(logit - largest) / (the sum of that over the chosen) * per_expert_scale[expert], in float32.
//             That is softmax over all experts, renormalised over the chosen: the sum over all of them cancels.
//   sigmoid:  weight = 1 / (1 + e^-logit), rounded to bfloat16
//   A NaN counts as -inf; where nothing above that is left, the lowest numbers are chosen, with weights of 0 or NaN.
//
//   logits [n_tokens, n_experts] bf16   scale [n_experts] bf16 or null, softmax alone
//   experts [n_tokens, n_chosen] int32   weights [n_tokens, n_chosen] float32
//   n_experts <= 256, n_chosen <= min(n_experts, 16)
//   grid (n_tokens / 4, rounded up), block (128): a warp a token; bound by latency
//   n_scales: experts whose scale was read
//   traffic  2 * n_tokens * n_experts + 8 * n_tokens * n_chosen + 2 * n_scales
extern "C" __global__ void __launch_bounds__(32 * TOKENS_PER_BLOCK) moe_pick(
        const bf16* logits, const bf16* scale, OUT int* experts, OUT float* weights, int n_tokens, int n_experts,
        int n_chosen, bool is_sigmoid) {
    __shared__ __align__(16) float all_scores[TOKENS_PER_BLOCK][MOST_EXPERTS];
    __shared__ int all_chosen[TOKENS_PER_BLOCK][MOST_CHOSEN];
    __shared__ float all_largest[TOKENS_PER_BLOCK][MOST_CHOSEN];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, token = TOKENS_PER_BLOCK * blockIdx.x + warp;
    if (token >= n_tokens) return;
    float* const scores = all_scores[warp];
    int* const chosen = all_chosen[warp];
    float* const largest = all_largest[warp];

    float mine[PASSES];
    int rank[PASSES];                                   // how many experts go before it
    #pragma unroll
    for (int p = 0; p < PASSES; ++p) {
        const int expert = 32 * p + lane;
        mine[p] = expert < n_experts ? to_float(logits[(i64)token * n_experts + expert]) : negative_infinity();
        if (mine[p] != mine[p]) mine[p] = negative_infinity();
        scores[expert] = mine[p];
        rank[p] = 0;
    }
    __syncwarp();
    for (int other = 0; other < n_experts; other += 4) {
        float theirs[4];
        load_floats<4>(scores + other, theirs);
        #pragma unroll
        for (int p = 0; p < PASSES; ++p) {
            if (32 * p >= n_experts) break;
            #pragma unroll
            for (int i = 0; i < 4; ++i)
                rank[p] += theirs[i] > mine[p] || (theirs[i] == mine[p] && other + i < 32 * p + lane);
        }
    }
    #pragma unroll
    for (int p = 0; p < PASSES; ++p)
        if (rank[p] < n_chosen && 32 * p + lane < n_experts) {
            chosen[rank[p]] = 32 * p + lane;
            largest[rank[p]] = mine[p];
        }
    __syncwarp();

    const bool is_one = lane < n_chosen;
    const int expert = is_one ? chosen[lane] : 0;
    const float score = is_one ? largest[lane] : negative_infinity();
    float weight = expf(score - __shfl_sync(0xFFFFFFFFu, score, 0));
    weight /= warp_sum(is_one ? weight : 0.f);
    if (!is_one) return;
    if (is_sigmoid) weight = to_float(to_bf16(1.f / (1.f + expf(-score))));
    else if (scale) weight *= to_float(scale[expert]);
    const i64 at = (i64)token * n_chosen + lane;
    experts[at] = expert;
    weights[at] = weight;
}

// moe_order:  pairs by expert, those of an expert ascending; expert e has order[begins[e]] .. order[begins[e + 1] - 1]
//
//   experts [n_pairs] int32   order [n_pairs] int32   begins [n_experts + 1] int32
//   grid (n_experts), block (32 times up to 32): a block counts the pairs of the experts before its own, and of its own,
//   and then writes where its own are. A warp has a stretch of the pairs.
//   traffic  8 * n_pairs + 4 * (n_experts + 1)
//   every block reads all of experts, and its own stretches again: from the L2 cache; bound by latency
extern "C" __global__ void __launch_bounds__(1024) moe_order(const int* experts, OUT int* order, OUT int* begins,
                                                             int n_pairs) {
    __shared__ int n_before[32], n_own[32];             // by warp: pairs of experts before this one, pairs of this one
    const int own = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32, n_warps = blockDim.x / 32;
    const int length = (n_pairs + 32 * n_warps - 1) / (32 * n_warps) * 32;
    const int begin = min(warp * length, n_pairs), end = min(begin + length, n_pairs);
    int before = 0, equal = 0;
    #pragma unroll 4
    for (int i = begin + lane; i < end; i += 32) {
        const int expert = experts[i];
        before += expert < own;
        equal += expert == own;
    }
    #pragma unroll
    for (int m = 16; m; m >>= 1) {
        before += __shfl_xor_sync(0xFFFFFFFFu, before, m);
        equal += __shfl_xor_sync(0xFFFFFFFFu, equal, m);
    }
    if (lane == 0) n_before[warp] = before, n_own[warp] = equal;
    __syncthreads();
    int at = 0;
    for (int w = 0; w < n_warps; ++w) at += n_before[w];
    if (threadIdx.x == 0) {
        begins[own] = at;
        if (own == gridDim.x - 1) begins[own + 1] = n_pairs;
    }
    if (!equal) return;
    for (int w = 0; w < warp; ++w) at += n_own[w];
    #pragma unroll 4
    for (int first = begin; first < end; first += 32) {
        const bool is_own = first + lane < end && experts[first + lane] == own;
        const u32 votes = __ballot_sync(0xFFFFFFFFu, is_own);
        if (is_own) order[at + __popc(votes & ((1u << lane) - 1))] = first + lane;
        at += __popc(votes);
    }
}

// moe_combine:  out[t] = the sum over s of weights[t, s] * y[t * n_chosen + s], s ascending, in float32, rounded once
//
//   y [n_tokens * n_chosen, hidden] float32, hidden a multiple of 4   weights [n_tokens, n_chosen] float32, or null: ones
//   out [n_tokens, hidden] bf16
//   grid (n_tokens, parts of a row), block (any): a thread adds up four columns; bound by memory
//   traffic  n_tokens * (4 * n_chosen * hidden + 4 * has_weights * n_chosen + 2 * hidden)
extern "C" __global__ void __launch_bounds__(256) moe_combine(
        const float* y, const float* weights, OUT bf16* out, int n_chosen, int hidden) {
    const int column = 4 * (blockIdx.y * blockDim.x + threadIdx.x);
    if (column >= hidden) return;
    const i64 pair0 = (i64)blockIdx.x * n_chosen;
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
    #pragma unroll 4
    for (int s = 0; s < n_chosen; ++s) {
        const float4 v = *(const float4*)(y + (pair0 + s) * hidden + column);
        const float weight = weights ? weights[pair0 + s] : 1.f;
        sum.x = fmaf(weight, v.x, sum.x), sum.y = fmaf(weight, v.y, sum.y);
        sum.z = fmaf(weight, v.z, sum.z), sum.w = fmaf(weight, v.w, sum.w);
    }
    *(uint2*)(out + (i64)blockIdx.x * hidden + column) = make_uint2(pack_bf16(sum.x, sum.y), pack_bf16(sum.z, sum.w));
}
