// More static shared memory than a block may have: nvcc would refuse it.
#include "device.cuh"

extern "C" __global__ void large_static(OUT float* y) {
    __shared__ float there[13000];
    for (int i = threadIdx.x; i < 13000; i += 32) there[i] = i;
    __syncthreads();
    *y = there[5];
}
