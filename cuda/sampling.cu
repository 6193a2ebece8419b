// Choosing tokens on the device. The twin is engine/sampler.py: the same tokens from the same float32 logits, always.
// No result depends on an order of adding: blocks meet in maxima, and in sums of integers.
//
//   apply_edits     changes single logits: bias, penalties, bans
//   sample          = largest_logit, count_weights, draw
//   top_logprobs    = largest_logit, sum_weights, list_likeliest
//
// In all but apply_edits a row of logits is cut into chunks, a block each: grid (n_chunks, n_rows), block (THREADS).
// The block of a row that ends last goes on alone with the little work that is left: the argmax, the bins of the cuts,
// the token.
//
// The weight of a token, rint(2^44 * exp((l - max) / T)), is exact in float32, so the bits of that float, less those of
// 1, order the weights: the rank, 0 .. 44 * 2^23. Its upper 11 bits are the token's bin. count_weights adds up tokens
// and weights of each bin; that shows in which bins top-k and top-p cut. draw races the tokens of all higher bins, and
// lists those of the bins with a cut; from the list the last block selects by radix, and races what is left.
// Where the list is longer than its place (thousands of equal logits) it walks the logits instead: slower, same tokens.
//
//   logits    [n_rows, vocab] f32, vocab < 2^19; 16-byte loads where vocab is a multiple of 4
//   scratch   n_rows times {Row; u64 mass [N_BINS]; u32 count [N_BINS + 1]; u64 list [capacity]}
//   counters  n_rows times {u64 best or sum; int blocks that ended; int tokens listed}, zero before and after an op
//   built with -DTHREADS=... -DN_BINS=1409  (THREADS a multiple of 32)
//   dynamic shared memory: BINS_BYTES in count_weights, 8192 more in draw; 4 * N_BINS, 8192 in the last two
#include "filters.cuh"

// l + bias; if seen, l / r where l > 0, else l * r; - frequency * n; - presence where n > 0; if banned, -inf
//
//   row, token, bias, is_seen, n_in_output, is_banned [capacity]   repetition, presence, frequency [n_rows]
//   n_edits [1]: so many entries count, no (row, token) twice
//   grid (ceil(capacity / THREADS)), block (THREADS); latency-bound
//   traffic  4 + 26 * n_edits + 12 * n_edited_rows
extern "C" __global__ void __launch_bounds__(THREADS)
apply_edits(float* logits, const int* row, const int* token, const float* bias, const bool* is_seen,
            const int* n_in_output, const bool* is_banned, const float* repetition, const float* presence,
            const float* frequency, const int* n_edits, int vocab) {
    const int i = blockIdx.x * THREADS + threadIdx.x;
    if (i >= *n_edits) return;
    float* at = logits + (size_t)row[i] * vocab + token[i];
    const float r = repetition[row[i]], f = frequency[row[i]], p = presence[row[i]];
    const int n = n_in_output[i];
    float x = add_f32(*at, bias[i]);
    if (is_seen[i]) x = x > 0.f ? div_f32(x, r) : mul_f32(x, r);
    x = sub_f32(sub_f32(x, mul_f32(f, (float)n)), n > 0 ? p : 0.f);
    *at = is_banned[i] ? float_of((int)0xFF800000) : x;
}

// out = argmax(row) as NumPy has it: the first NaN, else the first largest. Clears the row's bins for what follows.
//
//   out [n_rows] i32 or null
//   traffic  n_rows * (4 * vocab + 12 * N_BINS + 48 + 4 * has_out)
extern "C" __global__ void __launch_bounds__(THREADS)
largest_logit(const float* logits, OUT int* out, void* scratch, int* counters, int vocab, int chunk, int capacity) {
    const Place place = place_of(scratch, counters, capacity);
    logits += (size_t)blockIdx.y * vocab;
    const int begin = blockIdx.x * chunk;
    for (int i = blockIdx.x * THREADS + threadIdx.x; i < N_BINS; i += gridDim.x * THREADS) {
        place.count[i] = 0;
        place.mass[i] = 0;
    }
    u64 best = 0;
    each_token(logits, vocab, begin, min(vocab, begin + chunk), [&](int token, float logit) {
        best = max(best, leader(logit, token));
    });
    best = block_max(best);
    if (threadIdx.x == 0) atomicMax(place.best, best);
    if (!ends_last(place) || threadIdx.x != 0) return;
    const int token = winner(atomicExch(place.best, 0ull));
    if (out) out[blockIdx.y] = token;
    *place.row = {logits[token], 0.f, 0, 0, -1, 0};
}

// Tokens and mass of each bin, where a row has a top-k or top-p; then the bins that hold their cuts.
//
//   of a row with such a filter, n_bins of whose bins are not empty; other rows move a few bytes. In the L2 cache each
//   block adds to its bins, up to 24 bytes a bin
//   traffic  4 * vocab + 12 * (N_BINS + n_bins) + 45
extern "C" __global__ void __launch_bounds__(THREADS)
count_weights(const float* logits, const bool* is_greedy, const float* inverse_temperature, const int* top_k,
              const i64* top_p, void* scratch, int* counters, int vocab, int chunk, int capacity) {
    DYNAMIC_SMEM(smem);
    u32 *const count = (u32*)smem, *const excess = count + N_BINS;
    const int row = blockIdx.y, begin = blockIdx.x * chunk;
    const Place place = place_of(scratch, counters, capacity);
    const Filters filters(top_k, top_p, row, vocab);
    if (is_greedy[row] || filters.keep_all() || !is_finite(place.row->largest)) return;

    for (int i = threadIdx.x; i < N_BINS; i += THREADS) count[i] = excess[i] = 0;
    __syncthreads();
    const WeightRank rank_of{place.row->largest, inverse_temperature[row]};
    each_token(logits + (size_t)row * vocab, vocab, begin, min(vocab, begin + chunk), [&](int, float logit) {
        const int rank = (int)rank_of(logit);
        if (rank < 0) return;
        atomicAdd(&count[rank >> BIN_SHIFT], 1u);
        atomicAdd(&excess[rank >> BIN_SHIFT], (u32)rank & ((1u << BIN_SHIFT) - 1));
    });
    __syncthreads();
    for (int i = threadIdx.x; i < N_BINS; i += THREADS) {
        if (!count[i]) continue;
        atomicAdd(&place.count[i], count[i]);
        atomicAdd(&place.mass[i], mass_of(count[i], excess[i], (u32)i << BIN_SHIFT));
    }
    if (!ends_last(place)) return;

    // What top-k leaves weighs at least what is above its bin, at most the bin more: top-p cuts in between.
    const Bins bins(place, smem);
    const Found kth = bins.find(filters.top_k, false);
    Found high = kth, low = kth;
    if (filters.top_p < TOP_P_ALL) {
        const u64 least = kth.bin < 0 ? kth.total_mass : kth.above_mass;
        high = bins.find(max(share_of(least, filters.top_p), (u64)1), true);
        low = kth.bin < 0 ? high : bins.find(share_of(kth.above_mass + kth.mass, filters.top_p), true);
    }
    u32 n = low.above_count + low.count - high.above_count;
    if (kth.bin < low.bin) n += kth.count;
    if (threadIdx.x == 0) {
        place.row->sure_from = (int)high.bin + 1;
        place.row->listed_from = (int)low.bin;
        place.row->kth = (int)kth.bin;
        place.row->is_listed = n <= (u32)capacity;
    }
}

// out = a draw from the filtered distribution, in rows that are not greedy and whose maximum is finite; other rows keep
// the argmax that is there.
//
//   of a row with a top-k or top-p; n_listed tokens are in bins with a cut
//   traffic  4 * vocab + 12 * N_BINS + 16 * n_listed + 97
extern "C" __global__ void __launch_bounds__(THREADS, 3)     // at 4 blocks the compiler spills
draw(const float* logits, const bool* is_greedy, const float* inverse_temperature, const int* top_k, const i64* top_p,
     const i64* least_weight, const u64* seed, const i64* position, int* out, void* scratch, int* counters, int vocab,
     int chunk, int capacity, int domain) {
    DYNAMIC_SMEM(smem);
    const int row = blockIdx.y, begin = blockIdx.x * chunk;
    const Place place = place_of(scratch, counters, capacity);
    if (is_greedy[row] || !is_finite(place.row->largest)) return;

    logits += (size_t)row * vocab;
    const Row plan = *place.row;
    const WeightRank rank_of{plan.largest, inverse_temperature[row]};
    const int least_rank = rank_at_least(least_weight[row]);
    const u64 key = seed[row], at = (u64)position[row];
    u64 best = 0;
    each_sure(logits, vocab, begin, min(vocab, begin + chunk), place, plan, rank_of, least_rank,
              [&](int i, const int (&rank)[4]) {
        const RandomWords words = quad_words(i, key, at, domain);
        #pragma unroll
        for (int j = 0; j < 4; ++j)
            if (rank[j] >= 0) best = max(best, runner(words.word[j], weight_of(rank[j]), i + j));
    });
    best = block_max(best);
    if (threadIdx.x == 0 && best) atomicMax(place.best, best);
    if (!ends_last(place)) return;

    best = 0;
    if (plan.sure_from > 0) {
        const Candidates<WeightRank> candidates = listed(place, plan, logits, vocab, rank_of);
        const Filters filters(top_k, top_p, row, vocab);
        const u64 least = max(least_kept(place, candidates, filters, smem), (u64)least_rank << ID_BITS);
        candidates.each([&](u64 candidate) {
            const int token = token_of(candidate);
            if (candidate >= least)
                best = max(best, runner(token_word(token, key, at, domain), weight_of(rank_at(candidate)), token));
        });
        best = block_max(best);
    }
    if (threadIdx.x == 0) {
        out[row] = winner(max(best, *place.best));
        *place.best = 0;
        *place.n_listed = 0;
    }
}

// A row's log-sum-exp, from weights at temperature 1: log_sum = ln(sum / 2^44), and out_chosen = (l - max) - log_sum at
// the chosen token; NaN where the maximum is not finite. For n > 0, how many tokens lie how far below the maximum, and
// from which of these bins the n largest come.
//
//   chosen [n_rows] i32   out_chosen [n_rows] f32
//   of a row, n_bins of whose bins are not empty, for n > 0; in the L2 cache each block adds up to 8 bytes a bin
//   traffic  4 * vocab + 4 * (N_BINS + n_bins) + 48
__device__ __forceinline__ int distance_bin(float x) {          // x = l - max: 32 bins a unit, the last has the rest
    return x > -44.f ? (int)mul_f32(add_f32(x, 44.f), 32.f) : 0;
}

extern "C" __global__ void __launch_bounds__(THREADS)
sum_weights(const float* logits, const int* chosen, OUT float* out_chosen, void* scratch, int* counters, int vocab,
            int chunk, int capacity, int n) {
    DYNAMIC_SMEM(smem);
    __shared__ u64 block_mass;
    u32* const count = (u32*)smem;
    const int begin = blockIdx.x * chunk;
    const Place place = place_of(scratch, counters, capacity);
    const float largest = place.row->largest;
    logits += (size_t)blockIdx.y * vocab;

    for (int i = threadIdx.x; i < N_BINS; i += THREADS) count[i] = 0;
    if (threadIdx.x == 0) block_mass = 0;
    __syncthreads();
    const WeightRank rank_of{largest, 1.f};
    u64 mass = 0;
    each_token(logits, vocab, begin, min(vocab, begin + chunk), [&](int, float logit) {
        const int rank = (int)rank_of(logit);
        if (rank >= 0) mass += (u64)weight_of(rank);
        if (n) atomicAdd(&count[distance_bin(sub_f32(logit, largest))], 1u);
    });
    for (int m = 16; m; m >>= 1) mass += __shfl_xor_sync(0xFFFFFFFFu, mass, m);
    if (threadIdx.x % 32 == 0) atomicAdd(&block_mass, mass);
    __syncthreads();
    for (int i = threadIdx.x; n && i < N_BINS; i += THREADS)
        if (count[i]) atomicAdd(&place.count[i], count[i]);
    if (threadIdx.x == 0) atomicAdd(place.best, block_mass);
    if (!ends_last(place)) return;

    for (int i = threadIdx.x; n && i < N_BINS; i += THREADS) count[i] = place.count[i];
    __syncthreads();
    Found nth = {0, 0, 0, 0, 0, -1};
    if (n) nth = descend<N_BINS>(N_BINS, [&](int i) { return Bin{count[i], 0}; }, n, false);
    if (threadIdx.x != 0) return;
    const float sum = mul_f32((float)atomicExch(place.best, 0ull), 1 / LIKELIEST);
    const float log_sum = is_finite(largest) ? log_f32(sum) : float_of(0x7FC00000);
    out_chosen[blockIdx.y] = sub_f32(sub_f32(logits[chosen[blockIdx.y]], largest), log_sum);
    place.row->log_sum = log_sum;
    place.row->listed_from = (int)nth.bin;
    place.row->is_listed = nth.above_count + nth.count <= (u32)capacity;
}

// The n largest logits of a row, largest first, the lowest id on ties, NaN last; and their log-probabilities.
//
//   out_ids [n_rows, n] i32   out_logprobs [n_rows, n] f32   1 <= n <= 1024
//   of a row
//   traffic  4 * vocab + 16 * n_listed + 8 * n + 40
extern "C" __global__ void __launch_bounds__(THREADS)
list_likeliest(const float* logits, OUT int* out_ids, OUT float* out_logprobs, void* scratch, int* counters, int vocab,
               int chunk, int capacity, int n) {
    DYNAMIC_SMEM(smem);
    __shared__ int n_taken;
    const int begin = blockIdx.x * chunk;
    const Place place = place_of(scratch, counters, capacity);
    const Row plan = *place.row;
    const LogitRank rank_of;
    logits += (size_t)blockIdx.y * vocab;
    each_token(logits, vocab, begin, plan.is_listed ? min(vocab, begin + chunk) : begin, [&](int token, float logit) {
        if (distance_bin(sub_f32(logit, plan.largest)) >= plan.listed_from)
            place.list[atomicAdd(place.n_listed, 1)] = candidate_of(rank_of(logit), token);
    });
    if (!ends_last(place)) return;

    const Candidates<LogitRank> candidates{place.list, plan.is_listed ? *place.n_listed : -1, logits, vocab, rank_of};
    const u64 least = select<false>(candidates, 0, RANK_BITS + ID_BITS, 0, n, false, smem).least;
    u64* const sorted = (u64*)smem;
    int size = 1;
    while (size < n) size *= 2;
    for (int i = threadIdx.x; i < size; i += THREADS) sorted[i] = 0;
    if (threadIdx.x == 0) n_taken = 0;
    __syncthreads();
    candidates.each([&](u64 candidate) {
        if (candidate >= least) sorted[atomicAdd(&n_taken, 1)] = candidate;
    });
    for (int run = 2; run <= size; run *= 2) {                  // a bitonic sort, the largest first
        for (int d = run / 2; d; d /= 2) {
            __syncthreads();
            for (int i = threadIdx.x; i < size / 2; i += THREADS) {
                const int a = i / d * 2 * d + i % d, b = a + d;
                const u64 x = sorted[a], y = sorted[b];
                if ((x < y) == !(a & run)) sorted[a] = y, sorted[b] = x;
            }
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += THREADS) {
        const int token = token_of(sorted[i]);
        const size_t to = (size_t)blockIdx.y * n + i;
        out_ids[to] = token;
        out_logprobs[to] = sub_f32(sub_f32(logits[token], plan.largest), plan.log_sum);
    }
    if (threadIdx.x == 0) *place.n_listed = 0;
}
