// Kernels without a fault, one for each thing the emulator must do.
#include "mma.cuh"

extern "C" __global__ void who(OUT int* out) {           // out [n_blocks, n_threads, 6]
    const int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    const int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    int* mine = out + 6 * (block * blockDim.x * blockDim.y * blockDim.z + thread);
    mine[0] = blockIdx.x, mine[1] = blockIdx.y, mine[2] = blockIdx.z;
    mine[3] = threadIdx.x, mine[4] = threadIdx.y, mine[5] = threadIdx.z;
}

extern "C" __global__ void reverse(const float* x, OUT float* y, int n_rounds) {     // through shared memory, both kinds
    DYNAMIC_SMEM(smem);
    float* dynamic = (float*)smem;
    __shared__ float fixed[256];
    const int i = threadIdx.x, n = blockDim.x;
    float v = x[blockIdx.x * n + i];
    for (int round = 0; round < n_rounds; ++round) {
        dynamic[i] = v;
        __syncthreads();
        fixed[i] = dynamic[n - 1 - i] + 1.f;
        __syncthreads();
        v = fixed[i];
    }
    y[blockIdx.x * n + i] = v;
}

extern "C" __global__ void shuffles(OUT int* out, int operand, int width) {          // out [4, 32]
    const int x = 100 + threadIdx.x;
    out[threadIdx.x] = __shfl_sync(0xFFFFFFFFu, x, operand, width);
    out[32 + threadIdx.x] = __shfl_up_sync(0xFFFFFFFFu, x, operand, width);
    out[64 + threadIdx.x] = __shfl_down_sync(0xFFFFFFFFu, x, operand, width);
    out[96 + threadIdx.x] = __shfl_xor_sync(0xFFFFFFFFu, x, operand, width);
}

extern "C" __global__ void wide_shuffle(OUT u64* out) {
    out[threadIdx.x] = __shfl_xor_sync(0xFFFFFFFFu, (u64)threadIdx.x << 40 | 7, 1);
}

extern "C" __global__ void halves(OUT int* out) {        // two halves of a warp in collectives of their own
    __shared__ int there[32];
    const int lane = threadIdx.x;
    int sum = lane;
    if (lane < 16) {
        for (int m = 8; m; m /= 2) sum += __shfl_xor_sync(0x0000FFFFu, sum, m);
    } else {
        for (int m = 1; m < 16; m *= 2) sum += __shfl_xor_sync(0xFFFF0000u, sum, m);
        there[lane] = sum;
        __syncwarp(0xFFFF0000u);
        sum += there[48 - 1 - lane];
    }
    out[lane] = sum;
}

extern "C" __global__ void votes(const int* x, OUT u32* out) {                       // out [3, 32]
    const bool p = x[threadIdx.x] != 0;
    out[threadIdx.x] = __ballot_sync(0xFFFFFFFFu, p);
    out[32 + threadIdx.x] = __any_sync(0xFFFFFFFFu, p);
    out[64 + threadIdx.x] = __all_sync(0xFFFFFFFFu, p);
}

extern "C" __global__ void atomics(int* i, u32* u, u64* w, float* f, int* locks, int* shared_sum) {
    __shared__ int sum;
    if (threadIdx.x == 0) sum = 0;
    __syncthreads();
    const int me = blockIdx.x * blockDim.x + threadIdx.x;
    atomicAdd(&sum, 1);
    atomicAdd(i, -1), atomicMax(i + 1, me), atomicMin(i + 2, -me);
    atomicAdd(u, 1), atomicMax(u + 1, 3000000000u + me), atomicMin(u + 2, 3000000000u - me);
    atomicAdd(w, 1ull << 32), atomicMax(w + 1, (u64)me << 33), atomicMin(w + 2, ~0ull - me);
    atomicAdd(f, 0.5f), atomicMax(f + 1, (float)me);
    if (atomicCAS(locks, 0, 1) == 0) atomicExch(locks + 1, 7);
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) shared_sum[blockIdx.x] = __ldg(&sum);
}

extern "C" __global__ void product(const bf16* a, const bf16* b, float* d) {         // a [16, 16], b [16, 8], d [16, 8]
    const int group = threadIdx.x / 4, t = threadIdx.x % 4;
    u32 fa[4], fb[2];
    float fd[4];
    for (int i = 0; i < 4; ++i) fa[i] = *(const u32*)(a + (group + 8 * (i & 1)) * 16 + 2 * t + 8 * (i >> 1));
    for (int i = 0; i < 2; ++i) fb[i] = b[(2 * t + 8 * i) * 8 + group].bits | (u32)b[(2 * t + 8 * i + 1) * 8 + group].bits << 16;
    for (int i = 0; i < 4; ++i) fd[i] = d[(group + 8 * (i / 2)) * 8 + 2 * t + i % 2];
    mma_bf16(fd, fa, fb[0], fb[1]);
    for (int i = 0; i < 4; ++i) d[(group + 8 * (i / 2)) * 8 + 2 * t + i % 2] = fd[i];
}

extern "C" __global__ void matrices(const bf16* x, OUT u32* out, bool is_trans, bool is_pair) {     // x [32, 8], out [32, 4]
    __shared__ __align__(16) bf16 rows[32 * 8];
    for (int i = 0; i < 8; ++i) rows[8 * threadIdx.x + i] = x[8 * threadIdx.x + i];
    __syncwarp();
    u32 r[4], two[2];
    if (is_pair) {
        if (is_trans) load_matrix_x2_trans(two, rows + 8 * (threadIdx.x % 16));
        else load_matrix_x2(two, rows + 8 * (threadIdx.x % 16));
        r[0] = two[0], r[1] = two[1], r[2] = r[3] = 0;
    } else if (is_trans) {
        load_matrix_x4_trans(r, rows + 8 * threadIdx.x);
    } else {
        load_matrix_x4(r, rows + 8 * threadIdx.x);
    }
    for (int i = 0; i < 4; ++i) out[4 * threadIdx.x + i] = r[i];
}

extern "C" __global__ void pipeline(const float* x, OUT float* y, int n_tiles, int n_valid) {     // three tiles in flight
    const float4* x4 = (const float4*)x; float4* y4 = (float4*)y;
    DYNAMIC_SMEM(smem);
    float4* tiles = (float4*)smem;
    const int n = blockDim.x, i = threadIdx.x;
    for (int tile = 0; tile < 2; ++tile) {
        if (tile < n_tiles) copy_async<16>(tiles + tile * n + i, x4 + tile * n + i, tile * n + i < n_valid);
        copy_commit();
    }
    for (int tile = 0; tile < n_tiles; ++tile) {
        copy_wait<1>();
        __syncthreads();
        const int next = tile + 2;
        if (next < n_tiles) copy_async<16>(tiles + next % 3 * n + i, x4 + next * n + i, next * n + i < n_valid);
        copy_commit();
        y4[tile * n + i] = tiles[tile % 3 * n + n - 1 - i];
    }
}

struct Padded { u32 count; u64 mass; };
extern "C" __global__ void structs(const float* x, OUT float* y) {
    const float4* x4 = (const float4*)x; float4* y4 = (float4*)y;
    __shared__ Padded there[32];
    __shared__ float4 whole[32];
    const int i = threadIdx.x;
    there[i] = {(u32)i, (u64)i * i};
    whole[i] = x4[i];
    __syncwarp();
    const Padded other = there[31 - i];
    float4 v = whole[31 - i];
    v.x += other.count;
    v.w += other.mass;
    y4[i] = v;
}

extern "C" __global__ void walk(const float* x, OUT float* y, int n, int stride) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = x[i * stride];
}

extern "C" __global__ void walk4(const float* x, OUT float* y, int n) {
    const float4* x4 = (const float4*)x; float4* y4 = (float4*)y;
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y4[i] = x4[i];
}

extern "C" __global__ void columns(const float* x, OUT float* y, int pitch) {        // banks: a column of pitch floats
    DYNAMIC_SMEM(smem);
    float* tile = (float*)smem;
    for (int row = 0; row < 32; ++row) tile[row * pitch + threadIdx.x] = x[row * 32 + threadIdx.x];
    __syncwarp();
    for (int row = 0; row < 32; ++row) y[row * 32 + threadIdx.x] = tile[threadIdx.x * pitch + row];     // COLUMN
}

extern "C" __global__ void chunks(OUT float* y, int pitch) {                        // 16-byte accesses, a quarter warp at a time
    float4* y4 = (float4*)y;
    DYNAMIC_SMEM(smem);
    *(float4*)(smem + threadIdx.x * pitch) = make_float4(1, 2, 3, 4);
    y4[threadIdx.x] = *(float4*)(smem + threadIdx.x * pitch);
}

extern "C" __global__ void last_block(const float* x, float* parts, int* arrived, OUT float* sum) {
    __shared__ bool is_last;
    float mine = x[blockIdx.x * 32 + threadIdx.x];
    mine = warp_sum(mine);
    if (threadIdx.x == 0) {
        parts[blockIdx.x] = mine;
        __threadfence();
        is_last = atomicAdd(arrived, 1) == gridDim.x - 1;
    }
    __syncthreads();
    if (!is_last || threadIdx.x) return;
    float total = 0.f;
    for (int i = 0; i < gridDim.x; ++i) total += parts[i];
    *sum = total;
    *arrived = 0;
}
