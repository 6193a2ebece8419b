"""tools/measure/step/timeline.py: the ops of a step, recorded, grouped, and what the step's time went to."""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from measure.cases import parse_case
from measure.models import kind_of
from measure.step.seats import seated, step_of
from measure.step.timeline import PARTS, Op, attribution, grouped, ops_of, recording

from engine.cost import Cost, floor, floor_parts
from tests.tools.tiny_core import core_of, spec_of


def op(name, role="", kind="", sizes=(), cost=None, n_rows=1):
    return Op(name, role, kind, sizes, n_rows, cost or Cost(), None)


def test_equal_ops_are_one_group_and_kinds_are_named_where_they_differ():
    ops = [op("linear", "qkv", "local", (1,)), op("attention", "decode", "local", (5,), Cost(10, 1, 7)),
           op("add_norm"), op("linear", "qkv", "global", (1,)), op("attention", "decode", "global", (9,)),
           op("add_norm"), op("linear", "qkv", "local", (1,)), op("attention", "decode", "local", (5,), Cost(10, 1, 7)),
           op("linear", "head", "", (2,))]
    groups = grouped(ops)
    assert [(group.name, group.order, len(group.ops)) for group in groups] == [
        ("linear qkv", 0, 3), ("attention decode local", 1, 2), ("add_norm", 2, 2), ("attention decode global", 4, 1),
        ("linear head", 8, 1)]
    assert groups[1].cost == Cost(20, 2, 14)
    of_two_kinds = [op("linear", "qkv", kind, sizes) for kind, sizes in (
        ("local", (1,)), ("global", (1,)), ("chunked", (2,)))]
    assert [group.name for group in grouped(of_two_kinds)] == ["linear qkv", "linear qkv chunked"]


def test_a_group_costs_launch_by_launch():
    """A roof is of each launch by itself: what is bound by memory does not make up for what is bound by arithmetic."""
    found, = grouped([op("linear", cost=Cost(10, 5, 20)), op("linear", cost=Cost(10, 5, 20))])
    ceilings = SimpleNamespace(bytes_per_s=1, flops_per_s=1)
    assert found.roof_s(ceilings) == 40 and found.traffic_s(ceilings) == 40
    ceilings.flops_per_s = 100
    assert found.roof_s(ceilings) == 20 and found.traffic_s(ceilings) == 30


def test_parts_add_up_to_the_wall_time():
    parts = attribution(wall_s=16.0, launches_s=11.5, kernels_s=9.25, traffic_s=6.5, floor_s=6.0)
    assert parts == {"floor": 6.0, "extra bytes": 0.5, "below roof": 2.75, "gaps": 2.25, "host": 4.5}
    assert sum(parts.values()) == 16.0 and list(parts) == list(PARTS)
    parts = attribution(wall_s=1.0, launches_s=1.5, kernels_s=1.75, traffic_s=0.5, floor_s=0.75)
    assert sum(parts.values()) == 1.0 and parts["gaps"] == -0.25


@pytest.mark.parametrize("family", ["gemma4", "gemma4-moe", "gemma4-e", "llama4"])
@pytest.mark.parametrize("text, n_kept, phase", [
    ("decode=3*1@40", None, "decode"), ("mix=20,3*1@40", 4, "mixed"), ("mix=3*1@40,20", 4, "mixed"),
    ("verify=2*4@30", None, "mixed"), ("prefill=2*1", None, "prefill"), ("prefill=2*9", 2, "prefill")])
def test_recorded_ops_are_the_steps_and_cost_at_least_the_floor(family, text, n_kept, phase):
    spec, case = spec_of(family), parse_case(text)
    core, (need,) = core_of(spec, text)
    with seated(core, case.rows, np.random.default_rng(0)) as sequences:
        batch = step_of(core, sequences, case.label == "verify")()
        before = core.step.ops, core.step.layers.ops, core.step.graphs
        with recording(core) as calls:
            expected = core.step.run(batch).slots
        assert (core.step.ops, core.step.layers.ops, core.step.graphs) == before
        ops = ops_of(calls, core, batch)
        logits = core.workspace.rows("logits", need.n_logits, spec.vocab)
        logits[...] = 0
        for one in ops:
            one.launch()
        np.testing.assert_array_equal(logits.argmax(axis=1), [token for token, _ in expected])
    assert len(ops) == len(calls) and (batch.kept is None) == (n_kept is None)
    names = Counter(one.name for one in ops)
    assert (names["attention"], names["gated_linear"], names["sample"]) == (6, 6, 1)
    n_dropping = 1 if spec.first_shared is None else len(spec.layers) - spec.first_shared
    assert [one.n_rows for one in ops if one.role.endswith("kept") and one.name == "gated_linear"] == [
        n_kept] * n_dropping * bool(n_kept)
    n_full = len(spec.layers) - n_dropping * bool(n_kept)
    assert [one.role for one in ops if one.name == "attention"] == [phase] * n_full + (
        ["decode kept"] * n_dropping if n_kept else [])
    attended = sum((one.cost.flops for one in ops if one.name == "attention"), 0)
    kept = [(n_seqs, 1, context) for n_seqs, _, context in case.rows] if n_kept else case.rows
    assert attended == sum(floor_parts(replace(spec, layers=layers), rows)["attention"].flops for layers, rows in (
        (spec.layers[:n_full], case.rows), (spec.layers[n_full:], kept)))
    if family == "gemma4":
        assert {one.name for one in ops if one.role.endswith("kept")} == (
            {"attention", "linear", "add_norm", "gated_linear"} if n_kept else set())
        n_rows = {(one.name, one.n_rows) for one in ops if one.name in ("embed", "select_rows")}
        assert n_rows == {("embed", case.n_tokens), ("select_rows", need.n_logits)}
    total = sum((one.cost for one in ops), Cost())
    least = floor(spec, need.rows(), weight_bytes=4, kv_bytes=4, drops=True)
    assert total.bytes > least.bytes
    # Of the rows that it drops our step makes what comes in one matrix with what it needs: q beside k and v in the last
    # layer, or the inputs of all layers.
    n_dropped = case.n_tokens - need.n_logits
    n_besides = spec.layers[-1].attention.q_width if spec.first_shared is None else n_dropping * spec.per_layer_input
    assert total.flops == least.flops + 2 * n_dropped * spec.hidden * n_besides


def groups_of(spec, text):
    core, _ = core_of(spec, text)
    case = parse_case(text)
    with seated(core, case.rows, np.random.default_rng(0)) as sequences:
        batch = step_of(core, sequences, False)()
        with recording(core) as calls:
            core.step.run(batch)
        return {group.name: group for group in grouped(ops_of(calls, core, batch))}


@pytest.mark.parametrize("family, launches", [
    ("gemma4-moe", {"linear router": 6, "router_norm": 6, "moe_route": 6, "moe_gated_linear": 6, "moe_linear down": 6,
                    "moe_combine": 6, "add_norms": 6, "gated_linear": 6, "linear down": 6}),
    ("gemma4-e", {"embed per layer": 1, "linear per-layer context": 1, "mix_per_layer": 1, "linear per-layer gate": 6,
                  "gate_per_layer": 6, "linear per-layer out": 6, "gated_linear": 3, "gated_linear wide": 3,
                  "linear down wide": 3, "linear q local": 2, "linear q global": 1, "qk_norm_rope_cache q local": 2}),
    ("llama4", {"linear router": 3, "scale_rows": 3, "moe_gated_linear": 3, "moe_linear down": 3, "gated_linear": 3,
                "gated_linear shared expert": 3, "linear down shared expert": 3, "attention_temperature": 1,
                "attention decode chunked": 4 + 1, "qk_norm_rope_cache global": 1})])
def test_ops_of_other_families_by_name(family, launches):
    groups = groups_of(spec_of(family), "decode=3*1@40")
    assert {name: len(groups[name].ops) if name in groups else 0 for name in launches} == launches


def test_products_by_expert_keep_the_routes_of_their_layer():
    """A prompt's last layer computes one row: its few experts are not those of the layers before."""
    spec = spec_of("gemma4-moe")
    groups = groups_of(spec, "prefill=24")
    n_pairs = 24 * spec.layers[0].moe.experts_per_token
    for op in groups["moe_gated_linear"].ops:
        routes = op.launch.args[2]
        assert routes.begins[-1] == n_pairs and op.cost.flops == 2 * n_pairs * 32 * 2 * 12
    assert groups["moe_gated_linear kept"].ops[0].launch.args[2].begins[-1] == n_pairs // 24


def test_layers_of_pools_that_differ_in_size_alone_are_one_group():
    core, _ = core_of(spec_of("gemma3"), "decode=3*1@60")
    assert len({len(pages) for pages in core.kv_cache.k}) == 2
    with seated(core, [(3, 1, 60)], np.random.default_rng(0)) as sequences:
        batch = step_of(core, sequences, False)()
        with recording(core) as calls:
            core.step.run(batch)
    names = [group.name for group in grouped(ops_of(calls, core, batch))]
    assert names.count("qk_norm_rope_cache") == 1 and "attention decode global" in names


def test_kinds_of_attention_by_name():
    attention = spec_of("gemma4").layers[-1].attention
    assert [kind_of(replace(attention, window=window, chunk=chunk)) for window, chunk in (
        (None, None), (8, None), (None, 8))] == ["global", "local", "chunked"]
