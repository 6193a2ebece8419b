// Rows of logits, a block to each chunk: walking them, what the blocks of a row tell each other, selection by radix.
//
//   each_quad, each_token    a chunk of a row, 16 bytes at a time
//   Place, ends_last         a row's part of scratch, and the block that goes on alone
//   WeightRank, LogitRank    integers that order tokens: by weight, by logit
//   descend, select          where a walk down from the largest reaches so many tokens, or so much weight
//
// Built with -DTHREADS=... and -DN_BINS=1409: 32 bins for each power of two up to 2^44, and one for 2^44 itself.
#pragma once
#include "device.cuh"
#include "random.cuh"

constexpr int ID_BITS = 19, RANK_BITS = 32, DIGIT_BITS = 10;
constexpr int BIN_SHIFT = 18;                   // a bin is a 32nd of a power of 2: ranks in it share their exponent
constexpr u64 ID_MASK = (1u << ID_BITS) - 1;
constexpr int RANK_ZERO = 0x3F800000;           // the bits of 1
constexpr float LIKELIEST = 17592186044416.f;   // 2^44
constexpr float LEAST_X = -31.f;

// What the kernels of an op hand on about a row. Bins from sure_from up are kept, but for min-p; those from listed_from
// up to there, and bin kth, hold a cut.
struct Row {
    float largest, log_sum;
    int sure_from, listed_from, kth, is_listed;
};

// What rejection.cu hands on about a row: the least candidate that the filters keep, and what all they keep weigh.
struct Kept {
    u64 least;
    float total;
};

struct Place {
    Row* row;
    Kept* kept;
    u64 *mass, *list, *best;
    u32* count;
    int *n_ended, *n_listed;
};

__device__ __forceinline__ Place place_of(void* scratch, int* counters, int capacity) {
    const size_t bytes = sizeof(Row) + sizeof(Kept) + 8 * N_BINS + 4 * (N_BINS + 1) + (size_t)8 * capacity;
    unsigned char* at = (unsigned char*)scratch + blockIdx.y * bytes;
    counters += 4 * blockIdx.y;
    Place place;
    place.row = (Row*)at;
    place.kept = (Kept*)(at + sizeof(Row));
    place.mass = (u64*)(place.kept + 1);
    place.count = (u32*)(place.mass + N_BINS);
    place.list = (u64*)(place.count + N_BINS + 1);
    place.best = (u64*)counters;
    place.n_ended = counters + 2;
    place.n_listed = counters + 3;
    return place;
}

// True in the block of the row that ends last, which sees what the others wrote; every block calls it once.
__device__ __forceinline__ bool ends_last(const Place& place) {
    __shared__ bool is_last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        is_last = atomicAdd(place.n_ended, 1) == (int)gridDim.x - 1;
        if (is_last) *place.n_ended = 0;
    }
    __syncthreads();
    __threadfence();
    return is_last;
}

__device__ __forceinline__ u64 block_max(u64 x) {
    __shared__ u64 part[THREADS / 32];
    for (int m = 16; m; m >>= 1) x = max(x, __shfl_xor_sync(0xFFFFFFFFu, x, m));
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = x;
    __syncthreads();
    for (int i = 0; i < THREADS / 32; ++i) x = max(x, part[i]);
    __syncthreads();
    return x;
}

// Four numbers of a row of `vocab`, from i on, a multiple of 4; 0 where it ends.
struct Quad { float x[4]; };
__device__ __forceinline__ Quad load_quad(const float* row, int vocab, int i) {
    if (vocab % 4 == 0) {
        const float4 quad = *(const float4*)(row + i);
        return {{quad.x, quad.y, quad.z, quad.w}};
    }
    return {{row[i], i + 1 < vocab ? row[i + 1] : 0.f, i + 2 < vocab ? row[i + 2] : 0.f,
             i + 3 < vocab ? row[i + 3] : 0.f}};
}

// f(token, logits of token .. token + 3, how many of them there are) over [begin, end) of a row; begin a multiple of 4.
template <class F> __device__ __forceinline__ void each_quad(const float* logits, int vocab, int begin, int end, F f) {
    for (int i = begin + 4 * (int)threadIdx.x; i < end; i += 4 * THREADS) {
        const Quad quad = load_quad(logits, vocab, i);
        f(i, quad.x, min(4, vocab - i));
    }
}

template <class F> __device__ __forceinline__ void each_token(const float* logits, int vocab, int begin, int end, F f) {
    each_quad(logits, vocab, begin, end, [&](int i, const float (&logit)[4], int n) {
        #pragma unroll
        for (int j = 0; j < 4; ++j)
            if (j < n) f(i + j, logit[j]);
    });
}

// Tests of bits: they hold with subnormals flushed, too.
__device__ __forceinline__ bool is_finite(float x) { return (bits_of(x) & 0x7F800000) != 0x7F800000; }
__device__ __forceinline__ bool is_nan(float x) { return (bits_of(x) & 0x7FFFFFFF) > 0x7F800000; }

// Orders floats as < does: -0 and 0 are one.
__device__ __forceinline__ u32 order_of(float x, u32 of_nan) {
    const u32 bits = (u32)bits_of(x);
    if (is_nan(x)) return of_nan;
    if (bits << 1 == 0) return 0x80000000u;
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The largest is NumPy's argmax: the first NaN, else the first largest.
__device__ __forceinline__ u64 leader(float logit, int token) {
    return (u64)order_of(logit, 0xFFFFFFFFu) << 32 | ~(u32)token;
}

// The rank of a token's weight, or -1 where the token is dropped.
struct WeightRank {
    float largest, inverse_temperature;
    __device__ __forceinline__ i64 operator()(float logit) const {
        const float x = mul_f32(sub_f32(logit, largest), inverse_temperature);
        return x >= LEAST_X ? bits_of(rintf(mul_f32(exp_f32(x), LIKELIEST))) - RANK_ZERO : -1;
    }
};
struct LogitRank {
    __device__ __forceinline__ i64 operator()(float logit) const { return order_of(logit, 0); }
};

__device__ __forceinline__ float weight_of(int rank) { return float_of(rank + RANK_ZERO); }

// The smallest rank that weighs at least `weight`, 1 .. 2^44.
__device__ __forceinline__ int rank_at_least(i64 weight) {
    const float nearest = (float)weight;
    return bits_of(nearest) - RANK_ZERO + ((i64)nearest < weight);
}

// What n tokens of one exponent weigh, whose ranks exceed `rank` by `excess` in sum.
__device__ __forceinline__ u64 mass_of(u32 n, u64 excess, u32 rank) {
    const int shift = (int)(rank >> 23) - 23;
    const u64 significands = n * (u64)((rank & 0x7FFFFFu) | 0x800000u) + excess;
    return shift >= 0 ? significands << shift : significands >> -shift;
}

// A token as one number: by rank, then the lowest id first.
__device__ __forceinline__ u64 candidate_of(i64 rank, int token) {
    return (u64)rank << ID_BITS | (ID_MASK - (u64)token);
}
__device__ __forceinline__ int rank_at(u64 candidate) { return (int)(candidate >> ID_BITS); }
__device__ __forceinline__ int token_of(u64 candidate) { return (int)(ID_MASK - (candidate & ID_MASK)); }

struct Bin { u32 count; u64 mass; };

// Where a walk from the highest bin down reaches its target: the bin, or -1, what is in it and what in all above.
struct Found { u64 mass, above_mass, total_mass; u32 count, above_count; i64 bin; };

// bin_at(i) is bin i < n_bins <= MOST_BINS; the walk counts tokens, or mass. target >= 1.
template <int MOST_BINS, class F>
__device__ __forceinline__ Found descend(int n_bins, F bin_at, u64 target, bool by_mass) {
    constexpr int N_EACH = (MOST_BINS + THREADS - 1) / THREADS;
    __shared__ Found found;
    __shared__ u64 part_mass[THREADS / 32];
    __shared__ u32 part_count[THREADS / 32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, first = n_bins - 1 - (int)threadIdx.x * N_EACH;
    Bin bins[N_EACH], own = {0, 0};
    #pragma unroll
    for (int j = 0; j < N_EACH; ++j) {
        bins[j] = first >= j ? bin_at(first - j) : Bin{0, 0};
        own.count += bins[j].count;
        own.mass += bins[j].mass;
    }
    Bin above = own;                            // with all lanes before
    for (int d = 1; d < 32; d *= 2) {
        const u32 count = __shfl_up_sync(0xFFFFFFFFu, above.count, d);
        const u64 mass = __shfl_up_sync(0xFFFFFFFFu, above.mass, d);
        if (lane >= d) above.count += count, above.mass += mass;
    }
    if (lane == 31) part_count[warp] = above.count, part_mass[warp] = above.mass;
    if (threadIdx.x == 0) found = {0, 0, 0, 0, 0, -1};
    __syncthreads();
    above.count -= own.count;
    above.mass -= own.mass;
    u64 total_mass = 0;
    for (int i = 0; i < THREADS / 32; ++i) {
        if (i < warp) above.count += part_count[i], above.mass += part_mass[i];
        total_mass += part_mass[i];
    }
    #pragma unroll
    for (int j = 0; j < N_EACH; ++j) {
        const u64 before = by_mass ? above.mass : above.count, more = by_mass ? bins[j].mass : bins[j].count;
        if (before < target && target <= before + more)
            found = {bins[j].mass, above.mass, 0, bins[j].count, above.count, first - j};
        above.count += bins[j].count;
        above.mass += bins[j].mass;
    }
    __syncthreads();
    Found result = found;
    result.total_mass = total_mass;
    __syncthreads();
    return result;
}

// The candidates of a row: its list, or all its tokens where they did not fit.
template <class Rank> struct Candidates {
    const u64* list;
    int n_listed;                               // -1: walk the logits
    const float* logits;
    int vocab;
    Rank rank_of;
    template <class F> __device__ __forceinline__ void each(F f) const {
        if (n_listed >= 0) {
            for (int i = threadIdx.x; i < n_listed; i += THREADS) f(list[i]);
        } else {
            each_token(logits, vocab, 0, vocab, [&](int token, float logit) {
                const i64 rank = rank_of(logit);
                if (rank >= 0) f(candidate_of(rank, token));
            });
        }
    }
};

// The result of a selection: the largest candidates, whose bits from `low` up are at least `least`.
struct Selected {
    u64 least;
    u64 mass, above_mass;                       // of the tokens that share least, and of those above
    u32 count;
};

// Among candidates whose bits from `high` up are `prefix`, the fewest of the largest that are `need` tokens, or mass,
// told apart by bits from `low` up alone. WEIGHS: low >= ID_BITS, and ranks are those of weights.
// digits  8 << DIGIT_BITS bytes of shared memory
template <bool WEIGHS, class Rank>
__device__ __forceinline__ Selected select(const Candidates<Rank>& candidates, u64 prefix, int high, int low, u64 need,
                                           bool by_mass, unsigned char* digits) {
    u32 *const count = (u32*)digits, *const excess = count + (1 << DIGIT_BITS);
    u64 above_mass = 0;
    for (;;) {
        const int bits = min(high - low, DIGIT_BITS), shift = high - bits;
        const u32 mask = (1u << bits) - 1;
        for (int i = threadIdx.x; i <= (int)mask; i += THREADS) count[i] = excess[i] = 0;
        __syncthreads();
        candidates.each([&](u64 candidate) {
            if (candidate >> high != prefix) return;
            const u32 digit = (u32)(candidate >> shift) & mask;
            atomicAdd(&count[digit], 1u);
            if (WEIGHS && shift > ID_BITS)
                atomicAdd(&excess[digit], (u32)(candidate >> ID_BITS) & ((1u << (shift - ID_BITS)) - 1));
        });
        __syncthreads();
        const Found found = descend<1 << DIGIT_BITS>(1 << bits, [&](int i) {
            const u32 rank = WEIGHS ? (u32)((prefix << bits | (u64)i) << (shift - ID_BITS)) : 0;
            return Bin{count[i], WEIGHS ? mass_of(count[i], excess[i], rank) : 0};
        }, need, by_mass);
        need -= by_mass ? found.above_mass : found.above_count;
        above_mass += found.above_mass;
        prefix = prefix << bits | (u64)found.bin;
        high = shift;
        if (high == low || found.count == 1 || (!by_mass && need == found.count))
            return {prefix << (high - low), found.mass, above_mass, found.count};
    }
}
