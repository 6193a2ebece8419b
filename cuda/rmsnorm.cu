// rms_norm:  y[t,:] = x[t,:] / sqrt(mean(x[t,:]^2) + eps) * (w + weight_offset)
#include "device.cuh"

extern "C" __global__ void __launch_bounds__(THREADS) rms_norm(const bf16* x, const bf16* w, OUT bf16* y, int hidden, float eps, float weight_offset) {
    const size_t row = (size_t)blockIdx.x * hidden;
    float sum = 0.f;
    for (int i = threadIdx.x; i < hidden; i += THREADS) {
        const float v = to_float(x[row + i]);
        sum += v * v;
    }
    const float scale = rsqrtf(block_sum<THREADS>(sum) / hidden + eps);
    for (int i = threadIdx.x; i < hidden; i += THREADS)
        y[row + i] = to_bf16(to_float(x[row + i]) * scale * ((w ? to_float(w[i]) : 1.f) + weight_offset));
}
