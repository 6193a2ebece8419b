"""engine/layer_scheduler.py: what a ModelSpec can say and no branch runs is refused by name, before anything runs; rows
are dropped where nothing of theirs is needed any more."""

from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest

from engine import cost
from engine.layer_scheduler import LayerScheduler
from engine.models.presets import preset
from engine.models.spec import DenseSpec, MoeSpec
from engine.trace import traced
from tests import tiny_models as tiny

SMALL = preset("gemma-3-270m")
LAST = len(SMALL.layers) - 1
EXPERTS = MoeSpec(n_experts=4, experts_per_token=2, intermediate=8, dense=DenseSpec(8))


@dataclass(frozen=True)
class OtherSpec:
    """Nothing that the layer scheduler knows."""


def with_layer(i, **fields):
    layers = list(SMALL.layers)
    layers[i] = replace(layers[i], **fields)
    return replace(SMALL, layers=tuple(layers))


@pytest.mark.parametrize("spec, message", [
    (with_layer(2, mlp=OtherSpec()), "layer 2: no branch for AttentionSpec and OtherSpec"),
    (with_layer(2, attention=OtherSpec()), "layer 2: no branch for OtherSpec and DenseSpec"),
    (with_layer(2, mlp=replace(EXPERTS, routing="hash")),
     "layer 2: no branch for experts by 'hash' routing beside a dense MLP"),
    (with_layer(2, mlp=replace(EXPERTS, dense=None)),
     "layer 2: no branch for experts by 'softmax' routing without a dense MLP"),
    (with_layer(2, kv_from=0), "layer 3: no branch for K and V of its own behind layers that read another's"),
    (with_layer(0, kv_from=0), "layer 0: no branch for reading the K and V of layer 0"),
    (with_layer(LAST, kv_from=LAST), f"layer {LAST}: no branch for reading the K and V of layer {LAST}"),
])
def test_what_no_branch_runs_is_refused(spec, message):
    with pytest.raises(TypeError, match=message):
        LayerScheduler(spec, weights=None, kv_cache=None, workspace=None, lane=None)


# --- rows that nobody asked for

def product_flops(llm, rows, **arguments):
    """(logits, operations of all matrix products but the head's) of one forward."""
    layers, flops = llm._core.step.layers, []
    before = layers.ops

    @contextmanager
    def around(name, args, kwargs):
        yield
        if name in ("linear", "gated_linear") and args[1] is not llm.weights.head:
            flops.append(cost.of(name, args, kwargs).flops)
    layers.use(traced(before, around))
    try:
        return llm.forward(rows, **arguments).logits, sum(flops)
    finally:
        layers.use(before)


@pytest.mark.parametrize("max_batch_tokens", [2048, 7])
@pytest.mark.parametrize("n_wanted", [1, 3])
def test_rows_are_dropped_before_the_first_layer_that_owns_no_k_and_v(checkpoints, n_wanted, max_batch_tokens):
    """What that saves, to the last multiplication: all but the wanted rows, in every matrix of those layers that would
    have seen them. Without it only the last layer drops rows."""
    llm = tiny.open_llm(checkpoints["gemma4-e"], max_batch_tokens=max_batch_tokens)
    spec, layers = llm.spec, llm._core.step.layers
    rows = tiny.prompts(1, 40, 9, 17)
    n_dropped = sum(map(len, rows)) - n_wanted * len(rows)
    assert layers.drops_at == spec.first_shared == 2
    logits, flops = product_flops(llm, rows, return_logits=n_wanted)
    layers.drops_at = len(spec.layers) - 1
    if max_batch_tokens == 2048:
        plain_logits, plain_flops = product_flops(llm, rows, return_logits=n_wanted)
        saved = sum(layer.qkv_width + layer.attention.q_width + 3 * layer.dense.intermediate + 2 * spec.per_layer_input
                    for layer in spec.layers[spec.first_shared:-1])
        assert plain_flops - flops == 2 * n_dropped * spec.hidden * saved
        for got, expected in zip(logits, plain_logits, strict=True):
            assert abs(got - expected).max() <= 1e-5 * abs(expected).max()
    assert flops < 0.75 * product_flops(llm, rows, return_logits="all")[1]
