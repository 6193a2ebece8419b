"""logit_softcap, and the activation functions that epilogues call, against float64."""

import numpy as np
import pytest

from engine import cost, reference
from engine.errors import ShapeError
from engine.kernels.activation import THREADS, logit_softcap
from engine.kernels.source import Kernel
from tests.kernels.closeness import f64
from tests.kernels.declared import assert_least_traffic, least_bytes


def capped(lane, logits, cap=30.0):
    there = lane.put(logits)
    logit_softcap(there, cap)
    return lane.to_host(there)


def assert_close(got, logits, cap):
    """3 ulp of float32: a quotient and a product, half an ulp each, and tanhf, 2."""
    want = f64(logits)
    reference.logit_softcap(want, cap)
    assert got.dtype == np.float32 and got.shape == want.shape
    assert (np.abs(got - want) <= 3 * np.spacing(np.abs(want).astype(np.float32))).all()


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (2, 5), (3, 50), (1, 4 * THREADS), (1, 4 * THREADS + 1), (7, 1023)])
@pytest.mark.parametrize("cap", [30.0, 50.0])
def test_softcap(lane, shape, cap):
    """Every tail of a block's accesses."""
    logits = (cap * np.random.default_rng(shape).standard_normal(shape)).astype(np.float32)
    assert_close(capped(lane, logits, cap), logits, cap)


def test_softcap_of_all_sizes(lane):
    """From 1e-30 to 1e30, both signs: small logits pass, large ones end at the cap."""
    logits = np.concatenate([sign * 10.0 ** np.linspace(-30, 30, 2000) for sign in (1, -1)]).astype(np.float32)[None]
    got = capped(lane, logits)
    assert_close(got, logits, 30.0)
    assert got.max() == 30 and got.min() == -30


def test_softcap_of_what_is_no_number(lane):
    got = capped(lane, np.array([[np.inf, -np.inf, np.nan, 0.0]], np.float32))
    np.testing.assert_array_equal(got, [[30, -30, np.nan, 0]])


def test_no_logits(lane):
    assert capped(lane, np.zeros((0, 16), np.float32)).shape == (0, 16)


@pytest.mark.parametrize("logits", [np.zeros((2, 16)), np.zeros(16, np.float32)])
def test_what_does_not_fit_is_refused(lane, logits):
    with pytest.raises(ShapeError, match="logit_softcap: logits is"):
        capped(lane, logits)


def test_strides_are_refused(lane):
    with pytest.raises(ShapeError, match="C-contiguous"):
        logit_softcap(lane.zeros((4, 32), np.float32)[:, ::2], 30.0)


def test_softcap_moves_the_least(lane):
    logits = np.ones((3, 40000), np.float32)
    capped(lane, logits)
    assert_least_traffic(lane.traffic(), least_bytes("activation.cu", "logit_softcap", n=120000),
                         cost.logit_softcap(logits, 30.0))


# --- activation.cuh

PROBE = """
#include "activation.cuh"
extern "C" __global__ void activations(const float* z, OUT float* gelu, OUT float* silu_out, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    gelu[i] = gelu_tanh(z[i]);
    silu_out[i] = silu(z[i]);
}
"""


def test_gelu_and_silu_are_exact_enough_for_bfloat16(lane, tmp_path):
    """Within 2e-5 of the true value, which is 0.005 ulp of bfloat16, down to where float32 ends."""
    file = tmp_path / "probe.cu"
    file.write_text(PROBE)
    z = np.concatenate([[0.0, -1e4, 1e4, -3e38, 3e38], np.linspace(-100, 100, 20001), np.logspace(-30, 0, 100)])
    z = z.astype(np.float32)
    outs = [lane.empty(z.shape, np.float32) for _ in range(2)]
    Kernel(str(file), "activations")().launch((-(-len(z) // 128),), (128,), (lane.put(z), *outs, len(z)))
    z = f64(z)
    with np.errstate(over="ignore"):
        exponents = 2 * np.sqrt(2 / np.pi) * (z + 0.044715 * z**3), z
        for got, x in zip(outs, exponents, strict=True):
            want = z * np.exp(np.minimum(x, 0)) / (1 + np.exp(-np.abs(x)))
            assert (np.abs(lane.to_host(got) - want) <= np.maximum(2e-5 * np.abs(want), 1e-36)).all()
