"""gemm="cublas": the launchers of engine/kernels/gemm.py, by cuBLAS. An alternative to compare with, on `cuda` only.

cuBLAS orders its sums as it likes for each number of tokens, so a row's bits depend on its batch; and CuPy refuses it
while a stream is captured, so steps that use it are not CUDA graphs.
"""

import numpy as np

from engine.errors import ShapeError
from engine.kernels.gemm import ACTIVATIONS, GATED_ACTIVATION, NARROW, check_gated, check_linear
from engine.kernels.source import address

R_32F, R_16BF = 0, 14               # cudaDataType
OP_N, OP_T, COMPUTE_32F, GEMM_DEFAULT = 0, 1, 68, -1        # cublas_api.h
DEVICE_TO_DEVICE = 3                # cudaMemcpyKind
ZERO, ONE = np.zeros(1, np.float32), np.ones(1, np.float32)         # cuBLAS reads them from host memory
GATED_FLOATS = 2**23                # of gate and up products at a time: 32 MiB
GATED_THREADS = 256


def gemm_ex(*args):
    """cublasGemmEx on the current device's handle and the current stream."""
    from cupy.cuda import cublas, device
    cublas.gemmEx(device.get_cublas_handle(), *args)


def copy(to, array):
    """to = array on the current stream; both contiguous, of one dtype and shape."""
    from cupy.cuda import runtime, stream
    runtime.memcpyAsync(address(to), address(array), array.nbytes, DEVICE_TO_DEVICE, stream.get_current_stream().ptr)


def scratch_size(n_rows, n_in, max_tokens):
    """(n_floats, n_counters) of Scratch for a gated weight [n_rows, n_in]: as many tokens at a time as GATED_FLOATS
    holds, at least one. linear() uses none."""
    return n_rows * max(1, min(max_tokens, GATED_FLOATS // n_rows)), 0


def linear(x, weight, out, scratch, residual=None):
    """out = x @ weight.T (+ residual), as engine/kernels/gemm.py has it."""
    dims = check_linear(x, weight, out, residual)
    _check_contiguous("linear", x=x, weight=weight, out=out, residual=residual)
    if not dims.n_tokens or not dims.n_out:
        return
    if residual is not None and address(residual) != address(out):
        copy(out, residual)
    _product(x, weight, out, ZERO if residual is None else ONE)


def gated_linear(x, weight, out, scratch, activation="gelu_tanh"):
    """out = act(x @ gate.T) * (x @ up.T), as engine/kernels/gemm.py has it; scratch as scratch_size() says."""
    dims = check_gated(x, weight, out, activation)
    _check_contiguous("gated_linear", x=x, weight=weight, out=out)
    if not dims.n_tokens or not dims.n_out:
        return
    n_rows = 2 * dims.n_out
    at_once = scratch.floats.size // n_rows
    if not at_once:
        raise ShapeError(f"gated_linear: scratch has {scratch.floats.size} floats, a token's gate and up need {n_rows}")
    activate = NARROW[0].build(GATED_ACTIVATION)
    for at in range(0, dims.n_tokens, at_once):
        part, to = x[at:at + at_once], out[at:at + at_once]
        gate_up = scratch.floats[:len(part) * n_rows].reshape(len(part), n_rows)
        _product(part, weight, gate_up, ZERO)
        activate.launch(grid=(len(part),), block=(GATED_THREADS,),
                        args=(gate_up, to, dims.n_out, ACTIVATIONS[activation]))


def variants(spec, max_tokens):
    """(Build, n_threads, smem_bytes) of the one kernel of ours that runs beside cuBLAS."""
    yield NARROW[0].build(GATED_ACTIVATION), GATED_THREADS, 0


def _product(x, weight, out, beta):
    """out = x @ weight.T + beta * out. cuBLAS counts in columns: our rows of out [n, m] are its columns of [m, n], and
    weight [m, k] is its [k, m], transposed."""
    (n, k), m = x.shape, len(weight)
    gemm_ex(OP_T, OP_N, m, n, k, ONE.ctypes.data, address(weight), R_16BF, k, address(x), R_16BF, k, beta.ctypes.data,
            address(out), R_32F if out.dtype == np.float32 else R_16BF, m, COMPUTE_32F, GEMM_DEFAULT)


def _check_contiguous(op, **arrays):
    for name, array in arrays.items():
        if array is not None and not array.flags.c_contiguous:
            raise ShapeError(f"{op}: {name} {list(array.shape)} has strides {array.strides}, expected a C-contiguous "
                             "array")
