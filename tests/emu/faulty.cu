// Kernels with one fault each; the comment at the end of a line is how its test names it.
#include "mma.cuh"

extern "C" __global__ void missing_barrier(OUT int* out) {
    __shared__ int there[64];
    there[threadIdx.x] = 0;
    __syncthreads();
    there[threadIdx.x] = threadIdx.x;                                        // wrote
    out[threadIdx.x] = there[63 - threadIdx.x];                              // read
}

extern "C" __global__ void missing_syncwarp(OUT int* out) {
    DYNAMIC_SMEM(smem);
    int* there = (int*)smem;
    for (int i = threadIdx.x; i < 32; i += 32) there[i] = 1;
    __syncwarp();
    if (threadIdx.x == 5) there[9] = 2;                                      // lane 5 wrote
    out[threadIdx.x] = there[threadIdx.x];                                   // lane 9 read
}

extern "C" __global__ void shuffle_orders_nothing(OUT int* out) {
    __shared__ int there[32];
    there[threadIdx.x] = 1;                                                  // before the shuffle
    const int x = __shfl_xor_sync(0xFFFFFFFFu, (int)threadIdx.x, 1);
    out[threadIdx.x] = there[x];                                             // after the shuffle
}

extern "C" __global__ void overwritten_too_early(const int* x, OUT int* out) {
    __shared__ int there[64];
    for (int i = 0; i < 2; ++i) {
        there[threadIdx.x] = x[64 * i + threadIdx.x];                        // next round wrote
        __syncthreads();
        out[64 * i + threadIdx.x] = there[63 - threadIdx.x];                 // round read
    }
}

extern "C" __global__ void two_writers(OUT int* out) {
    __shared__ int there;
    there = threadIdx.x;                                                     // all wrote
    __syncthreads();
    *out = there;
}

extern "C" __global__ void global_race(int* x) {
    x[threadIdx.x] += 1;                                                     // global wrote
    if (threadIdx.x < 32) __syncwarp();
    x[threadIdx.x + 64] = x[63 - threadIdx.x];                               // global read
}

extern "C" __global__ void half_syncwarp(OUT int* out) {
    __shared__ int there[32];
    there[threadIdx.x] = 0;
    __syncwarp();
    there[threadIdx.x] = 1;                                                  // both halves wrote
    if (threadIdx.x < 16) __syncwarp(0x0000FFFFu);
    else __syncwarp(0xFFFF0000u);
    out[threadIdx.x] = there[threadIdx.x ^ 16];                              // other half read
}

extern "C" __global__ void missing_wait(const float* x, OUT float* y) {
    const float4* x4 = (const float4*)x; float4* y4 = (float4*)y;
    __shared__ float4 there[32];
    copy_async<16>(there + threadIdx.x, x4 + threadIdx.x);
    copy_commit();
    copy_wait<1>();
    __syncthreads();
    y4[threadIdx.x] = there[31 - threadIdx.x];                                // not landed
}

extern "C" __global__ void copied_too_early(const float* x, OUT float* y) {
    const float4* x4 = (const float4*)x; float4* y4 = (float4*)y;
    __shared__ float4 there[64];
    there[threadIdx.x] = x4[threadIdx.x];
    __syncthreads();
    y4[threadIdx.x] = there[63 - threadIdx.x];                                // tile read
    copy_async<16>(there + threadIdx.x, x4 + threadIdx.x);                    // tile copied
    copy_commit();
    copy_wait<0>();
}

extern "C" __global__ void misaligned_copy(const float* x) {
    __shared__ float4 there[32];
    copy_async<16>(there + threadIdx.x, x + threadIdx.x);                    // copy of 16 at 4
}

extern "C" __global__ void copy_to_global(const float* x, OUT float* y) {
    const float4* x4 = (const float4*)x; float4* y4 = (float4*)y;
    copy_async<16>(y4 + threadIdx.x, x4 + threadIdx.x);                        // copy to global
}

extern "C" __global__ void barrier_in_branch() {
    if (threadIdx.x < 40) __syncthreads();                                   // some
    else __syncthreads();                                                    // the others
}

extern "C" __global__ void barrier_after_return() {
    if (threadIdx.x == 33) return;
    __syncthreads();                                                         // without 33
}

extern "C" __global__ void barrier_against_warp() {
    if (threadIdx.x == 3) __syncthreads();                                   // block
    else __syncwarp();                                                       // warp
    __syncthreads();
}

extern "C" __global__ void dead_lane(OUT int* out) {
    if (threadIdx.x == 7) return;
    out[threadIdx.x] = __shfl_xor_sync(0xFFFFFFFFu, 1, 1);                   // with 7
}

extern "C" __global__ void not_in_mask(OUT int* out) {
    if (threadIdx.x < 8) out[threadIdx.x] = __shfl_sync(0xF0u, 1, 4);        // mask of others
}

extern "C" __global__ void source_not_in_mask(OUT int* out) {
    if (threadIdx.x < 8) out[threadIdx.x] = __shfl_sync(0xFFu, 1, 9);        // lane 9
}

extern "C" __global__ void masks_differ(OUT int* out) {
    out[threadIdx.x] = __shfl_sync(threadIdx.x < 4 ? 0xFFu : 0xFFFFu, 1, 0); // masks
}

extern "C" __global__ void different_collectives(OUT int* out) {
    if (threadIdx.x < 4) out[threadIdx.x] = __shfl_xor_sync(0xFFFFFFFFu, 1, 1);
    else out[threadIdx.x] = __any_sync(0xFFFFFFFFu, 1);
}

extern "C" __global__ void spin(int* flag) {
    while (atomicAdd(flag, 0) == 0) {}                                       // spins
}

extern "C" __global__ void spin_plain(const int* flag, int* out) {
    for (unsigned i = 0; *(const volatile int*)flag == 0; ++i) {}
    *out = 1;
}

extern "C" __global__ void past_the_end(const float* x, OUT float* y, int n) {
    if (threadIdx.x < n) y[threadIdx.x] = x[threadIdx.x + 1];                // x + 1
}

extern "C" __global__ void write_before(OUT float* y) {
    y[(int)threadIdx.x - 1] = 1.f;                                           // y - 1
}

extern "C" __global__ void wide_tail(const float* x, OUT float* y) {
    const float4* x4 = (const float4*)x; float4* y4 = (float4*)y;
    y4[threadIdx.x] = x4[threadIdx.x];                                         // x of 16
}

extern "C" __global__ void past_dynamic() {
    DYNAMIC_SMEM(smem);
    smem[threadIdx.x * 4] = 1;                                               // dynamic
}

extern "C" __global__ void past_static() {
    __shared__ float there[24];
    ((volatile float*)there)[threadIdx.x] = 1.f;                             // static
}

extern "C" __global__ void others_local(OUT int* out) {
    __shared__ int* there;
    int mine[4] = {1, 2, 3, (int)threadIdx.x};
    if (threadIdx.x == 0) there = mine;
    __syncthreads();
    out[threadIdx.x] = there[threadIdx.x % 4];                               // local of 0
    __syncthreads();
}

extern "C" __global__ void matrix_past_end() {
    DYNAMIC_SMEM(smem);
    for (int i = 0; i < 16; ++i) smem[threadIdx.x * 16 + i] = 1;
    __syncwarp();
    u32 r[4];
    load_matrix_x4(r, smem + threadIdx.x * 16 + 16);                         // matrix
}

extern "C" __global__ void unwritten_out(OUT float* y) {
    if (threadIdx.x) y[threadIdx.x] = 1.f;
    else y[0] += 1.f;                                                        // y[0]
}

extern "C" __global__ void unwritten_shared(OUT float* y) {
    __shared__ float there[64];
    if (threadIdx.x != 17) there[threadIdx.x] = 1.f;
    __syncthreads();
    y[threadIdx.x] = there[(threadIdx.x + 1) % 64];                          // there[17]
}

extern "C" __global__ void misaligned(const float* x, OUT float* y) {
    float4* y4 = (float4*)y;
    y4[threadIdx.x] = *(const float4*)(x + 4 * threadIdx.x + 1);              // x + 1 of 16
}

extern "C" __global__ void misaligned_pair(const float* x, OUT float* y) {
    float2* y2 = (float2*)y;
    y2[threadIdx.x] = *(const float2*)(x + 2 * threadIdx.x + 1);              // x + 1 of 8
}
