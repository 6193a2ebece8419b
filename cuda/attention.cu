// attention:  out[t, h] = sum_p softmax_p(scale * q[t, h] . k[p, h / group]) v[p, h / group]   over the positions p that
// token t of a sequence sees: from the later of position - window + 1 and its chunk's start, or from
// first_visible[t] where that is earlier, to itself or last_visible[t].
//
//   q, out [n_tokens, n_heads * head_dim] bf16        k_pages, v_pages [n_pages, page_size, n_kv_heads, head_dim] bf16
//   page_table [n_entries], page_begin, context_lens [n_seqs], cu_seqlens [n_seqs + 1]
//   first_visible, last_visible [n_tokens] or null; neither descends within a sequence
//   work [n_work, 7] int32   (sequence, first row, first key tile, tile behind the last, part, n_parts, first unit),
//                            planned by engine/kernels/paged.py
//   floats                   running sums [n_blocks, RUNNING_FLOATS], then units, the sums of 8 rows over a part's keys,
//                            [n_units, n_kv_heads, UNIT_FLOATS]
//   counters                 parts done [n_units, n_kv_heads], zero before and after
//   grid (any), block (32 * WARPS_M * WARPS_N); scores, sums and merges in float32, P rounds to bf16 once, out once
//   traffic  4 * (n_keys * n_kv_heads + n_tokens * n_heads) * head_dim + 8 * n_part_rows * (head_dim + 2) + n_index_bytes
//   decode is bound by reading K and V once, prefill by the tensor cores (on mma.sync, by shared memory before them)
//   built with -DHEAD_DIM (a multiple of 16, at least head_dim) -DKEYS (of a tile) -DWARPS_M -DWARPS_N -DSLOTS -DMIN_BLOCKS
//
// A row is one (token, query head) of a KV head: row r of a sequence is token r / group, head r % group, so the heads of a
// group share what is loaded. A block takes ROWS = 16 * WARPS_M rows through tiles of KEYS keys: for S = Q K^T the WARPS_N
// warps of a row group share out the keys, for O = P V the columns, and P goes from one to the other as bf16.
//
// The same bits for decode, verify and prefill: S sums over head_dim, O and l over keys in steps of 16, ascending; l is a
// product of P with ones, so it adds up like O; a row's maximum is exact whoever takes it. The sums start from nothing at
// every multiple of split_keys and are merged, in order, into those before it. Who does that is free: a block that has all
// keys of its rows, or blocks that have a part each (the first one any number of splits, the others one) and the last of
// them to be done. A tile in which a row sees no key changes none of its bits, so the company of a row does not matter.
#include "mma.cuh"
#include "paged.cuh"
#include "softmax.cuh"

constexpr int THREADS = 32 * WARPS_M * WARPS_N, ROWS = 16 * WARPS_M;
constexpr int ROW_BYTES = 2 * HEAD_DIM + 16, P_ROW_BYTES = 2 * KEYS + 16;       // ldmatrix rows 16 bytes apart in the banks
constexpr int WARP_KEYS = KEYS / WARPS_N;
constexpr int N_COLUMNS = HEAD_DIM / 16, WARP_COLUMNS = (N_COLUMNS + WARPS_N - 1) / WARPS_N;    // of O, 16 wide
constexpr int AHEAD = (SLOTS + 1) / 2;          // tiles between finding a tile's keys and computing on it
constexpr int UNIT_FLOATS = 8 * (HEAD_DIM + 2), RUNNING_FLOATS = ROWS * HEAD_DIM + 4 * THREADS;
constexpr int ITEM = 7;                         // ints of a work item
constexpr u32 ONES = 0x3F803F80u;               // two of 1.0 in bf16

// What a lane holds of its warp's 16 rows, for row lane / 4 (half 0) and the one 8 below it (half 1).
struct Sums {
    float m[2], l[4], o[WARP_COLUMNS][2][4];    // l and o as mma accumulators; all columns of l are equal

    __device__ __forceinline__ void clear() {
        m[0] = m[1] = minus_infinity();
        l[0] = l[1] = l[2] = l[3] = 0.f;
        #pragma unroll
        for (int j = 0; j < WARP_COLUMNS; ++j)
            #pragma unroll
            for (int i = 0; i < 8; ++i) o[j][i / 4][i % 4] = 0.f;
    }
};

// The four numbers of one row in a lane's 16 columns.
__device__ __forceinline__ float4 row_of(const float (&o)[2][4], int half) {
    return make_float4(o[0][2 * half], o[0][2 * half + 1], o[1][2 * half], o[1][2 * half + 1]);
}
__device__ __forceinline__ void set_row(float (&o)[2][4], int half, float4 x) {
    o[0][2 * half] = x.x, o[0][2 * half + 1] = x.y, o[1][2 * half] = x.z, o[1][2 * half + 1] = x.w;
}
__device__ __forceinline__ float4 merged(MergeWeights w, float4 a, float4 b) {
    return make_float4(merged(w, a.x, b.x), merged(w, a.y, b.y), merged(w, a.z, b.z), merged(w, a.w, b.w));
}
// Where a lane's float4 of column block c is among those of 8 rows, [N_COLUMNS, 32 lanes].
__device__ __forceinline__ int lane_at(int c) { return 32 * c + threadIdx.x % 32; }

// visit(j, c, half) for each of a lane's float4s: of its j-th column block, which is the tile's c-th.
template <class Visit> __device__ __forceinline__ void each_column(int warp_n, Visit visit) {
    #pragma unroll
    for (int j = 0; j < WARP_COLUMNS; ++j) {
        const int c = warp_n + j * WARPS_N;
        if (N_COLUMNS % WARPS_N && c >= N_COLUMNS) break;
        visit(j, c, 0);
        visit(j, c, 1);
    }
}

// Starts to copy rows of head_dim values to shared memory, zeros behind them and in the place of rows below 0: row_of(r) of
// `from`, whose rows are `stride` values apart.
template <int n_rows, int n_values, class Row>
__device__ __forceinline__ void load_chunks(unsigned char* to, const bf16* from, int head_dim, int stride, Row row_of) {
    constexpr int N_CHUNKS = HEAD_DIM / n_values;
    const auto copy = [&](int r, int column) {
        const int row = row_of(r);
        const bool is_read = row >= 0 && column < head_dim;
        const u64 at = (u64)(u32)(is_read ? row : 0) * (u32)(2 * stride) + (is_read ? 2 * column : 0);
        copy_async<2 * n_values>(to + r * ROW_BYTES + 2 * column, (const unsigned char*)from + at, is_read);
    };
    if constexpr (THREADS % N_CHUNKS == 0 && n_rows % (THREADS / N_CHUNKS) == 0) {      // a thread stays in its column
        const int first = threadIdx.x / N_CHUNKS, column = threadIdx.x % N_CHUNKS * n_values;
        #pragma unroll 4
        for (int r = 0; r < n_rows; r += THREADS / N_CHUNKS) copy(first + r, column);
    } else {
        #pragma unroll 2
        for (int i = threadIdx.x; i < n_rows * N_CHUNKS; i += THREADS) copy(i / N_CHUNKS, i % N_CHUNKS * n_values);
    }
}
template <int n_rows, class Row>
__device__ __forceinline__ void load_rows(unsigned char* to, const bf16* from, int head_dim, int stride, Row row_of) {
    if (head_dim % 8 == 0) load_chunks<n_rows, 8>(to, from, head_dim, stride, row_of);
    else load_chunks<n_rows, 4>(to, from, head_dim, stride, row_of);
}

// s += Q K^T of a warp's 16 rows and WARP_KEYS keys.
__device__ __forceinline__ void score(float (&s)[WARP_KEYS / 8][4], const unsigned char* q, const unsigned char* k) {
    const int lane = threadIdx.x % 32;
    q += lane % 16 * ROW_BYTES + lane / 16 * 16;
    k += (lane % 8 + (WARP_KEYS > 8 ? lane / 16 * 8 : 0)) * ROW_BYTES + lane / 8 % 2 * 16;
    #pragma unroll
    for (int d = 0; d < HEAD_DIM; d += 16) {
        u32 a[4];
        load_matrix_x4(a, q + 2 * d);
        if constexpr (WARP_KEYS == 8) {
            u32 b[2];
            load_matrix_x2(b, k + 2 * d);
            mma_bf16(s[0], a, b[0], b[1]);
        } else {
            #pragma unroll
            for (int n = 0; n < WARP_KEYS; n += 16) {
                u32 b[4];
                load_matrix_x4(b, k + n * ROW_BYTES + 2 * d);
                mma_bf16(s[n / 8], a, b[0], b[1]);
                mma_bf16(s[n / 8 + 1], a, b[2], b[3]);
            }
        }
    }
}

// Scores in base 2 from S: scaled, capped, -inf where a row does not see the key. `key` is the one of s[0][0], first and
// last what the lane's row sees of them, and 8 further what the row 8 below sees.
__device__ __forceinline__ void limit(float (&s)[WARP_KEYS / 8][4], float scale, float softcap, bool is_edge, int key,
                                      const int* first, const int* last) {
    #pragma unroll
    for (int e = 0; e < WARP_KEYS / 2; ++e) s[e / 4][e % 4] = __fmul_rn(s[e / 4][e % 4], scale);
    if (softcap != 0.f) {
        #pragma unroll
        for (int e = 0; e < WARP_KEYS / 2; ++e) s[e / 4][e % 4] = __fmul_rn(tanhf(s[e / 4][e % 4]), softcap);
    }
    if (is_edge) {
        const int from[2] = {first[0] - key, first[8] - key}, to[2] = {last[0] - key, last[8] - key};
        #pragma unroll
        for (int e = 0; e < WARP_KEYS / 2; ++e) {
            const int at = e / 4 * 8 + e % 2, half = e / 2 % 2;
            const bool is_seen = at >= from[half] && at <= to[half];
            s[e / 4][e % 4] = is_seen ? s[e / 4][e % 4] : minus_infinity();
        }
    }
}

// The largest score of each of a lane's rows, over the warp's keys.
__device__ __forceinline__ float row_top(const float (&s)[WARP_KEYS / 8][4], int half) {
    float top = minus_infinity();
    #pragma unroll
    for (int n = 0; n < WARP_KEYS / 8; ++n) top = fmaxf(top, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
    top = fmaxf(top, __shfl_xor_sync(0xFFFFFFFFu, top, 1));
    return fmaxf(top, __shfl_xor_sync(0xFFFFFFFFu, top, 2));
}

// P = exp2(s - m) of one row, m the maximum with `top`; what was summed below the old maximum comes down to the new one.
__device__ __forceinline__ void weigh(Sums& sums, u32 (&p)[WARP_KEYS / 8][2], const float (&s)[WARP_KEYS / 8][4], float top,
                                      int half) {
    const float m = fmaxf(sums.m[half], top), shift = finite_max(m), factor = exp2_approx(sums.m[half] - shift);
    sums.m[half] = m;
    sums.l[2 * half] *= factor, sums.l[2 * half + 1] *= factor;
    #pragma unroll
    for (int j = 0; j < 2 * WARP_COLUMNS; ++j)
        sums.o[j / 2][j % 2][2 * half] *= factor, sums.o[j / 2][j % 2][2 * half + 1] *= factor;
    #pragma unroll
    for (int n = 0; n < WARP_KEYS / 8; ++n)
        p[n][half] = pack_bf16(exp2_approx(s[n][2 * half] - shift), exp2_approx(s[n][2 * half + 1] - shift));
}

// o += P V and l += P 1; `p` gives the A fragment of 16 keys.
template <class P> __device__ __forceinline__ void mix(Sums& sums, const unsigned char* v, int first_column, P p) {
    const int lane = threadIdx.x % 32;
    v += lane % 16 * ROW_BYTES + lane / 16 * 16;
    #pragma unroll
    for (int k = 0; k < KEYS; k += 16) {
        u32 a[4];
        p(a, k);
        mma_bf16(sums.l, a, ONES, ONES);
        #pragma unroll
        for (int j = 0; j < WARP_COLUMNS; ++j) {
            const int c = first_column + j * WARPS_N;
            if (N_COLUMNS % WARPS_N && c >= N_COLUMNS) break;
            u32 b[4];
            load_matrix_x4_trans(b, v + k * ROW_BYTES + 32 * c);
            mma_bf16(sums.o[j][0], a, b[0], b[1]);
            mma_bf16(sums.o[j][1], a, b[2], b[3]);
        }
    }
}

extern "C" __global__ void __launch_bounds__(32 * WARPS_M * WARPS_N, MIN_BLOCKS) attention(
        const bf16* q, const bf16* k_pages, const bf16* v_pages, const int* page_table, const int* page_begin,
        const int* context_lens, const int* cu_seqlens, const int* first_visible, const int* last_visible,
        const int* work, const int* n_work, OUT bf16* out, float* floats, int* counters, int n_heads, int n_kv_heads,
        int head_dim, int page_size, int window, int chunk, int split_keys, float scale, float softcap) {
    DYNAMIC_SMEM(smem);
    unsigned char* const q_rows = smem;
    unsigned char* const ring = q_rows + ROWS * ROW_BYTES;          // tiles of K and V in turn
    unsigned char* const p_rows = ring + SLOTS * KEYS * ROW_BYTES;
    float* const row_max = (float*)(p_rows + (WARPS_N > 1 ? ROWS * P_ROW_BYTES : 0));       // [WARPS_N, ROWS]
    int* const key_slots = (int*)(row_max + (WARPS_N > 1 ? WARPS_N * ROWS : 0));            // [2 tiles, KEYS]
    int* const sources = key_slots + 2 * KEYS;                      // [ROWS] of q and out, -1 where there is no row
    int* const first_seen = (int*)(sources + ROWS);                 // [ROWS] keys; behind the last row, what that sees
    int* const last_seen = first_seen + ROWS;
    int* const n_before = last_seen + ROWS;

    const int lane = threadIdx.x % 32, warp_m = threadIdx.x / 32 / WARPS_N, warp_n = threadIdx.x / 32 % WARPS_N;
    const int group = n_heads / n_kv_heads;
    float4* const running_ml = (float4*)(floats + (size_t)blockIdx.x * RUNNING_FLOATS);     // [THREADS] m, l of two rows
    float4* const running[2] = {running_ml + THREADS + warp_m * 4 * HEAD_DIM,               // o of a half of the warp's
                                running_ml + THREADS + (warp_m * 4 + 2) * HEAD_DIM};

    for (int i = blockIdx.x; i < *n_work * n_kv_heads; i += gridDim.x) {
        const int* const item = work + i / n_kv_heads * ITEM;
        const int sequence = item[0], first_row = item[1], kv_head = i % n_kv_heads;
        const int begin = cu_seqlens[sequence], n_new = cu_seqlens[sequence + 1] - begin;
        const PagedSequence keys = {page_table, first_visible, last_visible, begin, page_begin[sequence], page_size, n_new,
                                    context_lens[sequence], window, chunk};
        const int n_rows = min(n_new * group - first_row, ROWS);    // the block's
        __syncthreads();                            // nobody reads the last item's any more
        for (int r = threadIdx.x; r < ROWS; r += THREADS) {
            const int at = first_row + min(r, n_rows - 1), token = at / group;
            sources[r] = r < n_rows ? (begin + token) * n_heads + kv_head * group + at % group : -1;
            const Interval seen = keys.visible(token);
            first_seen[r] = seen.first, last_seen[r] = seen.last;
        }
        __syncthreads();
        const int first_tile = item[2], n_tiles = item[3] - first_tile;
        int split_end = (first_tile * KEYS / split_keys + 1) * split_keys;

        const int top_row = 16 * warp_m, row = top_row + lane / 4;  // the warp's first, the lane's
        const auto slot_of = [&](int n) {           // of the thread's key in the item's tile n
            const int key = (first_tile + n) * KEYS + (int)threadIdx.x;
            return threadIdx.x < KEYS && key >= first_seen[0] && key <= last_seen[ROWS - 1] ? keys.slot(key) : -1;
        };
        const auto load = [&](int j) {              // K and V of the item's tiles in turn
            const int* const slots = key_slots + j / 2 % 2 * KEYS;
            if (j < 2 * n_tiles)
                load_rows<KEYS>(ring + j % SLOTS * (KEYS * ROW_BYTES), (j % 2 ? v_pages : k_pages) + kv_head * head_dim,
                                head_dim, n_kv_heads * head_dim, [&](int r) { return slots[r]; });
            copy_commit();
        };

        if (threadIdx.x < KEYS)
            for (int n = 0; n < AHEAD; ++n) key_slots[n % 2 * KEYS + threadIdx.x] = slot_of(n);
        load_rows<ROWS>(q_rows, q, head_dim, head_dim, [&](int r) { return sources[r]; });
        __syncthreads();
        #pragma unroll 1
        for (int j = 0; j < SLOTS - 1; ++j) load(j);

        Sums sums;
        bool is_merged = false;
        sums.clear();

        for (int n = 0; n < n_tiles; ++n) {
            const int tile_first = (first_tile + n) * KEYS, tile_last = tile_first + KEYS - 1;
            const bool is_seen = sources[top_row] >= 0 && first_seen[top_row] <= tile_last
                                 && last_seen[top_row + 15] >= tile_first;
            copy_wait<SLOTS - 2>();
            __syncthreads();
            load(2 * n + SLOTS - 1);
            const int next_slot = slot_of(n + AHEAD);

            float s[WARP_KEYS / 8][4] = {};
            if (is_seen)
                score(s, q_rows + top_row * ROW_BYTES,
                      ring + 2 * n % SLOTS * (KEYS * ROW_BYTES) + warp_n * WARP_KEYS * ROW_BYTES);
            limit(s, scale, softcap, first_seen[top_row + 15] > tile_first || last_seen[top_row] < tile_last,
                  tile_first + warp_n * WARP_KEYS + lane % 4 * 2, first_seen + row, last_seen + row);
            float top[2] = {row_top(s, 0), row_top(s, 1)};
            if (threadIdx.x < KEYS) key_slots[(n + AHEAD) % 2 * KEYS + threadIdx.x] = next_slot;
            if constexpr (WARPS_N > 1) {
                if (lane % 4 == 0) row_max[warp_n * ROWS + row] = top[0], row_max[warp_n * ROWS + row + 8] = top[1];
                __syncthreads();
                #pragma unroll
                for (int w = 0; w < WARPS_N; ++w) {
                    top[0] = fmaxf(top[0], row_max[w * ROWS + row]);
                    top[1] = fmaxf(top[1], row_max[w * ROWS + row + 8]);
                }
            }

            u32 p[WARP_KEYS / 8][2];
            #pragma unroll
            for (int half = 0; half < 2; ++half) {
                weigh(sums, p, s, top[half], half);
                u32* const to = (u32*)(p_rows + (row + 8 * half) * P_ROW_BYTES) + warp_n * WARP_KEYS / 2 + lane % 4;
                #pragma unroll
                for (int j = 0; j < WARP_KEYS / 8 && WARPS_N > 1; ++j) to[4 * j] = p[j][half];
            }

            copy_wait<SLOTS - 2>();
            __syncthreads();
            load(2 * n + SLOTS);
            if (is_seen)
                mix(sums, ring + (2 * n + 1) % SLOTS * (KEYS * ROW_BYTES), warp_n, [&](u32 (&a)[4], int k) {
                    if constexpr (WARPS_N > 1)
                        load_matrix_x4(a, p_rows + (top_row + lane % 16) * P_ROW_BYTES + 2 * k + lane / 16 * 16);
                    else
                        a[0] = p[k / 8][0], a[1] = p[k / 8][1], a[2] = p[k / 8 + 1][0], a[3] = p[k / 8 + 1][1];
                });

            // Where a split ends, its keys join those before it, and the next starts from nothing.
            const bool is_last = n + 1 == n_tiles;
            if (!is_last && tile_last + 1 < split_end) continue;
            split_end += split_keys;
            if (is_merged) {
                float4& old_ml = running_ml[threadIdx.x];
                const MergeWeights weights[2] = {merge_before(old_ml.x, old_ml.y, sums.m[0], sums.l[0]),
                                                 merge_before(old_ml.z, old_ml.w, sums.m[1], sums.l[2])};
                each_column(warp_n, [&](int j, int c, int half) {
                    if (j % 2 + half == 0) __syncwarp();    // or all columns load at once, into registers that are full
                    set_row(sums.o[j], half, merged(weights[half], running[half][lane_at(c)], row_of(sums.o[j], half)));
                });
            }
            if (is_last) break;
            running_ml[threadIdx.x] = make_float4(sums.m[0], sums.l[0], sums.m[1], sums.l[2]);
            each_column(warp_n, [&](int j, int c, int half) { running[half][lane_at(c)] = row_of(sums.o[j], half); });
            is_merged = true;
            sums.clear();
        }

        const auto write = [&](int c, int half, float4 o, float sum) {
            bf16* const to = out + (i64)sources[row + 8 * half] * head_dim;
            const float inverse = __fdiv_rn(1.f, sum);
            const int column = 16 * c + lane % 4 * 2;       // + 0 makes a zero positive, however it came to be one
            const u32 left = pack_bf16(fmaf(o.x, inverse, 0.f), fmaf(o.y, inverse, 0.f));
            const u32 right = pack_bf16(fmaf(o.z, inverse, 0.f), fmaf(o.w, inverse, 0.f));
            if (column < head_dim) *(u32*)(to + column) = left;
            if (column + 8 < head_dim) *(u32*)(to + column + 8) = right;
        };
        const bool is_row[2] = {sources[row] >= 0, sources[row + 8] >= 0};
        const int part = item[4], n_parts = item[5];
        if (n_parts == 1) {
            each_column(warp_n, [&](int j, int c, int half) {
                if (is_row[half]) write(c, half, row_of(sums.o[j], half), sums.l[2 * half]);
            });
            continue;
        }

        // A unit: the o of 8 rows as lanes hold them, then m and l of each row.
        const auto unit_of = [&](int part, int half) {
            const i64 unit = item[6] + part * ((n_rows + 7) / 8) + 2 * warp_m + half;
            return floats + (i64)gridDim.x * RUNNING_FLOATS + (unit * n_kv_heads + kv_head) * UNIT_FLOATS;
        };
        each_column(warp_n, [&](int j, int c, int half) {
            if (is_row[half]) ((float4*)unit_of(part, half))[lane_at(c)] = row_of(sums.o[j], half);
        });
        #pragma unroll
        for (int half = 0; half < 2; ++half)
            if (is_row[half] && warp_n == 0 && lane % 4 == 0)
                ((float2*)(unit_of(part, half) + 8 * HEAD_DIM))[lane / 4] = make_float2(sums.m[half], sums.l[2 * half]);
        __threadfence();
        __syncthreads();
        int& n_done = counters[item[6] * n_kv_heads + kv_head];
        if (threadIdx.x == 0) *n_before = atomicAdd(&n_done, 1);
        __syncthreads();
        if (*n_before != n_parts - 1) continue;
        __threadfence();
        if (threadIdx.x == 0) n_done = 0;
        #pragma unroll
        for (int half = 0; half < 2; ++half) {
            if (!is_row[half]) continue;
            float4 o[WARP_COLUMNS];                 // all columns at once: their loads wait together
            float m = minus_infinity(), l = 0.f;
            #pragma unroll
            for (int j = 0; j < WARP_COLUMNS; ++j) o[j] = make_float4(0.f, 0.f, 0.f, 0.f);
            #pragma unroll 2
            for (int k = 0; k < n_parts; ++k) {
                const float* const unit = unit_of(k, half);
                float2 ml = ((const float2*)(unit + 8 * HEAD_DIM))[lane / 4];
                const MergeWeights weights = merge_before(m, l, ml.x, ml.y);
                m = ml.x, l = ml.y;
                #pragma unroll
                for (int j = 0; j < WARP_COLUMNS; ++j) {
                    const int c = warp_n + j * WARPS_N;
                    if (N_COLUMNS % WARPS_N && c >= N_COLUMNS) break;
                    o[j] = merged(weights, o[j], ((const float4*)unit)[lane_at(c)]);
                }
            }
            #pragma unroll
            for (int j = 0; j < WARP_COLUMNS; ++j) {
                const int c = warp_n + j * WARPS_N;
                if (N_COLUMNS % WARPS_N && c >= N_COLUMNS) break;
                write(c, half, o[j], l);
            }
        }
    }
}
