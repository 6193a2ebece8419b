"""Attention of one query at a position that only the device knows: work is planned for a range of positions, and the
range does not show."""

from dataclasses import replace

import numpy as np
import pytest

from engine.kernels import paged as planning
from engine.kernels.paged import NO_ITEMS, blocks, plan, plan_drafts, work_capacity
from tests.kernels.test_attention import Case, attend, check, same_bits

CONTEXTS = [1, 17, 64, 65, 190, 256, 257, 520]


@pytest.fixture
def small(lane, monkeypatch):
    """The lane, of a small machine: rows are cut into parts, and blocks have several of them."""
    monkeypatch.setattr(planning, "N_BLOCKS", 24)
    monkeypatch.setattr(planning, "PARTIAL_FLOATS", 2**20)
    planning._plan_of_tiles.cache_clear()
    yield lane
    planning._plan_of_tiles.cache_clear()


def planned_for(lane, case, spread):
    """The case's PagedInputs with work for positions so far before and behind the true ones."""
    ranges = [(max(0, context - 1 - spread[0]), context - 1 + spread[1]) for _, _, context in case.rows]
    items = plan_drafts(ranges, **case.dims, window=case.see.get("window"))
    return replace(case.inputs(lane.put), decode_work=lane.put(items),
                   n_decode_work=lane.put(np.array([len(items)], np.int32)),
                   n_decode_blocks=blocks(len(items), case.dims["n_kv_heads"]), prefill_work=lane.put(NO_ITEMS),
                   n_prefill_work=lane.put(np.zeros(1, np.int32)), n_prefill_blocks=0)


@pytest.mark.parametrize("head_dim, n_kv_heads, group", [(64, 1, 4), (64, 2, 16), (512, 1, 8)])
@pytest.mark.parametrize("window", [None, 16, 100])
def test_the_range_does_not_show(small, head_dim, n_kv_heads, group, window):
    """What lies before the window, behind the position or with nobody is NaN, and page tables end at the position."""
    see = {} if window is None else {"window": window}
    case = Case.make([(1, context) for context in CONTEXTS], head_dim, n_kv_heads, group, page_size=3, **see)
    want = attend(small, case)
    assert np.isfinite(want.astype(np.float32)).all()
    check(small, case)
    for spread in ((0, 16), (16, 0), (300, 700)):
        assert same_bits(attend(small, case, planned_for(small, case, spread)), want), spread


@pytest.mark.parametrize("window", [None, 100])
def test_with_one_position_it_is_the_plan_of_a_decode_step(window):
    dims = {"n_heads": 8, "n_kv_heads": 2, "head_dim": 64, "window": window}
    work = plan([(i, i + 1, context) for i, context in enumerate(CONTEXTS)], **dims)
    items = plan_drafts([(context - 1, context - 1) for context in CONTEXTS], **dims)
    np.testing.assert_array_equal(items, work.decode)
    assert not len(work.prefill)


@pytest.mark.parametrize("window", [None, 16, 100, 1024])
def test_a_list_has_the_room_that_decode_steps_are_given(window):
    """Ranges of up to 16 positions more than a decode step has."""
    rng = np.random.default_rng(3)
    for n_kv_heads in (1, 4):
        for n_seqs in (1, 7, 64):
            last = rng.integers(0, 5000, n_seqs).tolist()
            items = plan_drafts([(at, at + 16) for at in last], n_heads=4 * n_kv_heads, n_kv_heads=n_kv_heads,
                                head_dim=256, window=window)
            assert len(items) <= work_capacity(n_seqs, 5017, n_kv_heads, 256, window)


def test_no_sequences_are_no_work(lane):
    assert plan_drafts([], n_heads=4, n_kv_heads=1, head_dim=64).shape == NO_ITEMS.shape


def test_rows_without_work_are_left_alone(small):
    """The padding of a bucket, whatever its lengths are."""
    case = Case.make([(1, 70), (1, 40)], 64, n_kv_heads=1, group=4)
    items = plan_drafts([(69, 73)], **case.dims)
    only = replace(planned_for(small, case, (0, 4)), decode_work=small.put(items),
                   n_decode_work=small.put(np.array([len(items)], np.int32)))
    got = attend(small, case, only)
    assert same_bits(got[:1], attend(small, case)[:1]) and (got[1:].view(np.uint16) == 0xFFFF).all()
