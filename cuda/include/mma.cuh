// Tensor cores and asynchronous copies: every PTX line of the project, with a plain C++ body for the emulator.
//
//   mma_bf16(d, a, b)        d[16,8] += a[16,16] b[16,8], mma.sync m16n8k16, bf16 in, float sums
//                            lane = 4 * group + t holds  d: (group, 2t..2t+1), (group + 8, 2t..2t+1)
//                            a: rows group, group + 8 at k = 2t..2t+1, then the same rows at k + 8;  b: k = 2t..2t+1 and k + 8
//                            of column group
//   load_matrix_x4(r, p)     ldmatrix .x4: lane i names row i % 8 of matrix i / 8 (16 bytes, 16-byte aligned, shared memory);
//   load_matrix_x4_trans     each lane gets (row lane / 4, columns 2 (lane % 4)..+1) of the four 8 x 8 matrices, or of their transposes
//   load_matrix_x2           the same for two matrices, rows named by lanes 0..15
//   copy_async<n_bytes>(to, from, is_read)   cp.async of 4, 8 or 16 bytes; zeros when !is_read (`from` must still be a valid address)
//   copy_commit(), copy_wait<N>()          close a group of copies; wait until at most N groups are open
//   exp2_approx(x)           2^x within 2 ulp, 0 for -inf and where the result is subnormal
#pragma once
#include "device.cuh"

#ifdef EMULATED                 // collectives of the emulator, in emu/runtime.cpp

inline void mma_bf16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, EMU_AT) {
    const u32 b[2] = {b0, b1};
    emu::mma_bf16(d, a, b, file, line);
}
inline void load_matrix_x4(u32 (&r)[4], const void* row, EMU_AT) { emu::load_matrix(r, row, 4, false, file, line); }
inline void load_matrix_x4_trans(u32 (&r)[4], const void* row, EMU_AT) { emu::load_matrix(r, row, 4, true, file, line); }
inline void load_matrix_x2(u32 (&r)[2], const void* row, EMU_AT) { emu::load_matrix(r, row, 2, false, file, line); }
inline void load_matrix_x2_trans(u32 (&r)[2], const void* row, EMU_AT) { emu::load_matrix(r, row, 2, true, file, line); }

template <int n_bytes> __forceinline__ void copy_async(void* to, const void* from, bool is_read = true) {
    emu::copy_async(to, from, n_bytes, is_read);
}
inline void copy_commit() { emu::copy_commit(); }
template <int n_open> void copy_wait() { emu::copy_wait(n_open); }
inline float exp2_approx(float x) { return x < -126.f ? 0.f : exp2f(x); }

#else

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void mma_bf16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void load_matrix_x4(u32 (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
__device__ __forceinline__ void load_matrix_x4_trans(u32 (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
__device__ __forceinline__ void load_matrix_x2(u32 (&r)[2], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1]) : "r"(shared_address(row)) : "memory");
}
__device__ __forceinline__ void load_matrix_x2_trans(u32 (&r)[2], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1]) : "r"(shared_address(row)) : "memory");
}
template <int n_bytes> __device__ __forceinline__ void copy_async(void* to, const void* from, bool is_read = true) {
    const u32 n = is_read ? n_bytes : 0;
    if constexpr (n_bytes == 16)      // .cg passes by L1; smaller copies only exist as .ca
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(shared_address(to)), "l"(from), "r"(n) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" :: "r"(shared_address(to)), "l"(from), "n"(n_bytes), "r"(n) : "memory");
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int n_open> __device__ __forceinline__ void copy_wait() { asm volatile("cp.async.wait_group %0;" :: "n"(n_open) : "memory"); }
__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

#endif
