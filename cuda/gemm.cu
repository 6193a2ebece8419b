// gemm:  out = x @ weight^T (+ residual),  or gated:  out = act(x @ gate^T) * (x @ up^T)
//
//   x [n_tokens, n_in] bf16   weight [n_out, n_in] bf16, gated [2 * n_out, n_in]: the rows of gate, then those of up
//   residual [n_tokens, n_out] bf16 or null, may be out   out [n_tokens, n_out] bf16, or out_f32 float32: one of the two
//   n_in and n_out are multiples of 4; activation: 0 none, 1 gelu_tanh, 2 silu
//
//   One arithmetic for every number of tokens. Weights are the 16-row side of mma.sync m16n8k16 and tokens the 8-wide side;
//   k ascends in steps of 16 into one float32 accumulator for each of n_splits stretches of split_length (a function of the
//   shape of weight alone); the splits' sums are added in ascending order. Tiles, and who computes a split, change no bit:
//   padding adds products of zeros. The result is rounded once; gate and up are not rounded before the activation.
//
//   parts = n_splits: a block computes one split and leaves its sums in partials; the last block to arrive at a tile
//                     (counters, zero again afterwards) adds them up. For few tokens: weights stream once, all SMs share.
//   parts = 1:        a block walks all splits of a tile; the sum so far waits in the block's own stretch of partials,
//                     which no one else reads. For many tokens.
//   partials  n_partials float32, each thread's four sums together: ROWS * TOKENS for each tile and split, or for each
//             block when parts = 1; none when n_splits = 1.  counters  n_counters int: one a tile when parts > 1
//   grid (up to tiles * parts; exactly that when parts > 1), block (32 * ROWS / WARP_ROWS * TOKENS / WARP_TOKENS)
//   dynamic shared memory: the larger of STAGES * (ROWS + TOKENS) * DEPTH * 2 (the ring of tiles in flight) and
//   ROWS * TOKENS * 4 (out's tile on its way to coalesced stores)
//   traffic  2 * n_in * (n_rows + n_tokens) + (out_bytes + residual_bytes) * n_tokens * n_out + 8 * (n_partials + n_counters)
//   bound by HBM (2 bytes a weight) up to about 100 tokens, by tensor cores above
//   every tile reads its tokens of x anew, TOKENS / ROWS of the bytes of its weights: those come from the L2 cache
//   built with ROWS, TOKENS (of a block's tile; gated, ROWS / 2 outputs), WARP_ROWS, WARP_TOKENS, DEPTH (k of a stage), STAGES
#include "gemm_tile.cuh"

constexpr int quads = ROWS * TOKENS / 4;                // float4s in a tile's sums

// Where one thread's copies come from: the same chunk of every rows_per_pass-th row of weights and of tokens.
struct Copies {
    const bf16 *weights, *tokens;                       // of the thread's first row; valid also for copies of nothing
    int weight_step, token_step;                        // to its next row
    u32 rows, columns;                                  // bit p: row p of weights, or of tokens, exists
    int n_left, target;                                 // k from here to the end; place in a stage

    __device__ __forceinline__ void stage(bf16* ring, int step, bool is_aligned) const {
        bf16* to = ring + step % STAGES * stage_size + target;
        const int at = step * DEPTH;
        #pragma unroll
        for (int p = 0; p < ROWS / rows_per_pass; ++p)
            copy_chunk(to + p * rows_per_pass * DEPTH, weights + (p * weight_step + at),
                       rows >> p & 1 ? n_left - at : 0, is_aligned, weights);
        to += ROWS * DEPTH;
        #pragma unroll
        for (int p = 0; p < (TOKENS + rows_per_pass - 1) / rows_per_pass; ++p)
            if (TOKENS % rows_per_pass == 0 || threadIdx.x / chunks + p * rows_per_pass < TOKENS)
                copy_chunk(to + p * rows_per_pass * DEPTH, tokens + (p * token_step + at),
                           columns >> p & 1 ? n_left - at : 0, is_aligned, tokens);
    }
};

__device__ __forceinline__ Copies copies_of(const bf16* x, const bf16* weight, int n_tokens, int n_out, int n_in, int out0,
                                            int token0, int k0, int k_end, bool is_gated) {
    const int row = threadIdx.x / chunks, chunk = threadIdx.x % chunks, k = k0 + chunk * 8;
    const int first_out = out0 + (is_gated ? row / 16 * 8 + row % 8 : row), first_token = token0 + row;
    const int out_step = is_gated ? rows_per_pass / 2 : rows_per_pass;
    const int first_row = min(first_out, n_out - 1) + (is_gated && row % 16 >= 8 ? n_out : 0);
    Copies c;
    c.weights = weight + ((size_t)first_row * n_in + (k < n_in ? k : 0));
    c.tokens = x + ((size_t)min(first_token, n_tokens - 1) * n_in + (k < n_in ? k : 0));
    c.weight_step = out_step * n_in;
    c.token_step = rows_per_pass * n_in;
    c.rows = c.columns = 0;
    for (int p = 0; p < ROWS / rows_per_pass; ++p) c.rows |= (u32)(first_out + p * out_step < n_out) << p;
    for (int p = 0; p * rows_per_pass < TOKENS; ++p) c.columns |= (u32)(first_token + p * rows_per_pass < n_tokens) << p;
    c.n_left = k_end - k;
    c.target = row * DEPTH + (chunk ^ swizzle(row)) * 8;
    return c;
}

__device__ __forceinline__ void save(Sums& sum, float4* to) {
    each_quad(sum, [=](float (&s)[4], int at) { to[at] = make_float4(s[0], s[1], s[2], s[3]); });
}
__device__ __forceinline__ void load(Sums& sum, const float4* from) {
    each_quad(sum, [=](float (&s)[4], int at) {
        const float4 v = from[at];
        s[0] = v.x, s[1] = v.y, s[2] = v.z, s[3] = v.w;
    });
}
__device__ __forceinline__ void add(Sums& sum, const float4* from) {
    each_quad(sum, [=](float (&s)[4], int at) {
        const float4 v = from[at];
        s[0] += v.x, s[1] += v.y, s[2] += v.z, s[3] += v.w;
    });
}

// Leaves this block's split among a tile's partials. In the last of n_splits blocks: the whole sum, and true.
__device__ __forceinline__ bool join_splits(Sums& sum, float4* tile_partials, int* counter, int part, int n_splits) {
    __shared__ bool is_last;
    float4* mine = tile_partials + threadIdx.x;
    save(sum, mine + (size_t)part * quads);
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        is_last = atomicAdd(counter, 1) == n_splits - 1;
        if (is_last) *counter = 0;
    }
    __syncthreads();
    if (!is_last) return false;
    __threadfence();
    load(sum, mine);
    for (int s = 1; s < n_splits; ++s) add(sum, mine + (size_t)s * quads);
    return true;
}

extern "C" __global__ void __launch_bounds__(n_threads, 2) gemm(
        const bf16* x, const bf16* weight, const bf16* residual, OUT bf16* out, OUT float* out_f32, float* partials,
        int* counters, int n_tokens, int n_out, int n_in, int n_splits, int split_length, int parts, int activation) {
    DYNAMIC_SMEM(smem);
    bf16* const ring = (bf16*)smem;
    const bool is_gated = activation != NONE;
    const int width = is_gated ? ROWS / 2 : ROWS;                       // outputs of a tile
    const int n_row_tiles = ceil_div(n_out, width), n_token_tiles = ceil_div(n_tokens, TOKENS);
    const int warp = threadIdx.x / 32;
    const int warp_row = warp % (ROWS / WARP_ROWS) * WARP_ROWS, warp_token = warp / (ROWS / WARP_ROWS) * WARP_TOKENS;

    for (int item = blockIdx.x; item < n_row_tiles * n_token_tiles * parts; item += gridDim.x) {
        // Groups of 16 weight tiles walk the tokens together: 22 MB of weights at n_in = 5376, which stay in the L2 cache.
        const int part = item % parts, tile = item / parts;
        const int first_tile = tile / (16 * n_token_tiles) * 16, tiles_in_group = min(16, n_row_tiles - first_tile);
        const int place = tile - first_tile * n_token_tiles;
        const int out0 = (first_tile + place % tiles_in_group) * width, token0 = place / tiles_in_group * TOKENS;

        const int k0 = part * split_length, k_end = parts > 1 ? min(n_in, k0 + split_length) : n_in;
        const Copies copies = copies_of(x, weight, n_tokens, n_out, n_in, out0, token0, k0, k_end, is_gated);
        const bool is_aligned = n_in % 8 == 0;
        const int n_steps = ceil_div(k_end - k0, DEPTH), split_steps = split_length / DEPTH;
        const bool has_work = out0 + (is_gated ? warp_row / 2 : warp_row) < n_out && token0 + warp_token < n_tokens;
        float4* const so_far = (float4*)partials + (size_t)blockIdx.x * quads + threadIdx.x;

        // Each kind of copy in code of its own, without the other's predicated instructions, unless registers are short.
        const auto stage = [&](int step) {
            if (WARP_ROWS * WARP_TOKENS >= 64 * 64) copies.stage(ring, step, is_aligned);
            else if (is_aligned) copies.stage(ring, step, true);
            else copies.stage(ring, step, false);
        };
        for (int s = 0; s < STAGES - 1; ++s) {
            if (s < n_steps) stage(s);
            copy_commit();
        }
        Sums sum;
        clear(sum);
        #pragma unroll 1
        for (int step = 0; step < n_steps; ++step) {
            copy_wait<STAGES - 2>();
            __syncthreads();                            // everyone's copies are here, and the oldest stage is free
            if (step + STAGES - 1 < n_steps) stage(step + STAGES - 1);
            copy_commit();
            if (has_work) multiply(sum, ring + step % STAGES * stage_size, warp_row, warp_token);
            if (parts < n_splits && ((step + 1) % split_steps == 0 || step + 1 == n_steps)) {
                if (step >= split_steps) add(sum, so_far);
                if (step + 1 < n_steps) {
                    save(sum, so_far);
                    clear(sum);
                }
            }
        }
        copy_wait<0>();
        __syncthreads();
        float4* const of_tile = (float4*)partials + (size_t)tile * n_splits * quads;
        if (parts > 1 && !join_splits(sum, of_tile, counters + tile, part, n_splits)) continue;

        float* const staged = (float*)smem;
        if (is_gated) lay_out<true>(sum, staged, warp_row, warp_token, activation);
        else lay_out<false>(sum, staged, warp_row, warp_token, activation);
        __syncthreads();
        const int n_here = min(TOKENS, n_tokens - token0);
        for (int i = threadIdx.x; i < n_here * (width / 4); i += n_threads) {
            const int token = i / (width / 4), column = i % (width / 4) * 4;
            if (out0 + column >= n_out) continue;
            float4 v = *(const float4*)(staged + token * width + (column ^ bank_mask(token)));
            const size_t at = (size_t)(token0 + token) * n_out + out0 + column;
            if (out_f32) {
                *(float4*)(out_f32 + at) = v;
                continue;
            }
            if (residual) {
                const uint2 r = *(const uint2*)(residual + at);
                v.x += low_half(r.x), v.y += high_half(r.x), v.z += low_half(r.y), v.w += high_half(r.y);
            }
            *(uint2*)(out + at) = make_uint2(pack_bf16(v.x, v.y), pack_bf16(v.z, v.w));
        }
        __syncthreads();                                                // the ring may be filled again
    }
}

// gated_activation:  out = act(gate) * up, for products that cuBLAS made
//
//   gate_up [n_tokens, 2 * n_out] float32, the gates first   out [n_tokens, n_out] bf16; activation as above
//   grid (n_tokens), block (any multiple of 32)
//   traffic  10 * n_tokens * n_out
extern "C" __global__ void gated_activation(const float* gate_up, OUT bf16* out, int n_out, int activation) {
    const float* gate = gate_up + (size_t)blockIdx.x * 2 * n_out;
    bf16* to = out + (size_t)blockIdx.x * n_out;
    for (int i = 4 * threadIdx.x; i < n_out; i += 4 * blockDim.x) {
        const float4 g = *(const float4*)(gate + i), up = *(const float4*)(gate + n_out + i);
        *(uint2*)(to + i) = make_uint2(
            pack_bf16(activate(g.x, activation) * up.x, activate(g.y, activation) * up.y),
            pack_bf16(activate(g.z, activation) * up.z, activate(g.w, activation) * up.w));
    }
}
