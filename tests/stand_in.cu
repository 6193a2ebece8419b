// Two kernels for tests of the cuda lane: what a step does, in small.
//
//   scale:       y[i] = a * x[i]                 x, y [n] float
//   accumulate:  y[i] += x[i] * factor[0]        x, y [n] float, factor [1] float: what varies lies in device memory
//   grid (ceil(n / 32)), block (32)

extern "C" __global__ void scale(const float* x, float* y, int n, float a) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = a * x[i];
}

extern "C" __global__ void accumulate(const float* x, const float* factor, float* y, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] += x[i] * factor[0];
}
