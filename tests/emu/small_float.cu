// Every number through the conversions of include/small_float.cuh.
#include "small_float.cuh"

// type: 0 bf16, 1 f16, 2 e4m3, 3 e5m2; codes hold their bits
extern "C" __global__ void decode(const int* codes, OUT float* values, int n, int type) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const int code = codes[i];
    values[i] = type == 0 ? to_float(bf16{(u16)code}) : type == 1 ? to_float(f16{(u16)code})
              : type == 2 ? to_float(e4m3{(u8)code}) : to_float(e5m2{(u8)code});
}

extern "C" __global__ void encode(const float* values, OUT int* codes, int n, int type) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const float x = values[i];
    codes[i] = type == 0 ? to_bf16(x).bits : type == 1 ? to_f16(x).bits : type == 2 ? to_e4m3(x).bits : to_e5m2(x).bits;
}
