// The filters of a row, the one definition for plain decoding, for drafts and for their verification: which tokens
// top-k, top-p and min-p keep, and the race that draws one of them. The twin is engine/sampler.py, target_weights.
//
//   Filters, Bins      a row's rule, and the bins that count_weights of sampling.cu fills
//   each_sure          a chunk's tokens in bins above every cut; it lists those of the bins with a cut
//   least_kept         which of the listed tokens stay
//   kept_ranks         once that is known: the tokens of a quad that stay
//   runner             a token's place in the race
#pragma once
#include "candidates.cuh"

constexpr i64 TOP_P_ALL = 1ll << 32;
constexpr int BINS_BYTES = 12 * (N_BINS + 1);

// ceil(mass * top_p / 2^32), in halves; top_p < 2^32
__device__ __forceinline__ u64 share_of(u64 mass, i64 top_p) {
    return (mass >> 32) * (u64)top_p + (((mass & 0xFFFFFFFFu) * (u64)top_p + 0xFFFFFFFFu) >> 32);
}

// The filters of a row, each made harmless where it keeps all.
struct Filters {
    u64 top_k;
    i64 top_p;
    __device__ Filters(const int* top_k, const i64* top_p, int row, int vocab)
        : top_k(0 < top_k[row] && top_k[row] < vocab ? (u64)top_k[row] : ~0ull), top_p(top_p[row]) {}
    __device__ bool keep_all() const { return top_k == ~0ull && top_p == TOP_P_ALL; }
};

// A row's bins in shared memory.
struct Bins {
    u64* mass;
    u32* count;
    __device__ Bins(const Place& place, unsigned char* smem) : mass((u64*)smem), count((u32*)(mass + N_BINS)) {
        for (int i = threadIdx.x; i < N_BINS; i += THREADS) {
            mass[i] = place.mass[i];
            count[i] = place.count[i];
        }
        __syncthreads();
    }
    __device__ __forceinline__ Found find(u64 target, bool by_mass) const {
        return descend<N_BINS>(N_BINS, [&](int i) { return Bin{count[i], mass[i]}; }, target, by_mass);
    }
};

// f(token i, ranks of i .. i + 3) over the quads of a chunk that have tokens which the row keeps for sure; the rank of
// others is -1. Tokens in bins with a cut go to the row's list, where they fit.
template <class F>
__device__ __forceinline__ void each_sure(const float* logits, int vocab, int begin, int end, const Place& place,
                                          const Row& plan, const WeightRank& rank_of, int least_rank, F f) {
    each_quad(logits, vocab, begin, end, [&](int i, const float (&logit)[4], int n) {
        int rank[4];
        bool any = false;
        #pragma unroll
        for (int j = 0; j < 4; ++j) {
            rank[j] = j < n ? (int)rank_of(logit[j]) : -1;
            const int bin = rank[j] >> BIN_SHIFT;               // -1 where dropped
            if (bin >= plan.sure_from) {
                if (rank[j] < least_rank) rank[j] = -1;
                any |= rank[j] >= 0;
                continue;
            }
            if (rank[j] >= 0 && plan.is_listed && (bin >= plan.listed_from || bin == plan.kth))
                place.list[atomicAdd(place.n_listed, 1)] = candidate_of(rank[j], i + j);
            rank[j] = -1;
        }
        if (any) f(i, rank);
    });
}

// The tokens that each_sure listed, or all where they did not fit.
__device__ __forceinline__ Candidates<WeightRank> listed(const Place& place, const Row& plan, const float* logits,
                                                         int vocab, const WeightRank& rank_of) {
    return {place.list, plan.is_listed ? *place.n_listed : -1, logits, vocab, rank_of};
}

// The least candidate that the filters of a row keep. Of candidates, all that are in bins with a cut must be there.
__device__ __forceinline__ u64 least_kept(const Place& place, const Candidates<WeightRank>& candidates,
                                          const Filters& filters, unsigned char* smem) {
    constexpr int BIN_BITS = BIN_SHIFT + ID_BITS;
    const Bins bins(place, smem);
    unsigned char* const digits = smem + BINS_BYTES;
    const Found kth = bins.find(filters.top_k, false);
    u64 least = 0, mass = kth.total_mass;
    if (kth.bin >= 0) {
        const u64 rest = filters.top_k - kth.above_count;
        const Selected of_bin = select<true>(candidates, kth.bin, BIN_BITS, ID_BITS, rest, false, digits);
        least = of_bin.least << ID_BITS;
        mass = kth.above_mass + of_bin.above_mass + of_bin.mass;
    }
    if (filters.top_p == TOP_P_ALL) return least;

    const u64 target = share_of(mass, filters.top_p);
    const Found cut = bins.find(target, true);
    const Selected of_bin = select<true>(candidates, cut.bin, BIN_BITS, ID_BITS, target - cut.above_mass, true, digits);
    least = of_bin.least << ID_BITS;
    // equal weights: the lowest ids first, as many as it takes
    const u64 weight = of_bin.mass / of_bin.count, rest = target - cut.above_mass - of_bin.above_mass;
    const u64 n = (rest + weight - 1) / weight;
    if (n < of_bin.count) least = select<false>(candidates, of_bin.least, ID_BITS, 0, n, false, digits).least;
    return least;
}

// The rank of a token that a row keeps, else -1.
__device__ __forceinline__ int kept_rank(float logit, int token, const WeightRank& rank_of, u64 least) {
    const i64 rank = rank_of(logit);
    return rank >= 0 && candidate_of(rank, token) >= least ? (int)rank : -1;
}

// The same of tokens i .. i + n - 1; whether one is kept.
__device__ __forceinline__ bool kept_ranks(int i, const float (&logit)[4], int n, const WeightRank& rank_of, u64 least,
                                           int (&rank)[4]) {
    bool any = false;
    #pragma unroll
    for (int j = 0; j < 4; ++j) {
        rank[j] = j < n ? kept_rank(logit[j], i + j, rank_of, least) : -1;
        any |= rank[j] >= 0;
    }
    return any;
}

// The random words of tokens i .. i + 3; i a multiple of 4.
__device__ __forceinline__ RandomWords quad_words(int i, u64 seed, u64 position, int domain) {
    return philox4x32({{(u32)i / 4, (u32)position, (u32)(position >> 32), (u32)domain}}, (u32)seed, (u32)(seed >> 32));
}

// A race of exponentials: of the tokens that the filters keep, the least E_token / weight wins, the lowest id on ties.
// Times are positive, so their bits order them; what is compared is the complement of (time, id), 0 being none.
__device__ __forceinline__ u64 runner(u32 word, float weight, int token) {
    const float time = div_f32(exponential(word), weight);
    return ~((u64)(u32)bits_of(time) << 32 | (u32)token);
}
__device__ __forceinline__ int winner(u64 best) { return (int)~(u32)best; }
