// The head of a draft model that looks at some of the vocabulary only: its tokens are shared out to centroids, and the
// tokens of those centroids whose scores are the largest are candidates. A vector of all logits is never made.
//
//   pick_centroids      which centroids
//   candidate_argmax    the likeliest candidate
//   candidate_logits    for whoever wants probabilities: logits of candidates, after no_logits, -inf for all others
//
//   g [n_rows, hidden] bf16, hidden a multiple of 4        head [vocab, hidden] bf16
//   ordering [n_centroids, size] i32   the tokens of each centroid; -1 in the place of one that is never drafted
//   chosen [n_rows, n_chosen] i32      centroids of a row, each once
//   built with -DTHREADS=... (a multiple of 128) and -DN_BINS=1409
#include "candidates.cuh"
#include "words.cuh"

constexpr int WARPS = THREADS / 32, TOKENS_OF_WARP = 4, TILE = WARPS * TOKENS_OF_WARP;     // candidates of a block

// out[row] = the n_chosen centroids with the largest scores, largest first; of equal ones the lowest number. NaN is last.
//
//   scores [n_rows, n_centroids] f32, n_centroids a multiple of 4   out [n_rows, n_chosen] i32
//   grid (ceil(n_centroids / THREADS), n_rows), block (THREADS): a thread counts which scores go before its own
//   dynamic shared memory: 4 * n_centroids
//   traffic  4 * n_rows * (n_centroids + n_chosen)
//   bound by latency: every block of a row reads all its scores, from the L2 cache, and results are written one by one
extern "C" __global__ void __launch_bounds__(THREADS)
pick_centroids(const float* scores, OUT int* out, int n_centroids, int n_chosen) {
    DYNAMIC_SMEM(smem);
    u32* const order = (u32*)smem;
    scores += (size_t)blockIdx.y * n_centroids;
    for (int i = 4 * threadIdx.x; i < n_centroids; i += 4 * THREADS) {
        const float4 four = *(const float4*)(scores + i);
        *(uint4*)(order + i) = make_uint4(order_of(four.x, 0), order_of(four.y, 0), order_of(four.z, 0),
                                          order_of(four.w, 0));
    }
    __syncthreads();
    const int own = blockIdx.x * THREADS + threadIdx.x;
    if (own >= n_centroids) return;
    const u32 mine = order[own];
    int rank = 0;
    #pragma unroll 4
    for (int i = 0; i < n_centroids; i += 4) {
        const uint4 four = *(const uint4*)(order + i);
        rank += four.x > mine || (four.x == mine && i < own);
        rank += four.y > mine || (four.y == mine && i + 1 < own);
        rank += four.z > mine || (four.z == mine && i + 2 < own);
        rank += four.w > mine || (four.w == mine && i + 3 < own);
    }
    if (rank < n_chosen) out[(size_t)blockIdx.y * n_chosen + rank] = own;
}

// The product of two rows, n_words words of two values to a load: each lane adds up its loads in ascending order, then
// the lanes join. The same for every row, whatever shares the launch.
template <int n_words> struct Products {
    static constexpr int VALUES = 2 * n_words;              // of a load

    // f(candidate, logit) for each of the warp's, in every lane.
    template <class F>
    static __device__ __forceinline__ void each(const unsigned char* g, const bf16* head, const int* ordering,
                                                const int* chosen, int first, int n, int size, int hidden, F f) {
        int token[TOKENS_OF_WARP];
        float sum[TOKENS_OF_WARP];
        #pragma unroll
        for (int j = 0; j < TOKENS_OF_WARP; ++j) {
            const int at = first + j;
            token[j] = at < n ? ordering[chosen[at / size] * size + at % size] : -1;
            sum[j] = 0.f;
        }
        for (int i = VALUES * ((int)threadIdx.x % 32); i < hidden; i += 32 * VALUES) {
            Words<n_words> row[TOKENS_OF_WARP];
            #pragma unroll
            for (int j = 0; j < TOKENS_OF_WARP; ++j)
                row[j] = load_words<n_words>(head + (size_t)max(token[j], 0) * hidden + i);
            const Words<n_words> x = load_words<n_words>(g + 2 * i);
            #pragma unroll
            for (int w = 0; w < n_words; ++w) {
                #pragma unroll
                for (int j = 0; j < TOKENS_OF_WARP; ++j) {
                    sum[j] = fmaf(low_half(row[j].word[w]), low_half(x.word[w]), sum[j]);
                    sum[j] = fmaf(high_half(row[j].word[w]), high_half(x.word[w]), sum[j]);
                }
            }
        }
        #pragma unroll
        for (int j = 0; j < TOKENS_OF_WARP; ++j) {
            const float logit = warp_sum(sum[j]);
            if (token[j] >= 0) f(token[j], logit);
        }
    }
};

// f(token, logit) for the candidates of a block's warps; its row of g goes through shared memory.
template <class F>
__device__ __forceinline__ void each_candidate(const bf16* g, const bf16* head, const int* ordering, const int* chosen,
                                               int n_chosen, int size, int hidden, unsigned char* smem, F f) {
    g += (size_t)blockIdx.y * hidden;
    for (int i = 4 * threadIdx.x; i < hidden; i += 4 * THREADS)
        store_words(smem + 2 * i, load_words<2>(g + i));
    __syncthreads();
    chosen += (size_t)blockIdx.y * n_chosen;
    const int first = blockIdx.x * TILE + (int)threadIdx.x / 32 * TOKENS_OF_WARP, n = n_chosen * size;
    if (hidden % 8 == 0) Products<4>::each(smem, head, ordering, chosen, first, n, size, hidden, f);
    else Products<2>::each(smem, head, ordering, chosen, first, n, size, hidden, f);
}

// out[row] = the candidate with the largest g . head[candidate], summed in float32; the lowest id on ties, and 0 where
// there is no candidate. As NumPy's argmax has it, a NaN is the largest.
//
//   out [n_rows] i32   counters n_rows times {u64 best; int blocks that ended; int unused}, zero before and after
//   n_distinct: candidates of all rows, each once
//   grid (ceil(n_chosen * size / TILE), n_rows), block (THREADS); dynamic shared memory: 2 * hidden
//   traffic  n_rows * (2 * hidden + 4 * n_chosen + 28) + n_distinct * (2 * hidden + 4)
//   bound by memory: whole rows of head are gathered
extern "C" __global__ void __launch_bounds__(THREADS)
candidate_argmax(const bf16* g, const bf16* head, const int* ordering, const int* chosen, OUT int* out, int* counters,
                 int n_chosen, int size, int hidden) {
    DYNAMIC_SMEM(smem);
    u64 best = 0;
    each_candidate(g, head, ordering, chosen, n_chosen, size, hidden, smem, [&](int token, float logit) {
        best = max(best, leader(logit, token));
    });
    best = block_max(best);
    Place place = {};
    place.best = (u64*)(counters + 4 * blockIdx.y);
    place.n_ended = counters + 4 * blockIdx.y + 2;
    if (threadIdx.x == 0 && best) atomicMax(place.best, best);
    if (!ends_last(place) || threadIdx.x != 0) return;
    best = atomicExch(place.best, 0ull);
    out[blockIdx.y] = best ? (int)~(u32)best : 0;
}

// out[i] = -inf
//
//   out [n] f32
//   grid (ceil(n / (4 * THREADS))), block (THREADS)
//   traffic  4 * n
extern "C" __global__ void __launch_bounds__(THREADS) no_logits(OUT float* out, i64 n) {
    const float none = float_of((int)0xFF800000);
    const i64 i = 4 * ((i64)blockIdx.x * THREADS + threadIdx.x);
    if (i + 4 <= n) {
        *(float4*)(out + i) = make_float4(none, none, none, none);
    } else {
        for (i64 j = i; j < n; ++j) out[j] = none;
    }
}

// logits[row, candidate] = g . head[candidate], the values that candidate_argmax compares; others stay.
//
//   logits [n_rows, vocab] f32
//   n_logits: candidates of each row, summed over rows; n_distinct: each once
//   grid, block and shared memory as candidate_argmax
//   traffic  n_rows * (2 * hidden + 4 * n_chosen) + n_distinct * (2 * hidden + 4) + 4 * n_logits
//   single elements of 4 bytes are written, a sector of 32 each
extern "C" __global__ void __launch_bounds__(THREADS)
candidate_logits(const bf16* g, const bf16* head, const int* ordering, const int* chosen, float* logits, int n_chosen,
                 int size, int hidden, int vocab) {
    DYNAMIC_SMEM(smem);
    logits += (size_t)blockIdx.y * vocab;
    each_candidate(g, head, ordering, chosen, n_chosen, size, hidden, smem, [&](int token, float logit) {
        if (threadIdx.x % 32 == 0) logits[token] = logit;
    });
}
