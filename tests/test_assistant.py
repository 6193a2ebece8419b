"""engine/assistant.py: drafts of the golden draft models are transformers', with its geometry, and those of the
definition, with ours; they depend on what they may see alone. tests/test_assistant_lanes.py has the kernels."""

from dataclasses import replace

import numpy as np
import pytest

from engine.assistant import Assistant
from engine.errors import ConfigError
from tests.draft_pair import Pair
from tests.draft_points import Points, assert_close, points_of, text_of
from tests.golden import Golden
from tests.plain_draft import PlainDraft

CASES = ("gemma4-assistant", "gemma4-assistant-dense")


# --- what transformers computes

@pytest.mark.parametrize("config", ["config.json", "config_v5.json"])
@pytest.mark.parametrize("case", CASES)
def test_goldens(case, config):
    """In its geometry, (1, 1). Where the head has centroids, transformers gives all other tokens the least logit of the
    row's, less 1."""
    golden, pair = Golden(case), Pair(case, geometry=(1, 1), config=config)
    for i in range(len(golden.prompts)):
        points = Points.of(pair, case, [i], 4)
        ids, logits, states = points.draft()
        want = golden[f"p{i}.draft_logits"]
        assert ids.tolist() == golden[f"p{i}.draft_ids"].tolist()
        seen = np.isfinite(logits)
        filled = np.where(seen, logits, np.where(seen, logits, np.inf).min(axis=-1, keepdims=True) - 1)
        assert_close(filled, want)
        assert seen.mean() == (6 / 32 if pair.spec.n_centroids else 1)
        assert_close(states @ pair.weights.post.T, golden[f"p{i}.draft_hidden"])
        assert pair.draft(points.sequences, points.tokens).tolist() == ids.tolist()
        for b, (n, _) in enumerate(points_of(golden, i)):
            assert_close(points.sequences[b].task.hidden[n - 1], golden[f"p{i}.draft_fed_hidden"][b])
        for sequence in points.sequences:
            pair.kv_cache.release(sequence)


@pytest.mark.parametrize("case", CASES)
def test_what_is_read_is_what_transformers_shares(case):
    golden, pair = Golden(case), Pair(case)
    prompt = golden.prompts[0]
    sequence = pair.cached(prompt)
    for layer, kind in zip(pair.spec.layers[1:], ("sliding", "full"), strict=True):
        pool = pair.kv_cache.layer_slot[layer.kv_from][0]
        slots = [sequence.page_lists[pool].pages[at // 16] * 16 + at % 16 for at in range(len(prompt))]
        for part, pages in zip("kv", pair.pages(pool, layer.kv_from), strict=True):
            got = pages.reshape(-1, *pages.shape[2:])[slots].transpose(1, 0, 2)
            assert_close(got, golden[f"p0.shared_{kind}_{part}"])


# --- what the definition says

@pytest.mark.parametrize("page_size", [1, 3, 16])
@pytest.mark.parametrize("case", CASES)
def test_plain_math(case, page_size):
    """In our geometry, (0, 0), over prompts below and above the window, K = 16 drafts of one of them."""
    pair, plain = Pair(case, page_size=page_size), PlainDraft(case)
    points = Points.of(pair, case, range(4))
    ids, logits, states = points.draft()
    for b in range(len(ids)):
        want_ids, want_logits, want_states = points.plain(b, plain)
        assert ids[b].tolist() == want_ids
        assert_close(logits[b], want_logits)
        assert_close(states[b], want_states)
    ids, logits, _ = points.draft([5], n_steps=16)
    want_ids, want_logits, _ = points.plain(5, plain, 16)
    assert ids[0].tolist() == want_ids
    assert_close(logits[0], want_logits)


@pytest.mark.parametrize("case", CASES)
def test_geometry_is_seen_in_the_drafts(case):
    """Each of the two choices alone: as the definition has it, and unlike the other."""
    for prompt, geometry in ((0, (1, 0)), (3, (0, 1)), (3, (1, 0))):
        points, ours = Points.of(Pair(case, geometry=geometry), case, [prompt]), Points.of(Pair(case), case, [prompt])
        _, logits, states = points.draft(n_steps=1)
        for b in range(2):
            assert_close(logits[b], points.plain(b, PlainDraft(case, geometry=geometry), 1)[1])
        other = ours.draft(n_steps=1)[2]
        assert np.abs(states - other).max() > 1e-3 * np.abs(other).max()


@pytest.mark.parametrize("case", CASES)
def test_a_text_of_one_token(case):
    """The window, the pages and the position are as small as can be."""
    pair = Pair(case)
    points = Points(pair, case, [pair.cached([7])], [9])
    assert points.draft()[0][0].tolist() == points.plain(0, PlainDraft(case))[0]


def test_no_steps_are_no_drafts():
    pair = Pair(CASES[1])
    assert pair.draft([pair.cached([5, 6, 7])], [8], n_steps=0).shape == (1, 0)


# --- what drafts may not depend on

@pytest.mark.parametrize("value", [np.nan, 1e4])
@pytest.mark.parametrize("geometry", [(0, 0), (1, 1)])
@pytest.mark.parametrize("case", CASES)
def test_poison_behind_the_position_and_before_the_window(case, geometry, value):
    """Every slot of the cache but those that a draft may see; the pages behind P belong to the sequence."""
    for i in (0, 3):
        pair = Pair(case, geometry=geometry)
        points = Points.of(pair, case, [i], 1)
        before = points.draft()
        pair.poison(points.sequences[0], value, before=15 + geometry[1])
        for got, want in zip(points.draft(), before, strict=True):
            np.testing.assert_array_equal(got, want)
    pair.poison(points.sequences[0], value, before=14 + geometry[1])        # one that it sees
    after = points.draft()[2]
    assert np.isnan(after).all() if np.isnan(value) else np.abs(after - before[2]).max() > 0.1


def test_the_same_drafts_in_any_batch_on_the_cpu():
    """Whose bits depend on the batch: but no decision is so close here."""
    points = Points.of(Pair(CASES[0]), CASES[0], [1, 2, 3])
    ids, logits, _ = points.draft()
    for rows in ([0], [5, 1], [4, 3, 2, 1, 0, 5, 5]):
        got = points.draft(rows)
        np.testing.assert_array_equal(got[0], ids[rows])
        assert_close(got[1], logits[rows], 1e-5)


# --- what is wrong shows

@pytest.mark.parametrize("case", CASES)
def test_another_sequences_pages_change_the_drafts(case):
    golden, pair = Golden(case), Pair(case)
    points = Points(pair, case, [pair.cached(text_of(golden, i)[:30]) for i in (0, 1)], [7, 9])
    right, inputs = points.draft(), pair.inputs(points.sequences)
    for pool, paged in inputs.pools.items():
        wrong = replace(inputs, pools={**inputs.pools, pool: replace(paged, lists=paged.lists[::-1], _extents={})})
        got = points.draft(inputs=wrong)
        error = np.abs(got[2] - right[2]).max(axis=(1, 2)) / np.abs(right[2]).max()
        assert (error > 0.01).all(), f"pool {pool}"


@pytest.mark.parametrize("case", CASES)
def test_the_other_pools_page_table_changes_the_drafts(case):
    """Where the pools hand out pages alike nobody could tell; after a while they do not."""
    pair = Pair(case, page_size=3)
    pair.kv_cache.allocators[0].allocate(2)
    points = Points.of(pair, case, [0], 1)
    right, inputs = points.draft(), pair.inputs(points.sequences)
    swapped = points.draft(inputs=replace(inputs, pools=dict(zip((1, 0), inputs.pools.values(), strict=True))))
    assert not np.abs(swapped[2] - right[2]).max() <= 0.01 * np.abs(right[2]).max()         # or NaN: nobody's memory


@pytest.mark.parametrize("case", CASES)
def test_a_layer_on_the_wrong_pool_is_refused_at_load(case):
    pair = Pair(case)
    one, other = pair.spec.layers[0], pair.spec.layers[2]
    for layers, message in (
            ((replace(one, kv_from=other.kv_from), *pair.spec.layers[1:]), r"layer 0 of the draft is sliding\(16\)"),
            ((*pair.spec.layers[:2], replace(other, kv_from=one.kv_from)), "layer 2 of the draft is global with 1 KV")):
        with pytest.raises(ConfigError, match=message):
            Assistant(replace(pair.spec, layers=layers), pair.weights, pair.llm._core.step.layers, 1, pair.lane)


def test_the_pool_that_a_shared_layer_reads():
    """Of an E-series target, whose last layers own nothing: the last owner's pages, not the last layer's."""
    pair = Pair(CASES[0])
    assert pair.llm.spec.first_shared == 3 and pair.spec.reads == (2, 2, 1)
    owners = [pair.kv_cache.layer_slot[i] for i in pair.spec.reads]
    assert owners == [pair.kv_cache.layer_slot[i] for i in (3, 3, 4)]
