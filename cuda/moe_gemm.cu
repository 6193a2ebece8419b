// Matrix products of routed tokens with the matrices of their experts, all experts in one launch.
//
//   x [n_x_rows, n_in] bf16; row i of the product's left side is row i of x when divisor is 0, else row order[i] / divisor
//   weight bf16  moe_gemm:         [n_experts, n_out, n_in], gated [n_experts, 2 * n_out, n_in]: rows of gate, then up's
//                moe_gemm_in_out:  [n_experts, n_in, n_out], gated [n_experts, n_in, 2 * n_out]: columns alike
//   order [n_pairs] int32: pairs (token, choice) as token * k + choice, by expert; begins [n_experts + 1] int32: expert e
//   has the rows begins[e] .. begins[e + 1]
//   out [n_pairs, n_out] bf16, row i, where gated; else out_f32 [n_pairs, n_out] float32, row order[i]
//   n_in and n_out are multiples of 4; n_experts is at most 256; activation: 0 none, 1 gelu_tanh, 2 silu
//
//   One arithmetic for any routing: k ascends in steps of 16 into one float32 accumulator. Which tile a row is in, and in
//   what company, changes no bit: padding adds products of zeros. Gated results are rounded once, others not at all.
//   A tile is ROWS of one expert's weights by TOKENS of its rows. Blocks count the tiles of each expert from begins, and
//   take them in turns: an expert that nobody chose has none. No block waits for another.
//   grid (any), block (32 * ROWS / WARP_ROWS * TOKENS / WARP_TOKENS)
//   dynamic shared memory: the larger of STAGES * (ROWS + TOKENS) * DEPTH * 2 (the ring of tiles in flight) and
//   ROWS * TOKENS * 4 (out's tile on its way to coalesced stores)
//   built with ROWS, TOKENS (of a block's tile; gated, ROWS / 2 outputs), WARP_ROWS, WARP_TOKENS, DEPTH (k of a stage),
//   STAGES
//
//   n_active: experts with rows; n_rows: n_out, gated 2 * n_out; out_bytes: 2 gated, else 4
//   bound by HBM (2 bytes a weight of the active experts) up to about 100 rows an expert, by tensor cores above
//   every tile reads its rows of x anew, TOKENS / ROWS of the bytes of its weights: those come from the L2 cache
#include "gemm_tile.cuh"

constexpr int MOST_EXPERTS = 256;
constexpr int token_passes = (TOKENS + rows_per_pass - 1) / rows_per_pass;
constexpr int row_chunks = ROWS / 8;                    // 16-byte chunks of the weights at one k, where memory has them so
constexpr int ks_per_pass = n_threads / row_chunks;     // and k that the block copies at a time
static_assert(ks_per_pass % 8 == 0 && DEPTH % ks_per_pass == 0, "a thread's chunks have the same place in their swizzle");
static_assert(TOKENS <= n_threads && row_chunks % 8 == 0, "");

// Where one thread's copies of weights come from; `weight` is that of the expert. In a stage, gated, chunks of 8 rows of
// gate and of up alternate.
template <bool is_in_out> struct Weights {
    const bf16* first;                                  // valid also for copies of nothing
    i64 step;                                           // from one of the thread's rows of a stage to its next; of k: one k
    u32 rows;                                           // bit p: row p exists
    int k, n_left, target;                              // k of the first copy; values from there to the end of its row

    __device__ __forceinline__ Weights(const bf16* weight, int n_out, int n_in, int out0, bool is_gated) {
        if constexpr (is_in_out) {
            const int chunk = threadIdx.x % row_chunks;
            const int column = out0 + (is_gated ? chunk / 2 : chunk) * 8;
            k = threadIdx.x / row_chunks;
            n_left = n_out - column;
            step = is_gated ? 2 * n_out : n_out;
            first = weight + (k < n_in && n_left > 0 ? k * step + column + (is_gated && chunk % 2 ? n_out : 0) : 0);
            rows = 0;
            target = k * ROWS + (chunk ^ (k % 8)) * 8;
        } else {
            const int row = threadIdx.x / chunks, chunk = threadIdx.x % chunks;
            const int first_out = out0 + (is_gated ? row / 16 * 8 + row % 8 : row);
            const int out_step = is_gated ? rows_per_pass / 2 : rows_per_pass;
            const int first_row = min(first_out, n_out - 1) + (is_gated && row % 16 >= 8 ? n_out : 0);
            k = chunk * 8;
            n_left = n_in - k;
            step = (i64)out_step * n_in;
            first = weight + ((i64)first_row * n_in + (k < n_in ? k : 0));
            rows = 0;
            for (int p = 0; p < ROWS / rows_per_pass; ++p) rows |= (u32)(first_out + p * out_step < n_out) << p;
            target = row * DEPTH + (chunk ^ swizzle(row)) * 8;
        }
    }

    __device__ __forceinline__ void stage(bf16* ring, int at, int n_in, bool is_aligned) const {
        bf16* to = ring + at / DEPTH % STAGES * stage_size + target;
        if constexpr (is_in_out) {
            #pragma unroll
            for (int p = 0; p < DEPTH / ks_per_pass; ++p)
                copy_chunk(to + p * ks_per_pass * ROWS, first + (at + p * ks_per_pass) * step,
                           k + at + p * ks_per_pass < n_in ? n_left : 0, is_aligned, first);
        } else {
            #pragma unroll
            for (int p = 0; p < ROWS / rows_per_pass; ++p)
                copy_chunk(to + p * rows_per_pass * DEPTH, first + (p * step + at), rows >> p & 1 ? n_left - at : 0,
                           is_aligned, first);
        }
    }
};

// The same for rows of x, each of which lies somewhere else.
struct Rows {
    const bf16* first[token_passes];
    u32 rows;
    int n_left, target;

    // Rows begin .. begin + n of the product, of which there are at least one and in the tile at most TOKENS.
    __device__ __forceinline__ Rows(const bf16* x, const int* order, int divisor, int begin, int n, int n_in) {
        const int row = threadIdx.x / chunks, chunk = threadIdx.x % chunks, k = chunk * 8;
        rows = 0;
        #pragma unroll
        for (int p = 0; p < token_passes; ++p) {
            const int i = row + p * rows_per_pass;
            const int pair = begin + min(i, n - 1);
            const int of_x = divisor ? order[pair] / divisor : pair;
            first[p] = x + ((i64)of_x * n_in + (k < n_in ? k : 0));
            rows |= (u32)(i < n) << p;
        }
        n_left = n_in - k;
        target = ROWS * DEPTH + row * DEPTH + (chunk ^ swizzle(row)) * 8;
    }

    __device__ __forceinline__ void stage(bf16* ring, int at, bool is_aligned) const {
        bf16* to = ring + at / DEPTH % STAGES * stage_size + target;
        #pragma unroll
        for (int p = 0; p < token_passes; ++p)
            if (TOKENS % rows_per_pass == 0 || threadIdx.x / chunks + p * rows_per_pass < TOKENS)
                copy_chunk(to + p * rows_per_pass * DEPTH, first[p] + at, rows >> p & 1 ? n_left - at : 0, is_aligned,
                           first[p]);
    }
};

// Warp 0 leaves begins, and how many stretches of TOKENS rows all experts before one have: [n_experts + 1] each.
__device__ __forceinline__ void count_stretches(const int* begins, int n_experts, int* first_row, int* first_stretch) {
    constexpr int n_passes = MOST_EXPERTS / 32;         // unrolled: their loads, and their scans, go side by side
    const int lane = threadIdx.x % 32;
    int begin[n_passes], n_before[n_passes];            // of this lane's experts; stretches up to and with the expert
    #pragma unroll
    for (int p = 0; p < n_passes; ++p) {
        const int expert = 32 * p + lane;
        begin[p] = begins[min(expert, n_experts)];
        n_before[p] = ceil_div(begins[min(expert + 1, n_experts)] - begin[p], TOKENS);
    }
    #pragma unroll
    for (int delta = 1; delta < 32; delta *= 2)
        #pragma unroll
        for (int p = 0; p < n_passes; ++p) {
            const int other = __shfl_up_sync(0xFFFFFFFFu, n_before[p], delta);
            if (lane >= delta) n_before[p] += other;
        }
    int n = 0;
    #pragma unroll
    for (int p = 0; p < n_passes; ++p) {
        const int expert = 32 * p + lane;
        if (expert <= n_experts) first_row[expert] = begin[p];
        if (expert < n_experts) first_stretch[expert + 1] = n + n_before[p];
        n += __shfl_sync(0xFFFFFFFFu, n_before[p], 31);
    }
    if (lane == 0) {
        first_stretch[0] = 0;
        if (n_experts == MOST_EXPERTS) first_row[n_experts] = begins[n_experts];        // else a lane stands for it
    }
}

template <bool is_in_out>
__device__ __forceinline__ void multiply_experts(const bf16* x, const bf16* weight, const int* order, const int* begins,
                                                 bf16* out, float* out_f32, int n_experts, int n_out, int n_in,
                                                 int divisor, int activation) {
    DYNAMIC_SMEM(smem);
    __shared__ int first_row[MOST_EXPERTS + 1], first_stretch[MOST_EXPERTS + 1], to_row[TOKENS];
    bf16* const ring = (bf16*)smem;
    const bool is_gated = activation != NONE;
    const int width = is_gated ? ROWS / 2 : ROWS;                       // outputs of a tile
    const int n_row_tiles = ceil_div(n_out, width), n_steps = ceil_div(n_in, DEPTH);
    const int warp = threadIdx.x / 32;
    const int warp_row = warp % (ROWS / WARP_ROWS) * WARP_ROWS, warp_token = warp / (ROWS / WARP_ROWS) * WARP_TOKENS;
    const bool is_aligned = n_in % 8 == 0 && (!is_in_out || n_out % 8 == 0);

    if (warp == 0) count_stretches(begins, n_experts, first_row, first_stretch);
    __syncthreads();
    const int n_items = first_stretch[n_experts] * n_row_tiles;
    for (int item = blockIdx.x; item < n_items; item += gridDim.x) {
        int expert = 0;                                                 // the last one whose first stretch is not later
        for (int end = n_experts; end - expert > 1;) {
            const int middle = (expert + end) / 2;
            (first_stretch[middle] <= item / n_row_tiles ? expert : end) = middle;
        }
        // Groups of 16 weight tiles walk the expert's rows together: their weights stay in the L2 cache.
        const int n_stretches = first_stretch[expert + 1] - first_stretch[expert];
        const int tile = item - first_stretch[expert] * n_row_tiles;
        const int first_tile = tile / (16 * n_stretches) * 16, tiles_in_group = min(16, n_row_tiles - first_tile);
        const int place = tile - first_tile * n_stretches;
        const int out0 = (first_tile + place % tiles_in_group) * width, token0 = place / tiles_in_group * TOKENS;
        const int begin = first_row[expert] + token0, n_here = min(TOKENS, first_row[expert + 1] - begin);

        const bf16* const of_expert = weight + (i64)expert * ((is_gated ? 2 : 1) * (i64)n_out * n_in);
        const Weights<is_in_out> weights(of_expert, n_out, n_in, out0, is_gated);
        const Rows rows(x, order, divisor, begin, n_here, n_in);
        const bool has_work = out0 + (is_gated ? warp_row / 2 : warp_row) < n_out && warp_token < n_here;
        const auto stage = [&](int step) {
            if (is_aligned) weights.stage(ring, step * DEPTH, n_in, true), rows.stage(ring, step * DEPTH, true);
            else weights.stage(ring, step * DEPTH, n_in, false), rows.stage(ring, step * DEPTH, false);
        };
        for (int s = 0; s < STAGES - 1; ++s) {
            if (s < n_steps) stage(s);
            copy_commit();
        }
        if (threadIdx.x < n_here) to_row[threadIdx.x] = is_gated ? begin + threadIdx.x : order[begin + threadIdx.x];
        Sums sum;
        clear(sum);
        #pragma unroll 1
        for (int step = 0; step < n_steps; ++step) {
            copy_wait<STAGES - 2>();
            __syncthreads();                            // everyone's copies are here, and the oldest stage is free
            if (step + STAGES - 1 < n_steps) stage(step + STAGES - 1);
            copy_commit();
            if (has_work) multiply<is_in_out>(sum, ring + step % STAGES * stage_size, warp_row, warp_token);
        }
        copy_wait<0>();
        __syncthreads();

        float* const staged = (float*)smem;
        if (is_gated) lay_out<true>(sum, staged, warp_row, warp_token, activation);
        else lay_out<false>(sum, staged, warp_row, warp_token, activation);
        __syncthreads();
        for (int i = threadIdx.x; i < n_here * (width / 4); i += n_threads) {
            const int token = i / (width / 4), column = i % (width / 4) * 4;
            if (out0 + column >= n_out) continue;
            const float4 v = *(const float4*)(staged + token * width + (column ^ bank_mask(token)));
            const i64 at = (i64)to_row[token] * n_out + out0 + column;
            if (is_gated) *(uint2*)(out + at) = make_uint2(pack_bf16(v.x, v.y), pack_bf16(v.z, v.w));
            else *(float4*)(out_f32 + at) = v;
        }
        __syncthreads();                                                // the ring may be filled again
    }
}

// moe_gemm:  out[i] = act(x[r] @ gate_e^T) * (x[r] @ up_e^T), or out_f32[order[i]] = x[r] @ weight_e^T
//
//   traffic  2 * n_in * (n_active * n_rows + n_x_rows) + out_bytes * n_pairs * n_out + 4 * (n_pairs + n_experts + 1)
extern "C" __global__ void __launch_bounds__(n_threads, 2) moe_gemm(
        const bf16* x, const bf16* weight, const int* order, const int* begins, OUT bf16* out, OUT float* out_f32,
        int n_experts, int n_out, int n_in, int divisor, int activation) {
    multiply_experts<false>(x, weight, order, begins, out, out_f32, n_experts, n_out, n_in, divisor, activation);
}

// moe_gemm_in_out:  the same, where the columns of a weight are its outputs: out_f32[order[i]] = x[r] @ weight_e
//
//   traffic  2 * n_in * (n_active * n_rows + n_x_rows) + out_bytes * n_pairs * n_out + 4 * (n_pairs + n_experts + 1)
extern "C" __global__ void __launch_bounds__(n_threads, 2) moe_gemm_in_out(
        const bf16* x, const bf16* weight, const int* order, const int* begins, OUT bf16* out, OUT float* out_f32,
        int n_experts, int n_out, int n_in, int divisor, int activation) {
    multiply_experts<true>(x, weight, order, begins, out, out_f32, n_experts, n_out, n_in, divisor, activation);
}
