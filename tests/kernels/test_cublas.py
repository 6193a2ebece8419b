"""The cuBLAS launchers, with a gemmEx of NumPy that reads its arguments as cuBLAS does: column by column."""

import ctypes
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from engine.errors import ShapeError
from engine.kernel_cost import gated_activation_cost
from engine.kernels import cublas
from engine.kernels.gemm import GATED_ACTIVATION, NARROW
from engine.workspace import Scratch
from tests.kernels.closeness import BF16, assert_ulps, bf16, f64
from tests.kernels.declared import assert_least_traffic, least_bytes
from tests.kernels.test_gemm import twin

DTYPES = {cublas.R_32F: np.dtype(np.float32), cublas.R_16BF: BF16}


def columns(address, rows, n_columns, leading, dtype):
    """[rows, n_columns], writable, of memory where column j begins `leading` elements after column j - 1."""
    n_bytes = (leading * (n_columns - 1) + rows) * dtype.itemsize
    flat = np.frombuffer((ctypes.c_char * n_bytes).from_address(address), dtype)
    return np.lib.stride_tricks.as_strided(flat, (rows, n_columns), (dtype.itemsize, leading * dtype.itemsize),
                                           writeable=True)


def gemm_ex(op_a, op_b, m, n, k, alpha, a, a_type, lda, b, b_type, ldb, beta, c, c_type, ldc, compute, algorithm):
    """cuBLAS's manual: C = alpha op(A) op(B) + beta C, C [m, n] by columns; C is not read if beta is 0."""
    assert (compute, algorithm) == (68, -1)                 # CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT
    alpha, beta = (ctypes.c_float.from_address(p).value for p in (alpha, beta))
    left = columns(a, *((m, k) if op_a == 0 else (k, m)), lda, DTYPES[a_type]).astype(np.float64)
    right = columns(b, *((k, n) if op_b == 0 else (n, k)), ldb, DTYPES[b_type]).astype(np.float64)
    out = columns(c, m, n, ldc, DTYPES[c_type])
    product = alpha * (left if op_a == 0 else left.T) @ (right if op_b == 0 else right.T)
    out[...] = product if beta == 0 else product + beta * out.astype(np.float64)


@pytest.fixture
def library(monkeypatch):
    monkeypatch.setattr(cublas, "gemm_ex", gemm_ex)
    monkeypatch.setattr(cublas, "copy", np.copyto)


def test_calls_go_to_the_current_handle_and_stream(monkeypatch):
    calls = []
    cuda = SimpleNamespace(
        cublas=SimpleNamespace(gemmEx=lambda *args: calls.append(args)),
        device=SimpleNamespace(get_cublas_handle=lambda: 5),
        runtime=SimpleNamespace(memcpyAsync=lambda *args: calls.append(args)),
        stream=SimpleNamespace(get_current_stream=lambda: SimpleNamespace(ptr=9)))
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=cuda))
    monkeypatch.setitem(sys.modules, "cupy.cuda", cuda)
    to, array = np.zeros((2, 3), BF16), np.zeros((2, 3), BF16)
    cublas.gemm_ex(1, 2, 3)
    cublas.copy(to, array)
    assert calls == [(5, 1, 2, 3), (to.ctypes.data, array.ctypes.data, 12, 3, 9)]


def arrays(n_tokens, n_out, n_in, n_rows):
    rng = np.random.default_rng([n_tokens, n_out])
    return [bf16(rng.standard_normal(shape)) for shape in ((n_tokens, n_in), (n_rows, n_in), (n_tokens, n_out))]


@pytest.mark.parametrize("dtype", [BF16, np.dtype(np.float32)])
@pytest.mark.parametrize("n_tokens", [0, 1, 7])
def test_linear_multiplies_rows(library, n_tokens, dtype):
    x, weight, _ = arrays(n_tokens, 24, 12, 24)
    out = np.full((n_tokens, 24), np.nan, dtype)
    cublas.linear(x, weight, out, None)
    assert_ulps(bf16(out), twin("plain", x, weight, None, np.float64))


@pytest.mark.parametrize("is_out", [False, True])
def test_residual_is_added(library, is_out):
    x, weight, residual = arrays(5, 24, 12, 24)
    want = twin("residual", x, weight, residual, np.float64)
    out = residual if is_out else np.full((5, 24), np.nan, BF16)
    cublas.linear(x, weight, out, None, residual=residual)
    assert_ulps(out, want, most=0.5)


@pytest.mark.parametrize("n_at_once", [1, 2, 7, 100])
@pytest.mark.parametrize("activation", ["gelu_tanh", "silu"])
def test_gated_linear_goes_through_scratch_some_tokens_at_a_time(library, activation, n_at_once):
    x, weight, _ = arrays(7, 20, 12, 40)
    out = np.full((7, 20), np.nan, BF16)
    scratch = Scratch(np.full(40 * n_at_once + 3, np.nan, np.float32), None)
    cublas.gated_linear(x, weight, out, scratch, activation=activation)
    gate, up = f64(x) @ f64(weight[:20]).T, f64(x) @ f64(weight[20:]).T
    assert_ulps(out, twin(activation, x, weight, None, np.float64), terms=(gate / 2 * up,))


@pytest.mark.parametrize("n_out", [16, 1152])
def test_gated_activation_rounds_once_and_moves_each_byte_once(lane, n_out):
    gate_up = np.random.default_rng(n_out).standard_normal((3, 2 * n_out)).astype(np.float32) * 3
    out = lane.empty((3, n_out), BF16)
    NARROW[0].build(GATED_ACTIVATION).launch((3,), (256,), (lane.put(gate_up), out, n_out, 1))
    identity = np.eye(2 * n_out)
    want = twin("gelu_tanh", gate_up, identity, None, np.float64)
    assert_ulps(lane.to_host(out), want, terms=(f64(gate_up[:, :n_out]) / 2 * gate_up[:, n_out:],))
    assert_least_traffic(lane.traffic(), least_bytes("gemm.cu", "gated_activation", n_tokens=3, n_out=n_out),
                         gated_activation_cost(3, n_out))


def test_scratch_holds_a_token_or_a_bounded_number():
    assert cublas.scratch_size(40, 12, 7) == (280, 0)
    assert cublas.scratch_size(43008, 5376, 2048) == (43008 * (2**23 // 43008), 0)
    assert cublas.scratch_size(2**24, 8, 2048) == (2**24, 0)


def test_what_does_not_fit_is_refused():
    x, weight, out = arrays(3, 24, 16, 24)
    with pytest.raises(ShapeError, match="weight is"):
        cublas.linear(x, weight[:, :12], out, None)
    with pytest.raises(ShapeError, match=r"x .* strides"):
        cublas.linear(np.zeros((3, 32), BF16)[:, ::2], weight, out, None)
    with pytest.raises(ShapeError, match="7 floats, a token's gate and up need 24"):
        cublas.gated_linear(x, weight, out[:, :12].copy(), Scratch(np.zeros(7, np.float32), None))
