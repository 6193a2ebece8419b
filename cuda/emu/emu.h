// CUDA C++ on the host: what a .cu file of this project needs to compile with g++ and run on a CPU.
//
// A block runs on one OS thread; its CUDA threads are fibers, and a barrier or a warp collective is a switch between
// them (runtime.cpp). Blocks run side by side on several OS threads. No CUDA header, no CUDA tool.
#pragma once
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#define EMULATED 1
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ static thread_local        // a block stays on one OS thread, which runs one block at a time
#define __constant__ static const
#define __grid_constant__

struct dim3 { unsigned x = 1, y = 1, z = 1; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

namespace emu {

struct Warp {
    unsigned n_threads = 0, n_arrived = 0;
    unsigned generation = 0;
    const void* what = nullptr;               // which collective the waiting lanes are in
    alignas(16) unsigned char value[2][32][16];       // shuffled values, two generations
    void* lane_args[32];                      // arguments of a collective that its last lane computes for all
};

struct Fiber {
    void* sp;
    void* stack;
    dim3 thread;
    unsigned index, lane;
    Warp* warp;
    const char* waits_in;                     // barrier or collective, null when it runs
    int line;
    bool is_done;
};

struct Block {
    dim3 index, dim, grid;
    Fiber* self;
    unsigned char* smem;                      // dynamic shared memory
};

extern thread_local Block* block __attribute__((tls_model("initial-exec")));

void sync_block(int line);
// Parks this lane until all lanes of its warp are in the same collective; true in the lane that came last, which does
// the work and then calls release_warp().
bool join_warp(const char* what, int line);
void release_warp();

template <class T> T exchange(T value, unsigned source, const char* what, int line) {
    static_assert(sizeof(T) <= 16 && std::is_trivially_copyable<T>::value, "shuffles move up to 16 bytes");
    Fiber* me = block->self;
    Warp& warp = *me->warp;
    unsigned char (&slots)[32][16] = warp.value[warp.generation & 1];
    memcpy(slots[me->lane], &value, sizeof value);
    if (join_warp(what, line)) release_warp();
    memcpy(&value, slots[source], sizeof value);
    return value;
}

// One collective whose last lane runs `compute(void* const args[32])` for all of them.
template <class F> void collective(void* args, F compute, const char* what, int line) {
    Warp& warp = *block->self->warp;
    warp.lane_args[block->self->lane] = args;
    if (join_warp(what, line)) {
        compute(warp.lane_args);
        release_warp();
    }
}

inline unsigned ballot(bool predicate, const char* what, int line) {
    unsigned bits = 0;
    struct Args { bool predicate; unsigned* out; } args{predicate, &bits};
    collective(&args, [](void* const* all) {
        unsigned result = 0;
        for (unsigned i = 0; i < block->self->warp->n_threads; ++i) result |= (unsigned)((Args*)all[i])->predicate << i;
        for (unsigned i = 0; i < block->self->warp->n_threads; ++i) *((Args*)all[i])->out = result;
    }, what, line);
    return bits;
}

template <class... A, size_t... I> void call(void (*kernel)(A...), void** args, std::index_sequence<I...>) {
    kernel(*(std::remove_cv_t<std::remove_reference_t<A>>*)args[I]...);
}
template <class... A> void call(void (*kernel)(A...), void** args) {
    call(kernel, args, std::index_sequence_for<A...>{});
}

}  // namespace emu

#define threadIdx (emu::block->self->thread)
#define blockIdx (emu::block->index)
#define blockDim (emu::block->dim)
#define gridDim (emu::block->grid)
#define DYNAMIC_SMEM(name) unsigned char* const name = emu::block->smem

#define __syncthreads() emu::sync_block(__LINE__)
#define __syncwarp(...) do { if (emu::join_warp("__syncwarp", __LINE__)) emu::release_warp(); } while (0)
#define __shfl_sync(mask, v, lane) emu::exchange(v, (unsigned)(lane) & 31, "__shfl_sync", __LINE__)
#define __shfl_xor_sync(mask, v, m) emu::exchange(v, emu::block->self->lane ^ (unsigned)(m), "__shfl_xor_sync", __LINE__)
#define __shfl_down_sync(mask, v, d) emu::exchange(v, emu::block->self->lane + (d) < 32 ? emu::block->self->lane + (d) : emu::block->self->lane, "__shfl_down_sync", __LINE__)
#define __shfl_up_sync(mask, v, d) emu::exchange(v, emu::block->self->lane >= (unsigned)(d) ? emu::block->self->lane - (d) : emu::block->self->lane, "__shfl_up_sync", __LINE__)
#define __ballot_sync(mask, p) emu::ballot(p, "__ballot_sync", __LINE__)
#define __any_sync(mask, p) (emu::ballot(p, "__any_sync", __LINE__) != 0)
#define __all_sync(mask, p) (emu::ballot(!(p), "__all_sync", __LINE__) == 0)

inline void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }
template <class T> T __ldg(const T* p) { return *p; }
template <class T> T atomicAdd(T* p, T v) {
    if constexpr (std::is_floating_point<T>::value) {
        T old = __atomic_load_n(p, __ATOMIC_SEQ_CST), next;      // GCC has no floating-point fetch_add builtin
        do next = old + v; while (!__atomic_compare_exchange(p, &old, &next, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST));
        return old;
    } else {
        return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST);
    }
}
template <class T> T atomicMax(T* p, T v) {
    T old = __atomic_load_n(p, __ATOMIC_SEQ_CST);
    while (old < v && !__atomic_compare_exchange_n(p, &old, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {}
    return old;
}
template <class T> T atomicMin(T* p, T v) {
    T old = __atomic_load_n(p, __ATOMIC_SEQ_CST);
    while (v < old && !__atomic_compare_exchange_n(p, &old, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {}
    return old;
}
template <class T> T atomicExch(T* p, T v) { return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST); }
template <class T> T atomicCAS(T* p, T expected, T v) {
    __atomic_compare_exchange_n(p, &expected, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
    return expected;
}

inline int __float_as_int(float x) { int bits; memcpy(&bits, &x, 4); return bits; }
inline unsigned __float_as_uint(float x) { unsigned bits; memcpy(&bits, &x, 4); return bits; }
inline float __int_as_float(int bits) { float x; memcpy(&x, &bits, 4); return x; }
inline float __uint_as_float(unsigned bits) { float x; memcpy(&x, &bits, 4); return x; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __frsqrt_rn(float x) { return (float)(1 / sqrt((double)x)); }
inline float rsqrtf(float x) { return (float)(1 / sqrt((double)x)); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
template <class T> T min(T a, T b) { return b < a ? b : a; }
template <class T> T max(T a, T b) { return a < b ? b : a; }
