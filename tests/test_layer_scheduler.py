"""engine/layer_scheduler.py: what a ModelSpec can say and no branch runs is refused by name, before anything runs."""

from dataclasses import replace

import pytest

from engine.layer_scheduler import LayerScheduler
from engine.models.presets import preset
from tests.planned_models import PLANNED

SMALL = preset("gemma-3-270m")


def with_layer_2(**fields):
    layers = list(SMALL.layers)
    layers[2] = replace(layers[2], **fields)
    return replace(SMALL, layers=tuple(layers))


@pytest.mark.parametrize("spec, message", [
    (replace(SMALL, per_layer_input=256), "no branch for per-layer inputs, of 256"),
    (with_layer_2(mlp=PLANNED["gemma-4-26b-a4b"].layers[0].mlp), "layer 2: no branch for AttentionSpec and MoeSpec"),
    (with_layer_2(attention=replace(SMALL.layers[2].attention, chunk=8192)),
     r"layer 2: no branch for chunked\(8192\) attention"),
    (with_layer_2(kv_from=0), "layer 2: no branch for reading the K and V of layer 0"),
    *((spec, "no branch for ") for spec in PLANNED.values()),
])
def test_what_no_branch_runs_is_refused(spec, message):
    with pytest.raises(TypeError, match=message):
        LayerScheduler(spec, weights=None, kv_cache=None, workspace=None, lane=None)
