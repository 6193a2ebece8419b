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
#pragma once
#include "device.cuh"

#ifdef EMULATED

namespace emu {
inline float half_of(u32 two, int i) { return i ? high_half(two) : low_half(two); }

inline void mma_warp(void* const* all) {
    struct Args { float* d; const u32* a; const u32* b; };
    float a[16][16], b[16][8];
    for (int lane = 0; lane < 32; ++lane) {
        const Args& args = *(Args*)all[lane];
        const int group = lane / 4, t = lane % 4;
        for (int i = 0; i < 4; ++i)
            for (int j = 0; j < 2; ++j) a[group + 8 * (i & 1)][2 * t + j + 8 * (i >> 1)] = half_of(args.a[i], j);
        for (int i = 0; i < 2; ++i)
            for (int j = 0; j < 2; ++j) b[2 * t + j + 8 * i][group] = half_of(args.b[i], j);
    }
    for (int row = 0; row < 16; ++row) {
        float d[8];
        for (int n = 0; n < 8; ++n) d[n] = ((Args*)all[4 * (row % 8) + n / 2])->d[2 * (row / 8) + n % 2];
        for (int k = 0; k < 16; ++k)
            for (int n = 0; n < 8; ++n) d[n] += a[row][k] * b[k][n];
        for (int n = 0; n < 8; ++n) ((Args*)all[4 * (row % 8) + n / 2])->d[2 * (row / 8) + n % 2] = d[n];
    }
}

template <int n_matrices, bool is_trans> void load_matrix_warp(void* const* all) {
    struct Args { u32* r; const u16* row; };
    for (int lane = 0; lane < 32; ++lane)
        for (int m = 0; m < n_matrices; ++m) {
            u16 two[2];
            for (int j = 0; j < 2; ++j) {
                const int row = is_trans ? 2 * (lane % 4) + j : lane / 4, column = is_trans ? lane / 4 : 2 * (lane % 4) + j;
                two[j] = ((Args*)all[8 * m + row])->row[column];
            }
            ((Args*)all[lane])->r[m] = two[0] | (u32)two[1] << 16;
        }
}

template <int n_matrices, bool is_trans> void load_matrix(u32* r, const void* row, const char* what) {
    struct Args { u32* r; const u16* row; } args{r, (const u16*)row};
    collective(&args, load_matrix_warp<n_matrices, is_trans>, what, 0);
}
}  // namespace emu

inline void mma_bf16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    const u32 b[2] = {b0, b1};
    struct Args { float* d; const u32* a; const u32* b; } args{d, a, b};
    emu::collective(&args, emu::mma_warp, "mma_bf16", 0);
}
inline void load_matrix_x4(u32 (&r)[4], const void* row) { emu::load_matrix<4, false>(r, row, "load_matrix_x4"); }
inline void load_matrix_x4_trans(u32 (&r)[4], const void* row) { emu::load_matrix<4, true>(r, row, "load_matrix_x4_trans"); }
inline void load_matrix_x2(u32 (&r)[2], const void* row) { emu::load_matrix<2, false>(r, row, "load_matrix_x2"); }
inline void load_matrix_x2_trans(u32 (&r)[2], const void* row) { emu::load_matrix<2, true>(r, row, "load_matrix_x2_trans"); }

template <int n_bytes> void copy_async(void* to, const void* from, bool is_read = true) {
    if (is_read) memcpy(to, from, n_bytes);
    else memset(to, 0, n_bytes);
}
inline void copy_commit() {}
template <int n_open> void copy_wait() {}

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

#endif
