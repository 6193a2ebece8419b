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
#ifdef EMU_CHECKED
#define __shared__ static __constinit __thread   // __constinit: without a flag "was constructed" beside it
#else
#define __shared__ static __thread            // a block stays on one OS thread, which runs one block at a time
#endif
#define __constant__ static const
#define __grid_constant__

struct dim3 { unsigned x = 1, y = 1, z = 1; };

// A vector is loaded and stored whole, as one access. g++ would take it apart: for the checker, copies are volatile.
#ifdef EMU_CHECKED
#define EMU_COPIES(type, whole)                                                                                    \
    type() = default;                                                                                              \
    type(const type& from) { const whole all = *(const volatile whole*)&from; memcpy(this, &all, sizeof all); }    \
    type& operator=(const type& from) {                                                                            \
        const whole all = *(const volatile whole*)&from;                                                           \
        *(volatile whole*)this = all;                                                                              \
        return *this;                                                                                              \
    }
#define EMU_VECTOR2(type, T) \
    struct alignas(8) type { T x, y; EMU_COPIES(type, uint64_t) constexpr type(T x, T y = 0) : x(x), y(y) {} }
#define EMU_VECTOR4(type, T)                                                          \
    struct alignas(16) type {                                                         \
        T x, y, z, w;                                                                 \
        EMU_COPIES(type, unsigned __int128)                                           \
        constexpr type(T x, T y = 0, T z = 0, T w = 0) : x(x), y(y), z(z), w(w) {}    \
    }
#else
#define EMU_VECTOR2(type, T) struct alignas(8) type { T x, y; }
#define EMU_VECTOR4(type, T) struct alignas(16) type { T x, y, z, w; }
#endif
EMU_VECTOR2(float2, float); EMU_VECTOR2(int2, int); EMU_VECTOR2(uint2, unsigned);
EMU_VECTOR4(float4, float); EMU_VECTOR4(int4, int); EMU_VECTOR4(uint4, unsigned);
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// The line that calls, for messages: the last two parameters of what a kernel calls.
#define EMU_AT const char* file = __builtin_FILE(), int line = __builtin_LINE()

#pragma GCC visibility push(default)
namespace emu {

enum Op { SYNCWARP, SHFL, SHFL_UP, SHFL_DOWN, SHFL_XOR, BALLOT, ANY, ALL, MMA_BF16, LOAD_MATRIX, LOAD_MATRIX_TRANS };

// A thread asks who it is and always hears the same: const, so that the compiler asks once (of scalars only: a dim3 is
// packed as x 32 bits, y 16, z 16).
__attribute__((const)) uint64_t thread_bits();
__attribute__((const)) uint64_t block_bits();
__attribute__((const)) uint64_t block_dim_bits();
__attribute__((const)) uint64_t grid_dim_bits();
__forceinline__ dim3 unpacked(uint64_t bits) {
    return {(unsigned)bits, (unsigned)(bits >> 32) & 0xFFFF, (unsigned)(bits >> 48)};
}
__attribute__((const)) unsigned lane_index();
__attribute__((const)) unsigned char* dynamic_smem();

void sync_block(const char* file, int line);
void sync_warp(unsigned mask, const char* file, int line);
uint64_t shuffle(unsigned mask, uint64_t bits, unsigned source, Op op, const char* file, int line);
unsigned vote(unsigned mask, bool predicate, Op op, const char* file, int line);
void mma_bf16(float* d, const unsigned* a, const unsigned* b, const char* file, int line);
void load_matrix(unsigned* r, const void* row, int n_matrices, bool is_trans, const char* file, int line);
void copy_async(void* to, const void* from, unsigned n_bytes, bool is_read);
void copy_commit();
void copy_wait(unsigned n_open);

template <class T> T shuffled(unsigned mask, T value, unsigned source, Op op, const char* file, int line) {
    static_assert(sizeof(T) <= 8 && std::is_trivially_copyable<T>::value, "shuffles move up to 8 bytes");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    bits = shuffle(mask, bits, source, op, file, line);
    memcpy(&value, &bits, sizeof value);
    return value;
}

template <class... A, size_t... I>
__attribute__((no_sanitize("thread"))) void call(void (*kernel)(A...), void** args, std::index_sequence<I...>) {
    kernel(*(std::remove_cv_t<std::remove_reference_t<A>>*)args[I]...);
}
template <class... A> __attribute__((no_sanitize("thread"))) void call(void (*kernel)(A...), void** args) {
    call(kernel, args, std::index_sequence_for<A...>{});
}

}  // namespace emu
#pragma GCC visibility pop

#define threadIdx (emu::unpacked(emu::thread_bits()))
#define blockIdx (emu::unpacked(emu::block_bits()))
#define blockDim (emu::unpacked(emu::block_dim_bits()))
#define gridDim (emu::unpacked(emu::grid_dim_bits()))
#define DYNAMIC_SMEM(name) unsigned char* const name = emu::dynamic_smem()

inline void __syncthreads(EMU_AT) { emu::sync_block(file, line); }
inline void __syncwarp(unsigned mask = 0xFFFFFFFFu, EMU_AT) { emu::sync_warp(mask, file, line); }

// `width` cuts the warp into segments that are shuffled apart; out of the segment, a lane keeps its own value.
template <class T> T __shfl_sync(unsigned mask, T value, int source, int width = 32, EMU_AT) {
    const unsigned lane = emu::lane_index(), inside = width - 1;
    return emu::shuffled(mask, value, (lane & ~inside) | ((unsigned)source & inside), emu::SHFL, file, line);
}
template <class T> T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, EMU_AT) {
    const unsigned lane = emu::lane_index(), inside = width - 1;
    return emu::shuffled(mask, value, (lane & inside) < delta ? lane : lane - delta, emu::SHFL_UP, file, line);
}
template <class T> T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, EMU_AT) {
    const unsigned lane = emu::lane_index(), inside = width - 1;
    return emu::shuffled(mask, value, (lane & inside) + delta > inside ? lane : lane + delta, emu::SHFL_DOWN, file, line);
}
template <class T> T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, EMU_AT) {
    const unsigned lane = emu::lane_index(), other = lane ^ (unsigned)lanes;
    return emu::shuffled(mask, value, other > (lane | (unsigned)(width - 1)) ? lane : other, emu::SHFL_XOR, file, line);
}
inline unsigned __ballot_sync(unsigned mask, bool p, EMU_AT) { return emu::vote(mask, p, emu::BALLOT, file, line); }
inline int __any_sync(unsigned mask, bool p, EMU_AT) { return emu::vote(mask, p, emu::ANY, file, line) != 0; }
inline int __all_sync(unsigned mask, bool p, EMU_AT) { return emu::vote(mask, !p, emu::ALL, file, line) == 0; }

inline void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }
inline void __threadfence_block() { __threadfence(); }
template <class T> T __ldg(const T* p) { return *p; }
namespace emu {
template <class T> using Same = std::common_type_t<T>;       // takes no part in deduction: atomicAdd(unsigned*, 1) is one
}
template <class T> T atomicCAS(T* p, emu::Same<T> expected, emu::Same<T> value) {
    __atomic_compare_exchange(p, &expected, &value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
    return expected;
}
template <class T> T atomicExch(T* p, emu::Same<T> value) {
    T old;
    __atomic_exchange(p, &value, &old, __ATOMIC_SEQ_CST);
    return old;
}
namespace emu {
// Any atomic as a loop of compare and exchange: g++ has no builtin for floats, nor for a maximum.
template <class T, class F> T atomic_update(T* p, F next_of) {
    T old, next;
    __atomic_load(p, &old, __ATOMIC_SEQ_CST);
    do next = next_of(old);
    while (!__atomic_compare_exchange(p, &old, &next, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST));
    return old;
}
}  // namespace emu
template <class T> T atomicAdd(T* p, emu::Same<T> v) { return emu::atomic_update(p, [v](T old) { return (T)(old + v); }); }
template <class T> T atomicSub(T* p, emu::Same<T> v) { return emu::atomic_update(p, [v](T old) { return (T)(old - v); }); }
template <class T> T atomicMax(T* p, emu::Same<T> v) {
    return emu::atomic_update(p, [v](T old) { return old < v ? v : old; });
}
template <class T> T atomicMin(T* p, emu::Same<T> v) {
    return emu::atomic_update(p, [v](T old) { return v < old ? v : old; });
}
template <class T> T atomicOr(T* p, emu::Same<T> v) { return emu::atomic_update(p, [v](T old) { return (T)(old | v); }); }
template <class T> T atomicAnd(T* p, emu::Same<T> v) { return emu::atomic_update(p, [v](T old) { return (T)(old & v); }); }

inline int __float_as_int(float x) { int bits; memcpy(&bits, &x, 4); return bits; }
inline unsigned __float_as_uint(float x) { unsigned bits; memcpy(&bits, &x, 4); return bits; }
inline float __int_as_float(int bits) { float x; memcpy(&x, &bits, 4); return x; }
inline float __uint_as_float(unsigned bits) { float x; memcpy(&x, &bits, 4); return x; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __frsqrt_rn(float x) { return (float)(1 / sqrt((double)x)); }
inline float rsqrtf(float x) { return (float)(1 / sqrt((double)x)); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)x) : 64; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((unsigned long long)a * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return (unsigned long long)((unsigned __int128)a * b >> 64);
}
template <class T> T min(T a, T b) { return b < a ? b : a; }
template <class T> T max(T a, T b) { return a < b ? b : a; }
