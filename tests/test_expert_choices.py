"""Experts on the kernels' lane: a router in bfloat16 may choose otherwise than one in float32, which moves the logits
by jumps. So choices are compared first, and then the logits that the reference's choices give."""

from contextlib import contextmanager

import numpy as np
import pytest
from ml_dtypes import bfloat16

from engine.trace import traced
from tests.golden import Golden

# Median of transformers' own bfloat16 error (tests/goldens/README.md), relative to the largest |logit| of the prompt:
# the median of the prompts' medians. Of all positions pooled its own would be 0.027, 0.041 and 0.017.
BF16_MEDIAN = {"gemma4-moe": 0.018, "llama4-text": 0.039, "llama4-causal": 0.012}
DENSE_MAX = 0.097           # its worst position, of Gemma 4 without experts
OTHERWISE = 0.1             # share of choices that may differ; transformers' in bfloat16 do at 0.08 of gemma4-moe
ULPS = 16                   # of bfloat16: the states that a late router reads are off by 8 themselves (3 %)


@pytest.fixture(scope="module", params=BF16_MEDIAN)
def golden(request):
    return Golden(request.param)


@pytest.fixture(scope="module")
def opened(golden, open_llm):
    return open_llm(golden.checkpoint)


def errors(got, expected):
    """Per position: largest difference over the vocabulary, relative to the largest |logit| of the prompt."""
    return np.abs(got - expected).max(axis=1) / np.abs(expected).max()


def test_golden_logits_are_as_close_as_bfloat16_allows(golden, opened):
    results = opened.forward(golden.prompts, return_logits="all").logits
    pooled = np.concatenate([errors(got, golden[f"p{i}.logits"]) for i, got in enumerate(results)])
    assert np.median(pooled) <= 1.5 * BF16_MEDIAN[golden.checkpoint.parent.name]


@contextmanager
def routed_by(llm, choices):
    """Within it, the tokens of a step go to the experts `choices` [n layers with experts, n_tokens, k], with the
    weights that the router's own logits give to them. Yields a list: (logits, experts that the router chose, weights of
    the others) of each of those layers."""
    layers, seen = llm._core.step.layers, []
    before, to_host = layers.ops, llm.lane.to_host

    @contextmanager
    def around(name, args, kwargs):
        yield
        if name != "moe_route":
            return
        logits, scale, routing, routes = (np.array(to_host(args[0]), np.float32), *args[1:4])
        chosen = choices[len(seen)]
        weights = np.take_along_axis(logits, chosen, axis=1)
        if routing == "softmax":
            weights = np.exp(weights - weights.max(axis=1, keepdims=True))
            weights *= np.array(to_host(scale), np.float32)[chosen] / weights.sum(axis=1, keepdims=True)
        else:
            weights = (1 / (1 + np.exp(-weights))).astype(bfloat16).astype(np.float32)
        seen.append((logits, np.array(to_host(routes.experts)), weights))
        pairs = chosen.reshape(-1)
        begins = np.searchsorted(np.sort(pairs), np.arange(logits.shape[1] + 1))
        for array, values in ((routes.experts, chosen), (routes.weights, weights), (routes.begins, begins),
                              (routes.order, np.argsort(pairs, kind="stable"))):
            array[...] = llm.lane.to_device(values.astype(array.dtype))
    layers.use(traced(before, around))
    try:
        yield seen
    finally:
        layers.use(before)


def test_choices_then_logits(golden, opened):
    """The router's choices are the reference's but for those that lie close together; with the reference's choices the
    logits are as close as those of a model without experts, at every position."""
    k = golden.meta["probe_prompt"]
    choices, weights = golden[f"p{k}.router_index"].astype(np.int64), golden[f"p{k}.router_weight"]
    with routed_by(opened, choices) as seen:
        logits = opened.forward([golden.prompts[k]], return_logits="all").logits[0]
    assert len(seen) == len(choices)
    n_otherwise = 0
    for (scores, chosen, got), expected, expected_weights in zip(seen, choices, weights, strict=True):
        np.testing.assert_allclose(got, expected_weights, atol=0.05)
        for row, ours, theirs in zip(scores, chosen.tolist(), expected.tolist(), strict=True):
            if differing := set(ours) ^ set(theirs):
                n_otherwise += 1
                close = row[sorted(differing)]
                ulp = 2.0 ** (np.floor(np.log2(np.abs(row).max())) - 7)
                assert close.max() - close.min() <= ULPS * ulp
    assert n_otherwise <= OTHERWISE * choices.shape[0] * choices.shape[1]
    error = errors(logits, golden[f"p{k}.logits"])
    assert np.median(error) <= 1.5 * BF16_MEDIAN[golden.checkpoint.parent.name] and error.max() <= DENSE_MAX
