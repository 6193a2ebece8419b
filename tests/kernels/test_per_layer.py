"""mix_per_layer and gate_per_layer, what a token brings to every layer, against their twins in float64."""

import numpy as np
import pytest

from engine import cost, reference
from engine.errors import ShapeError
from engine.kernels.activation import gate_per_layer
from engine.kernels.rmsnorm import mix_per_layer, rms_norm
from tests.kernels.closeness import BF16, assert_ulps, bf16, f64
from tests.kernels.declared import assert_least_traffic, least_bytes

EPS = 1e-6
ROOT = np.float32(0.5**0.5)


def normals(rng, *shape):
    return bf16(rng.standard_normal(shape))


def same_bits(got, want):
    np.testing.assert_array_equal(got.view(np.uint16), want.view(np.uint16))


# --- mix_per_layer

def run_mix(lane, context, tokens, weight, factor, into=None):
    arrays = [lane.put(x) for x in (context, tokens)]
    out = lane.empty(context.shape, BF16) if into is None else arrays[into]
    mix_per_layer(*arrays, lane.put(weight), factor, EPS, out)
    return lane.to_host(out)


def mix_case(n_tokens, n_layers, width):
    rng = np.random.default_rng([n_tokens, n_layers, width])
    return bf16(40 * rng.standard_normal((n_tokens, n_layers * width))), normals(rng, n_tokens, n_layers * width), \
        normals(rng, width), np.float32(1536**-0.5)


@pytest.mark.parametrize("n_tokens, n_layers, width", [(1, 1, 8), (3, 5, 20), (4, 3, 24), (2, 7, 40), (5, 35, 256),
                                                       (2, 2, 640)])
def test_mix_rounds_four_times(lane, n_tokens, n_layers, width):
    """Bit for bit what four steps in bfloat16 make. The twin rounds nowhere: a step is off by u = 2^-8 of what it
    makes, the norm by as much again for what it divides by. With a the larger term that is (3 u a + u 2 a) / sqrt(2),
    3.54 ulp of a, before the last rounding, half an ulp of up to sqrt(2) a."""
    context, tokens, weight, factor = mix_case(n_tokens, n_layers, width)
    got = run_mix(lane, context, tokens, weight, factor)
    scaled = bf16(context.astype(np.float32) * factor).reshape(-1, width)
    normed = lane.empty(scaled.shape, BF16)
    rms_norm(lane.put(scaled), lane.put(weight), EPS, 0.0, normed)
    normed = lane.to_host(normed).reshape(context.shape)
    mixed = bf16(normed.astype(np.float32) + tokens.astype(np.float32))
    same_bits(got, bf16(mixed.astype(np.float32) * ROOT))
    want = np.empty(context.shape)
    reference.mix_per_layer(f64(context), f64(tokens), f64(weight), float(factor), EPS, want)
    assert_ulps(got, want, 4.54, terms=(f64(normed), f64(tokens)))


def test_a_mixed_row_has_the_same_bits_in_any_batch_and_place(lane):
    context, tokens, weight, factor = mix_case(6, 5, 256)
    together = run_mix(lane, context, tokens, weight, factor)
    for i in range(6):
        same_bits(run_mix(lane, context[i:i + 1], tokens[i:i + 1], weight, factor)[0], together[i])
    for into in (0, 1):
        same_bits(run_mix(lane, context, tokens, weight, factor, into), together)


@pytest.mark.parametrize("context, tokens, weight, message", [
    ((2, 48), (2, 32), 16, r"tokens is \[2, 32\] bfloat16, expected \[n_tokens=2, widths=48\]"),
    ((2, 40), (2, 40), 16, "rows of context are 40 wide, expected a multiple of 16, the length of weight"),
    ((2, 12), (2, 12), 6, "hidden is 6, expected a multiple of 4 up to 16384"),
    ((2, 12), (2, 12), 0, "hidden is 0, expected a multiple of 4"),
])
def test_mix_refuses_what_does_not_fit(lane, context, tokens, weight, message):
    assert run_mix(lane, *(np.zeros(s, BF16) for s in ((0, 32), (0, 32), 16)), 1.0).shape == (0, 32)
    with pytest.raises(ShapeError, match=f"^mix_per_layer: {message}"):
        run_mix(lane, np.zeros(context, BF16), np.zeros(tokens, BF16), np.zeros(weight, BF16), 1.0)


def test_mix_moves_the_least(lane):
    context, tokens, weight, factor = mix_case(4, 35, 256)
    out = run_mix(lane, context, tokens, weight, factor)
    assert_least_traffic(lane.traffic(), least_bytes("rmsnorm.cu", "mix_per_layer", n_rows=4 * 35, width=256),
                         cost.mix_per_layer(context, tokens, weight, factor, EPS, out))


# --- gate_per_layer

def run_gate(lane, gate, inputs, layer, in_place=False):
    there = lane.put(gate)
    out = there if in_place else lane.empty(gate.shape, BF16)
    gate_per_layer(there, lane.put(inputs), layer, out)
    return lane.to_host(out)


@pytest.mark.parametrize("n_tokens", [1, 7, 40])
@pytest.mark.parametrize("n_layers, width", [(1, 4), (3, 20), (5, 24), (35, 256)])
def test_the_gate_rounds_once_and_takes_its_layer(lane, n_tokens, n_layers, width):
    rng = np.random.default_rng([n_tokens, width])
    gate, inputs = bf16(2 * rng.standard_normal((n_tokens, width))), normals(rng, n_tokens, n_layers * width)
    for layer in {0, n_layers // 2, n_layers - 1}:
        z, part, twin = f64(gate), f64(inputs)[:, layer * width:(layer + 1) * width], np.empty(gate.shape)
        want = z / (1 + np.exp(-2 * (2 / np.pi) ** 0.5 * (z + 0.044715 * z**3))) * part     # where 1 + tanh cancels too
        assert_ulps(run_gate(lane, gate, inputs, layer), want)
        reference.gate_per_layer(z, f64(inputs), layer, twin)
        assert (np.abs(twin - want) <= 1e-15 * np.abs(z * part)).all()


def test_the_gate_in_place(lane):
    rng = np.random.default_rng(1)
    gate, inputs = normals(rng, 9, 24), normals(rng, 9, 72)
    same_bits(run_gate(lane, gate, inputs, 1, in_place=True), run_gate(lane, gate, inputs, 1))


@pytest.mark.parametrize("gate, inputs, layer, message", [
    ((2, 16), (3, 48), 0, r"inputs is \[3, 48\] bfloat16, expected \[n_tokens=2, widths\]"),
    ((2, 16), (2, 40), 0, "layer 0 of inputs 40 wide, expected 16 for each layer"),
    ((2, 16), (2, 48), 3, "layer 3 of inputs 48 wide"), ((2, 16), (2, 48), -1, "layer -1 of inputs 48 wide"),
    ((2, 6), (2, 12), 0, "width is 6, expected a multiple of 4"),
])
def test_the_gate_refuses_what_does_not_fit(lane, gate, inputs, layer, message):
    assert run_gate(lane, np.zeros((0, 16), BF16), np.zeros((0, 32), BF16), 1).shape == (0, 16)
    with pytest.raises(ShapeError, match=f"^gate_per_layer: {message}"):
        run_gate(lane, np.zeros(gate, BF16), np.zeros(inputs, BF16), layer)


@pytest.mark.parametrize("width", [256, 112])
def test_the_gate_moves_the_least(lane, width):
    rng = np.random.default_rng(2)
    gate, inputs = normals(rng, 64, width), normals(rng, 64, 4 * width)
    out = run_gate(lane, gate, inputs, 2)
    assert_least_traffic(lane.traffic(), least_bytes("activation.cu", "gate_per_layer", n_rows=64, width=width),
                         cost.gate_per_layer(gate, inputs, 2, out))
