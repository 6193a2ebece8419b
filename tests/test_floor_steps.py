"""Floors of steps beside each other: more work never costs less, work in parts costs its operations once, and dropping
the tokens that nobody asked for saves what it must."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.cost import Cost, draft_step, floor, floor_parts
from engine.models.presets import DRAFTS, PRESETS, draft_preset, preset

BLOCK = 8192                    # positions: a whole number of every preset's chunks
SPECS = {name: preset(name) for name in PRESETS}
names = st.sampled_from(sorted(PRESETS))
sizes = st.tuples(st.sampled_from([0.5, 1, 2, 4]), st.sampled_from([1, 2, 4]))


@st.composite
def rows(draw, most=3000):
    n_query = draw(st.integers(1, most))
    return (draw(st.integers(1, 70)), n_query, n_query + draw(st.integers(0, 3 * BLOCK)),
            draw(st.integers(0, min(n_query, 17))))


def is_at_least(more, less):
    return all(getattr(more, field) >= getattr(less, field) * (1 - 1e-12) for field in ("bytes", "flops"))


@given(name=names, row=rows(), sizes=sizes, drops=st.booleans())
@settings(max_examples=60, deadline=None)
def test_more_work_never_costs_less(name, row, sizes, drops):
    spec, (n_seqs, n_query, context, n_logits) = SPECS[name], row
    least = floor(spec, [row], *sizes, drops=drops)
    for more in ((n_seqs + 1, n_query, context, n_logits), (n_seqs, n_query + 1, context + 1, n_logits),
                 (n_seqs, n_query, context + BLOCK, n_logits), (n_seqs, n_query, context, min(n_logits + 1, n_query))):
        assert is_at_least(floor(spec, [more], *sizes, drops=drops), least), more
    wider = floor(spec, [row], 2 * sizes[0], 2 * sizes[1], drops=drops)
    assert (wider.bytes, wider.flops) == (pytest.approx(2 * least.bytes), least.flops)


@given(name=names, step=st.lists(rows(), min_size=2, max_size=4), sizes=sizes, drops=st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_mixed_step_costs_the_operations_of_its_parts_and_reads_weights_once(name, step, sizes, drops):
    whole = floor_parts(SPECS[name], step, *sizes, drops=drops)
    parts = [floor_parts(SPECS[name], [row], *sizes, drops=drops) for row in step]
    for key, cost in whole.items():
        of_key = [part[key] for part in parts]
        assert cost.flops == sum(one.flops for one in of_key)
        assert max(one.bytes for one in of_key) <= cost.bytes * (1 + 1e-12)
        assert cost.bytes <= sum(one.bytes for one in of_key) * (1 + 1e-12)
    assert whole["attention"] == sum((part["attention"] for part in parts), Cost())


@given(name=names, ends=st.sets(st.integers(1, 20_000), min_size=2, max_size=5), drops=st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_prompt_in_chunks_costs_its_operations_once(name, ends, drops):
    """Only the last chunk ends in a logit. Bytes are more: each reads the weights, and K and V of those before."""
    ends = sorted(ends)
    chunks = [(1, end - begin, end, int(end == ends[-1])) for begin, end in pairwise([0, *ends])]
    whole = floor_parts(SPECS[name], [(1, ends[-1], ends[-1])], drops=drops)
    parts = [floor_parts(SPECS[name], [chunk], drops=drops) for chunk in chunks]
    for key, cost in whole.items():
        assert cost.flops == sum(part[key].flops for part in parts)
        assert cost.bytes <= sum(part[key].bytes for part in parts) * (1 + 1e-12)


@given(name=names, context=st.integers(1, 20_000), n_drafts=st.integers(1, 16))
@settings(max_examples=40, deadline=None)
def test_a_check_of_drafts_costs_the_operations_of_its_tokens_one_by_one(name, context, n_drafts):
    check = floor(SPECS[name], [(1, 1 + n_drafts, context + n_drafts, 1 + n_drafts)])
    alone = [floor(SPECS[name], [(1, 1, context + i)]) for i in range(n_drafts + 1)]
    assert check.flops == sum(step.flops for step in alone)
    assert max(step.bytes for step in alone) <= check.bytes < sum(step.bytes for step in alone)


@pytest.mark.parametrize("name", DRAFTS)
def test_more_drafts_never_cost_less(name):
    draft = draft_preset(name)
    costs = [draft_step(draft, n_seqs, context) for context in (1, 500, 5000) for n_seqs in (1, 2, 64)]
    assert all(is_at_least(more, less) for less, more in pairwise(costs) if more.flops > less.flops)
    assert all(costs[i + 1].flops == 2 * costs[i].flops for i in (0, 3, 6))


# --- tokens that nobody asked for

@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("row", [(1, 1, 4096, 1), (3, 5, 9000, 5)])
def test_where_all_logits_are_wanted_nothing_is_dropped(name, row):
    assert floor_parts(SPECS[name], [row], drops=True) == floor_parts(SPECS[name], [row])


@pytest.mark.parametrize("name", ["gemma-4-e2b", "gemma-4-e4b"])
@pytest.mark.parametrize("n_logits", [0, 1, 7])
def test_layers_without_keys_of_their_own_compute_the_wanted_tokens_alone(name, n_logits):
    """Of a prompt of 2048 tokens: the layers before as ever, those behind as a step of n_logits tokens."""
    spec = SPECS[name]
    before, behind = (replace(spec, layers=layers) for layers in (spec.layers[:spec.first_shared],
                                                                  spec.layers[spec.first_shared:]))
    got = floor_parts(spec, [(2, 2048, 5000, n_logits)], drops=True)
    full = floor_parts(before, [(2, 2048, 5000, n_logits)])
    rest = floor_parts(behind, [(2, n_logits, 5000, n_logits)]) if n_logits else dict.fromkeys(full, Cost())
    embedded = 2 * 2 * n_logits * spec.hidden                       # counted in both
    assert got["linear"].bytes == full["linear"].bytes + rest["linear"].bytes - embedded
    assert got["linear"].flops == full["linear"].flops + rest["linear"].flops
    assert got["attention"] == full["attention"] + rest["attention"]
    assert got["head"] == full["head"]
    assert floor(spec, [(2, 2048, 5000, n_logits)]).flops > 1.5 * floor(spec, [(2, 2048, 5000, n_logits)],
                                                                        drops=True).flops


@pytest.mark.parametrize("n_logits", [0, 1])
def test_a_last_layer_makes_k_and_v_of_all_tokens(n_logits):
    """gemma-3-1b, a prompt of 100 tokens: of 1152 values a token, 4 query heads of 256, 1 KV head; the MLP is 6912."""
    spec = SPECS["gemma-3-1b"]
    whole, got = (floor_parts(spec, [(1, 100, 100, n_logits)], drops=drops) for drops in (False, True))
    dropped = 1152 * (2 * 4 * 256 + 3 * 6912)                       # q, o and the MLP, of 100 - n_logits tokens
    assert got["linear"].flops == whole["linear"].flops - 2 * (100 - n_logits) * dropped
    assert got["linear"].bytes == whole["linear"].bytes - 2 * dropped * (not n_logits)
    pairs = sum(range(1, 101)) - 100 * n_logits                     # the last layer is global
    assert got["attention"] == Cost(whole["attention"].bytes, flops=whole["attention"].flops - 4 * 4 * 256 * pairs)


def test_experts_of_a_last_layer_are_those_of_the_wanted_token():
    spec = SPECS["gemma-4-26b-a4b"]
    whole, got = (floor_parts(spec, [(1, 4096, 4096)], drops=drops)["experts"] for drops in (False, True))
    of_one = 3 * 2816 * 704
    assert whole.flops - got.flops == 2 * 4095 * 8 * of_one
    assert whole.bytes - got.bytes == pytest.approx(2 * (128 - 8) * of_one)
