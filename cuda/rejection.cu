// Verifying drafted tokens on the device. The twin is engine/reference_drafts.py: the same tokens from the same float32
// logits, always, for the filters and the race are those of sampling.cu.
//
//   sample_drafts        = largest_logit, count_weights, find_kept, draw_draft
//   sample_with_drafts   = largest_logit, count_weights, find_kept, draw_with_draft
//   relax_drafts         = largest_logit, relax_drafts
//   accept_drafts        how far the tokens agree with the drafts, and where to go on
//
// The first two kernels of a line are sampling.cu's. In all but accept_drafts a row of logits is cut into chunks, a
// block each: grid (n_chunks, n_rows), block (THREADS), and the block of a row that ends last goes on alone.
// A token's probability is its weight over the sum of the weights kept, a quotient of two float32 numbers.
//
//   logits    [n_rows, vocab] f32, vocab < 2^19; 16-byte loads where vocab is a multiple of 4
//   scratch, counters as in sampling.cu
//   built with -DTHREADS=... -DN_BINS=1409  (THREADS a multiple of 32)
//   dynamic shared memory: BINS_BYTES + 8192 in find_kept
#include "filters.cuh"

constexpr int PROPOSAL = 1, COIN = 2, RESIDUAL = 3;     // domains of random words; 0 is a plain draw's

__device__ __forceinline__ u64 block_sum(u64 x) {
    __shared__ u64 part[THREADS / 32];
    for (int m = 16; m; m >>= 1) x += __shfl_xor_sync(0xFFFFFFFFu, x, m);
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = x;
    __syncthreads();
    u64 sum = 0;
    for (int i = 0; i < THREADS / 32; ++i) sum += part[i];
    __syncthreads();
    return sum;
}

// The tokens that the filters keep, as the least candidate among them and the sum of their weights; of rows that are
// not greedy and whose maximum is finite.
//
//   of a row with a top-k or top-p; n_listed tokens are in bins with a cut
//   traffic  4 * vocab + 12 * N_BINS + 16 * n_listed + 93
extern "C" __global__ void __launch_bounds__(THREADS, 3)
find_kept(const float* logits, const bool* is_greedy, const float* inverse_temperature, const int* top_k,
          const i64* top_p, const i64* least_weight, void* scratch, int* counters, int vocab, int chunk, int capacity) {
    DYNAMIC_SMEM(smem);
    const int row = blockIdx.y, begin = blockIdx.x * chunk;
    const Place place = place_of(scratch, counters, capacity);
    if (is_greedy[row] || !is_finite(place.row->largest)) return;

    logits += (size_t)row * vocab;
    const Row plan = *place.row;
    const WeightRank rank_of{plan.largest, inverse_temperature[row]};
    const int least_rank = rank_at_least(least_weight[row]);
    u64 mass = 0;
    each_sure(logits, vocab, begin, min(vocab, begin + chunk), place, plan, rank_of, least_rank,
              [&](int, const int (&rank)[4]) {
        #pragma unroll
        for (int j = 0; j < 4; ++j)
            if (rank[j] >= 0) mass += (u64)weight_of(rank[j]);
    });
    mass = block_sum(mass);
    if (threadIdx.x == 0) atomicAdd(place.best, mass);
    if (!ends_last(place)) return;

    u64 least = (u64)least_rank << ID_BITS;
    mass = 0;
    if (plan.sure_from > 0) {
        const Candidates<WeightRank> candidates = listed(place, plan, logits, vocab, rank_of);
        least = max(least, least_kept(place, candidates, Filters(top_k, top_p, row, vocab), smem));
        candidates.each([&](u64 candidate) {            // where the list had no room, sure ones are among them
            const int rank = rank_at(candidate);
            if (candidate >= least && rank >> BIN_SHIFT < plan.sure_from) mass += (u64)weight_of(rank);
        });
        mass = block_sum(mass);
    }
    if (threadIdx.x == 0) {
        place.kept->least = least;
        place.kept->total = (float)(mass + *place.best);
        *place.best = 0;
        *place.n_listed = 0;
    }
}

// out = a draw of domain PROPOSAL, and probs = what it is drawn from, 0 where a token is not kept. A row that is
// greedy, or whose maximum is not finite, keeps the argmax that is there, and all of probs is on it.
//
//   probs      [n_rows, vocab] f32
//   positions  [n_rows] i32 or null: the token at positions + ahead is decided, not at position
//   of a row
//   traffic  8 * vocab + 65
extern "C" __global__ void __launch_bounds__(THREADS)
draw_draft(const float* logits, const bool* is_greedy, const float* inverse_temperature, const u64* seed,
           const i64* position, const int* positions, int* out, OUT float* probs, void* scratch, int* counters,
           int vocab, int chunk, int capacity, int ahead) {
    const int row = blockIdx.y, begin = blockIdx.x * chunk, end = min(vocab, begin + chunk);
    const Place place = place_of(scratch, counters, capacity);
    const float largest = place.row->largest;
    logits += (size_t)row * vocab;
    probs += (size_t)row * vocab;
    if (is_greedy[row] || !is_finite(largest)) {
        for (int i = begin + (int)threadIdx.x; i < end; i += THREADS) probs[i] = i == out[row];
        return;
    }
    const WeightRank rank_of{largest, inverse_temperature[row]};
    const Kept kept = {place.kept->least, place.kept->total};
    const u64 key = seed[row], at = positions ? (u64)((i64)positions[row] + ahead) : (u64)position[row];
    u64 best = 0;
    each_quad(logits, vocab, begin, end, [&](int i, const float (&logit)[4], int n) {
        int rank[4];
        float prob[4] = {0.f, 0.f, 0.f, 0.f};
        if (kept_ranks(i, logit, n, rank_of, kept.least, rank)) {
            const RandomWords words = quad_words(i, key, at, PROPOSAL);
            #pragma unroll
            for (int j = 0; j < 4; ++j) {
                if (rank[j] < 0) continue;
                const float weight = weight_of(rank[j]);
                best = max(best, runner(words.word[j], weight, i + j));
                prob[j] = div_f32(weight, kept.total);
            }
        }
        if (vocab % 4 == 0) {
            *(float4*)(probs + i) = make_float4(prob[0], prob[1], prob[2], prob[3]);
        } else {
            #pragma unroll
            for (int j = 0; j < 4; ++j)
                if (j < n) probs[i + j] = prob[j];
        }
    });
    best = block_max(best);
    if (threadIdx.x == 0 && best) atomicMax(place.best, best);
    if (ends_last(place) && threadIdx.x == 0) out[row] = winner(atomicExch(place.best, 0ull));
}

// out = the draft d, where coin * draft_prob(d) < target_prob(d); else a draw from max(target_prob - draft_prob, 0), or
// from target_prob where that is 0 everywhere. No division: target_prob(d) = 0 always rejects. Without a draft, d < 0,
// a plain draw. Where draft_prob(d) is 0, all of draft_prob is taken to be on d. A row that is greedy, or whose maximum
// is not finite, keeps the argmax that is there.
//
//   drafts      [n_rows] i32
//   draft_probs [n_prob_rows, vocab] f32
//   prob_rows   [n_rows] i32 or null: the row of draft_probs that is a row's; null: its own
//   of a row whose draft is rejected; n_read tokens are in quads of which one is kept, the draft among them
//   traffic  4 * vocab + 4 * n_read + 69
extern "C" __global__ void __launch_bounds__(THREADS)
draw_with_draft(const float* logits, const bool* is_greedy, const float* inverse_temperature, const u64* seed,
                const i64* position, const int* drafts, const float* draft_probs, const int* prob_rows, int* out,
                void* scratch, int* counters, int vocab, int chunk, int capacity) {
    constexpr u64 FROM_REST = 1ull << 63;               // set in every runner: times are positive
    const int row = blockIdx.y, begin = blockIdx.x * chunk, draft = drafts[row];
    const Place place = place_of(scratch, counters, capacity);
    const float largest = place.row->largest;
    if (is_greedy[row] || !is_finite(largest)) return;

    logits += (size_t)row * vocab;
    draft_probs += (size_t)(prob_rows ? prob_rows[row] : row) * vocab;
    const WeightRank rank_of{largest, inverse_temperature[row]};
    const Kept kept = {place.kept->least, place.kept->total};
    const u64 key = seed[row], at = (u64)position[row];
    bool is_one_hot = false;
    if (draft >= 0) {
        const int rank = kept_rank(logits[draft], draft, rank_of, kept.least);
        const float target_prob = rank < 0 ? 0.f : div_f32(weight_of(rank), kept.total);
        const float draft_prob = draft_probs[draft];
        is_one_hot = !(draft_prob > 0.f);
        const float coin = uniform(token_word(0, key, at, COIN));
        if (mul_f32(coin, is_one_hot ? 1.f : draft_prob) < target_prob) {       // all blocks of the row find the same
            if (blockIdx.x == 0 && threadIdx.x == 0) out[row] = draft;
            return;
        }
    }
    u64 best = 0;
    each_quad(logits, vocab, begin, min(vocab, begin + chunk), [&](int i, const float (&logit)[4], int n) {
        int rank[4];
        if (!kept_ranks(i, logit, n, rank_of, kept.least, rank)) return;
        const RandomWords words = quad_words(i, key, at, draft < 0 ? 0 : RESIDUAL);
        Quad of_draft = {{0.f, 0.f, 0.f, 0.f}};
        if (draft >= 0 && !is_one_hot) of_draft = load_quad(draft_probs, vocab, i);
        #pragma unroll
        for (int j = 0; j < 4; ++j) {
            if (rank[j] < 0) continue;
            const int token = i + j;
            if (draft < 0) {
                best = max(best, runner(words.word[j], weight_of(rank[j]), token));
                continue;
            }
            const float target_prob = div_f32(weight_of(rank[j]), kept.total);
            const float rest = sub_f32(target_prob, is_one_hot ? (float)(token == draft) : of_draft.x[j]);
            best = max(best, rest > 0.f ? runner(words.word[j], rest, token)
                                        : runner(words.word[j], target_prob, token) & ~FROM_REST);
        }
    });
    best = block_max(best);
    if (threadIdx.x == 0 && best) atomicMax(place.best, best);
    if (ends_last(place) && threadIdx.x == 0) out[row] = winner(atomicExch(place.best, 0ull));
}

// tokens = the draft d, where its probability at temperature 1 is not 0, fewer than top_k tokens are likelier, and it
// is less likely than the likeliest by delta at most; else the argmax. Other rows, and those without a draft, stay. The
// last comparison is of integers: weights, and delta in units of 2^-32 of their sum.
//
//   drafts [n_rows] i32   is_relaxed [n_rows] bool   tokens [n_rows] i32
//   of a row that is relaxed and has a draft
//   traffic  4 * vocab + 61
extern "C" __global__ void __launch_bounds__(THREADS)
relax_drafts(const float* logits, const int* drafts, const bool* is_relaxed, int* tokens, void* scratch, int* counters,
             int vocab, int chunk, int capacity, int top_k, i64 delta) {
    const int row = blockIdx.y, begin = blockIdx.x * chunk, draft = drafts[row];
    if (!is_relaxed[row] || draft < 0) return;

    const Place place = place_of(scratch, counters, capacity);
    logits += (size_t)row * vocab;
    const float largest = place.row->largest, own = logits[draft];
    const WeightRank rank_of{largest, 1.f};
    u64 best = 0, mass = 0, n_likelier = 0;
    each_token(logits, vocab, begin, min(vocab, begin + chunk), [&](int token, float logit) {
        const int rank = (int)rank_of(logit);
        if (rank >= 0) mass += (u64)weight_of(rank);
        n_likelier += order_of(logit, 0) > order_of(own, 0);        // holds of subnormal numbers, too
        best = max(best, leader(logit, token));
    });
    best = block_max(best);
    mass = block_sum(mass);
    n_likelier = block_sum(n_likelier);
    if (threadIdx.x == 0) {
        atomicMax(place.best, best);
        atomicAdd(place.mass, mass);                    // largest_logit cleared it
        atomicAdd(place.count, (u32)n_likelier);
    }
    if (!ends_last(place) || threadIdx.x != 0) return;
    const int rank = (int)rank_of(own);
    const u64 sum = *place.mass, behind = (u64)(LIKELIEST - (rank < 0 ? 0.f : weight_of(rank)));
    const u64 most = (sum >> 32) * (u64)delta + ((sum & 0xFFFFFFFFu) * (u64)delta >> 32);
    const bool is_good = is_finite(largest) && rank >= 0 && *place.count < (u32)top_k && behind <= most;
    tokens[row] = is_good ? draft : winner(*place.best);
    *place.best = 0;
}

// n_accepted = tokens of a sequence before the first that differs from its draft, which is next_token; state_rows = the
// row of the state that decided it, out_positions = its position, context_lens = that + 1. A sequence without slots
// gets 0 accepted, token 0, row 0 and its position.
//
//   tokens, drafts, slot_rows [n_slots] i32   slot_begin [n_seqs + 1] i32   all others [n_seqs] i32
//   grid (ceil(n_seqs / THREADS)), block (THREADS); latency-bound
//   of sequences that all have slots; so many tokens and drafts are compared, the last token counting as compared
//   traffic  4 * (n_tokens + n_drafts) + 32 * n_seqs + 4
extern "C" __global__ void __launch_bounds__(THREADS)
accept_drafts(const int* tokens, const int* drafts, const int* slot_begin, const int* slot_rows, const int* positions,
              OUT int* n_accepted, OUT int* next_token, OUT int* state_rows, OUT int* out_positions,
              OUT int* context_lens, int n_seqs) {
    const int b = blockIdx.x * THREADS + threadIdx.x;
    if (b >= n_seqs) return;
    const int begin = slot_begin[b], end = slot_begin[b + 1];
    int slot = begin;
    while (slot + 1 < end && tokens[slot] == drafts[slot]) ++slot;
    const bool has_slots = begin < end;
    const int position = positions[b] + slot - begin;
    n_accepted[b] = slot - begin;
    next_token[b] = has_slots ? tokens[slot] : 0;
    state_rows[b] = has_slots ? slot_rows[slot] : 0;
    out_positions[b] = position;
    context_lens[b] = position + 1;
}
